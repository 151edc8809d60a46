"""The feed against a publisher on real ZMQ sockets that loses, repeats and starts anew what a test says."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from dataclasses import replace

import httpx
import msgspec
import pytest
import zmq
import zmq.asyncio
from engine_wire import MODEL, start_engine
from router_wire import until

from router import kv_feed
from router.core.blocks import Prompt, block_keys
from router.core.fleet import NOTHING_CACHED, Fleet, Replica, Trust
from router.core.trust import Doubt
from router.health import Endpoint, learn
from router.kv_feed import KVFeed
from router.metrics import Metrics

BLOCK = 4
END = (-1).to_bytes(8, "big", signed=True)


def ids(number):
    """The tokens of the block that batch `number` stores."""
    return [1000 + number] * BLOCK


def batch(number, ts, **fields):
    event = {
        "type": "BlockStored",
        "block_hashes": [7 + number],
        "token_ids": ids(number),
        "block_size": BLOCK,
        "parent_block_hash": None,
        "medium": "GPU",
        **fields,
    }
    return msgspec.msgpack.encode([ts, [event], 0])


def bound(socket, port):
    socket.bind(f"tcp://127.0.0.1:{port or '*'}")
    return int(socket.getsockopt_string(zmq.LAST_ENDPOINT).rpartition(":")[2])


class Publisher:
    """An engine's events. `kept`: what a replay gives, by number; `ends`: whether it says that it ends."""

    def __init__(self, ports=(0, 0)):
        self.kept: dict[int, bytes] = {}
        self.ends = True
        self.asked: list[int] = []
        self._context = zmq.asyncio.Context()
        self._live, self._replay = self._context.socket(zmq.XPUB), self._context.socket(zmq.ROUTER)
        self.ports = [
            bound(socket, port) for socket, port in zip((self._live, self._replay), ports, strict=True)
        ]
        self._serving = asyncio.create_task(self._serve())

    @property
    def replica(self):
        events, replay = (f"tcp://127.0.0.1:{port}" for port in self.ports)
        return Replica("r", "http://r", ("m",), block_size=BLOCK, kv_events=events, kv_replay=replay)

    async def subscribed(self):
        assert await asyncio.wait_for(self._live.recv(), 10) == b"\x01"

    async def say(self, number, ts=None, live=True, kept=True):
        payload = batch(number, number if ts is None else ts)
        if kept:
            self.kept[number] = payload
        if live:
            await self.send(number, payload)

    async def send(self, number, payload):
        await self.send_frames(b"kv", number.to_bytes(8, "big"), payload)

    async def send_frames(self, *frames):
        await self._live.send_multipart(frames)

    async def _serve(self):
        while True:
            client, _, start = await self._replay.recv_multipart()
            self.asked.append(int.from_bytes(start, "big"))
            for number in sorted(n for n in self.kept if n >= self.asked[-1]):
                frames = [client, b"", b"kv", number.to_bytes(8, "big"), self.kept[number]]
                await self._replay.send_multipart(frames)
            if self.ends:
                await self._replay.send_multipart([client, b"", b"", END, b""])

    async def stop(self):
        self._serving.cancel()
        await asyncio.gather(self._serving, return_exceptions=True)
        self._context.destroy(linger=0)


class Listener:
    """Notes what it is told."""

    def __init__(self):
        self.told: list[object] = []

    def restarted(self, replica_id):
        self.told.append("restarted")

    def doubted(self, replica_id, kind, reason):
        self.told.append((kind, reason))

    def removed(self, replica_id, keys):
        self.told.append(keys)


class Scene:
    def __init__(self, **fields):
        self.publisher, self.listener, self.fleet = Publisher(), Listener(), Fleet()
        self.replica = replace(self.publisher.replica, **fields)
        self.fleet.joined(self.replica, 0.0)
        self.fleet.trusted("r", Trust.EXACT, "proven", BLOCK)
        self.metrics = Metrics()
        self.feed = KVFeed(self.fleet, self.metrics, self.listener)
        self.feed.start()

    def knows(self, number):
        """Whether the block of a batch is in the index."""
        prompt = Prompt.of_keys(2 * BLOCK, block_keys(packed(ids(number)), BLOCK), BLOCK)
        return "r" in self.fleet.view("m", prompt=prompt).cached

    async def follow(self):
        self.feed.follow(self.replica)
        await self.publisher.subscribed()
        if self.replica.kv_replay is not None:
            await until(lambda: bool(self.publisher.asked))

    async def start_anew(self):
        """The engine ends, and another one is where it was; the feed has found it."""
        await self.publisher.stop()
        self.publisher = Publisher(self.publisher.ports)
        await self.publisher.subscribed()


def packed(token_ids):
    return b"".join(token.to_bytes(4, "little") for token in token_ids)


@contextlib.asynccontextmanager
async def scene(**fields):
    it = Scene(**fields)
    try:
        yield it
    finally:
        await it.feed.stop()
        await it.publisher.stop()


async def test_what_is_live_reaches_the_index():
    async with scene() as it:
        await it.follow()
        await it.publisher.say(0)
        await until(lambda: it.knows(0))
        assert it.listener.told == []


async def test_who_comes_late_learns_what_was_before():
    async with scene() as it:
        for number in range(300):
            await it.publisher.say(number)
        await it.follow()
        await until(lambda: all(it.knows(number) for number in range(300)))
        await it.publisher.say(300)
        await until(lambda: it.knows(300))
        assert it.listener.told == []


async def test_a_gap_is_replayed():
    async with scene() as it:
        await it.follow()
        await it.publisher.say(0)
        await it.publisher.say(1, live=False)
        await it.publisher.say(2)
        await until(lambda: it.knows(2))
        assert it.knows(0)
        assert it.knows(1)
        assert it.listener.told == []
        assert it.publisher.asked == [
            0,
            0,
        ]  # from the last batch that was taken, which tells that it is the same engine


async def test_what_is_lost_costs_what_was_known_and_the_rest_goes_on():
    async with scene() as it:
        await it.follow()
        await it.publisher.say(0)
        await until(lambda: it.knows(0))
        await it.publisher.say(3)
        await until(lambda: it.knows(3))
        assert not it.knows(0)
        assert it.listener.told == [(Doubt.EVENTS_LOST, "its KV events 1 to 2 are lost")]
        await it.publisher.say(4)
        await until(lambda: it.knows(4))
        assert it.knows(3)
        assert len(it.listener.told) == 1


async def test_a_buffer_with_a_hole_is_asked_again_before_that_is_believed():
    async with scene() as it:
        for number in (0, 1, 4, 5):
            await it.publisher.say(number)
        await it.follow()
        await until(lambda: it.knows(5))
        assert it.publisher.asked == [0, 1]
        assert (it.knows(1), it.knows(4)) == (False, True)
        assert it.listener.told == [(Doubt.EVENTS_LOST, "its KV events 2 to 3 are lost")]


async def test_a_replay_without_its_end_is_enough(monkeypatch):
    monkeypatch.setattr(kv_feed, "REPLAY_QUIET_S", 0.1)
    async with scene() as it:
        it.publisher.ends = False
        await it.publisher.say(0)
        await it.follow()
        await until(lambda: it.publisher.asked == [0, 0])
        await it.publisher.say(1)
        await until(lambda: it.knows(1))
        assert it.knows(0)
        assert it.listener.told == []


async def test_an_engine_that_starts_anew_has_an_empty_cache():
    async with scene() as it:
        await it.follow()
        for number in range(5):
            await it.publisher.say(number)
        await until(lambda: it.knows(4))
        it.publisher.kept.clear()
        await it.publisher.say(0, ts=100, live=False)
        await it.publisher.say(1, ts=101)
        await until(lambda: it.listener.told == ["restarted"])
        await until(lambda: it.knows(1))
        assert it.knows(0)
        assert not it.knows(4)


async def test_an_engine_that_started_anew_and_went_further_is_another_one():
    async with scene() as it:
        await it.follow()
        for number in range(3):
            await it.publisher.say(number)
        await until(lambda: it.knows(2))
        it.publisher.kept = {number: batch(10 + number, 100 + number) for number in range(6)}
        await it.publisher.send(5, it.publisher.kept[5])
        await until(lambda: it.knows(15))
        assert all(it.knows(10 + number) for number in range(6))
        assert not any(it.knows(number) for number in range(3))
        assert it.listener.told == ["restarted"]


@pytest.mark.parametrize("before", [1, 3])
async def test_an_engine_that_starts_anew_is_noticed_before_it_says_anything(before):
    async with scene() as it:
        await it.follow()
        for number in range(3):
            await it.publisher.say(number)
        await until(lambda: it.knows(2))
        await it.start_anew()
        await until(lambda: it.listener.told == ["restarted"])
        assert not it.knows(2)
        for number in range(before):
            await it.publisher.send(number, batch(10 + number, 100 + number))
        await until(lambda: it.knows(9 + before))
        assert it.listener.told == ["restarted"]


async def test_a_connection_that_broke_costs_nothing_where_the_engine_is_the_same():
    async with scene() as it:
        await it.follow()
        await it.publisher.say(0)
        await until(lambda: it.knows(0))
        kept = it.publisher.kept
        await it.publisher.stop()
        it.publisher = Publisher(it.publisher.ports)
        it.publisher.kept = {**kept, 1: batch(1, 1)}  # nobody heard this one
        await until(lambda: it.knows(1))
        assert it.knows(0)
        assert it.listener.told == []


async def test_without_a_replay_nobody_knows_whether_it_is_the_same_engine():
    async with scene(kv_replay=None) as it:
        await it.follow()
        await it.publisher.say(0)
        await until(lambda: it.knows(0))
        await it.start_anew()
        await until(lambda: bool(it.listener.told))
        assert it.listener.told == [(Doubt.EVENTS_LOST, "the connection to its KV events broke")]
        assert not it.knows(0)
        await it.publisher.say(0, ts=100)
        await until(lambda: it.knows(0))


async def test_what_comes_twice_changes_nothing():
    async with scene() as it:
        await it.follow()
        for number in (0, 1, 0, 1, 2):
            await it.publisher.say(number)
        await until(lambda: it.knows(2))
        assert it.knows(0)
        assert it.listener.told == []


@pytest.mark.parametrize(
    "payload", [b"", b"\xff", msgspec.msgpack.encode([1.0, [{"type": "BlockStored"}], 0])]
)
async def test_what_cannot_be_read_is_told_and_got_over(payload):
    async with scene() as it:
        await it.follow()
        await it.publisher.send(0, payload)
        await until(lambda: len(it.listener.told) == 1)
        ((kind, reason),) = it.listener.told
        assert kind is Doubt.EVENTS_LOST
        assert "cannot be read" in reason
        await it.publisher.say(1)
        await until(lambda: it.knows(1))
        assert len(it.listener.told) == 1


async def test_what_is_no_batch_is_told_and_got_over():
    async with scene() as it:
        await it.follow()
        await it.publisher.send_frames(b"kv", b"hello")
        await until(lambda: len(it.listener.told) == 1)
        await it.publisher.say(0)
        await until(lambda: it.knows(0))


async def test_blocks_behind_an_unknown_one_are_counted():
    async with scene() as it:
        await it.follow()
        for number in range(2):
            await it.publisher.send(number, batch(number, number, parent_block_hash=99))
        await it.publisher.say(2)
        await until(lambda: it.knows(2))
        assert not it.knows(0)
        assert it.metrics.of("m").blocks_unkeyed.value == 2


async def test_several_groups_of_a_cache_are_told_once():
    async with scene() as it:
        await it.follow()
        for number, group in enumerate((0, 1, 0)):
            await it.publisher.send(number, batch(number, number, group_idx=group))
        await until(lambda: it.knows(2))
        assert not it.knows(1)
        assert it.listener.told == [(Doubt.HYBRID, kv_feed.HYBRID)]


async def test_a_replica_that_left_is_not_listened_to():
    async with scene() as it:
        await it.follow()
        it.feed.drop("r")
        assert await asyncio.wait_for(it.publisher._live.recv(), 10) == b"\x00"


async def test_feeds_together_hold_the_loop_no_longer_than_one_would(monkeypatch):
    """Four that have a hundred batches to take in, ten of them a turn."""
    now, log, iteration = 0.0, [], 0
    monkeypatch.setattr(kv_feed, "monotonic", lambda: now)
    turns = kv_feed.Turns()

    async def take(feed):
        nonlocal now
        for _ in range(100):
            now += kv_feed.TURN_S / 10
            log.append((iteration, feed))
            await turns.share()

    async def others():
        nonlocal iteration
        while True:
            iteration += 1
            await asyncio.sleep(0)

    waiting = asyncio.create_task(others())
    await asyncio.gather(*map(take, range(4)))
    waiting.cancel()
    assert max(Counter(at for at, _ in log).values()) <= 10 + 4
    halfway = Counter(feed for _, feed in log[:200])
    assert max(halfway.values()) - min(halfway.values()) <= 20


async def test_a_simulated_engine_is_followed_through_loss(start):
    """A router that comes late learns all, and batches that the wire lost are replayed."""
    engine = await asyncio.to_thread(start_engine, start, "simulated", {"speed": 50, "block-size": 16})
    fleet, listener = Fleet(), Listener()
    async with httpx.AsyncClient(trust_env=False) as client:

        async def said(first):
            body = {"model": MODEL, "prompt": prompt(first), "max_tokens": 1}
            (await client.post(f"{engine.url}/v1/completions", json=body)).raise_for_status()

        await said(0)
        replica = await learn(client, Endpoint("r", engine.url))
        fleet.joined(replica, 0.0)
        fleet.trusted("r", Trust.EXACT, "proven", 16)
        feed = KVFeed(fleet, Metrics(), listener)
        feed.start()
        try:
            feed.follow(replica)
            await until(lambda: cached(fleet, 0) == 64)
            await said(100)
            await until(lambda: cached(fleet, 100) == 64)
            lose = {"kind": "drop_kv_events", "times": 2}
            (await client.post(f"{engine.url}/faults", json=lose)).raise_for_status()
            for first in (200, 300, 400, 500):
                await said(first)
            await until(lambda: all(cached(fleet, first) == 64 for first in range(0, 600, 100)))
            assert [told for told in listener.told if not isinstance(told, list)] == []
        finally:
            await feed.stop()


async def test_an_engine_that_offloads_is_known_on_both_tiers(start):
    """What its GPU gave up is known to be on its CPU, counts as cached, and is at hand once it is loaded."""
    args = {"speed": 50, "block-size": 16, "num-gpu-blocks-override": 9, "kv-offloading-size": 1}
    engine = await asyncio.to_thread(start_engine, start, "simulated", args)
    fleet = Fleet()
    async with httpx.AsyncClient(trust_env=False) as client:

        async def said(first):
            body = {"model": MODEL, "prompt": prompt(first), "max_tokens": 1}
            reply = (await client.post(f"{engine.url}/v1/completions", json=body)).raise_for_status().json()
            return reply["usage"]["prompt_tokens_details"]["cached_tokens"]

        replica = await learn(client, Endpoint("r", engine.url, "simulated"))
        fleet.joined(replica, 0.0)
        fleet.trusted("r", Trust.EXACT, "proven", 16)
        feed = KVFeed(fleet, Metrics(), Listener())
        feed.start()
        try:
            feed.follow(replica)
            assert [await said(first) for first in (0, 100, 200)] == [0, 0, 0]
            await until(lambda: had(fleet, 200).tokens == 64)
            before = had(fleet, 0)
            assert before.slower > 0
            assert before.known == await said(0) == 64
            await until(lambda: had(fleet, 0).tokens == 64)
            assert (
                await asyncio.to_thread(engine.metric, "vllm:external_prefix_cache_hits_total")
                == before.slower
            )
            assert await asyncio.to_thread(engine.metric, "vllm:prefix_cache_hits_total") == before.tokens
            source = fleet.index.source(fleet.get("r").bit)
            assert (source.orphans, source.unkeyed) == (0, 0)
        finally:
            await feed.stop()


def had(fleet, first):
    asked = Prompt(65, packed(prompt(first)))
    return fleet.view(MODEL, prompt=asked).cached.get("r", NOTHING_CACHED)


def prompt(first):
    return list(range(first, first + 65))


def cached(fleet, first):
    return had(fleet, first).tokens
