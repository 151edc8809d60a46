"""KV events from every replica's engine into the fleet.

An engine numbers its batches from 0, publishes each once and keeps the last ones for replay. So what was
missed is asked for again; where it cannot be had any more, the replica's cache is unknown and learnt anew.
Another engine at the same place numbers from 0 as well: what is asked for begins with the batch that was
taken last, and who has another one there, or none, is another engine.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from itertools import count
from time import monotonic
from typing import Protocol

import msgspec
import zmq
import zmq.asyncio

from router.core.fleet import Fleet, Replica
from router.core.kv_events import decode_batch, joined
from router.core.trust import Doubt
from router.metrics import Metrics

log = logging.getLogger(__name__)

# vLLM's own high-water mark: beyond, what is published is dropped, and shows as a gap.
HWM = 100_000
# While a replay comes, the next part of it is milliseconds away; vLLM 0.32 may forget to send its end.
REPLAY_QUIET_S = 1.0
# Streams wait for the loop as well: after so many seconds of events, others have their turn.
TURN_S = 0.002

END = (-1).to_bytes(8, "big", signed=True)  # the number that ends a replay
HYBRID = "its model has several groups of KV cache, of which one is followed"


class Listener(Protocol):
    """Who judges what events tell of their replica."""

    def restarted(self, replica_id: str) -> None: ...

    def doubted(self, replica_id: str, kind: Doubt, reason: str) -> None: ...

    def removed(self, replica_id: str, keys: list[int]) -> None: ...


@dataclass(slots=True)
class Place:
    """How far an engine's batches were taken in.

    `due`: the number of the next one. `last`: the one before it, if that was taken. `ts`: when the last one
    taken was made, by the engine's clock.
    """

    due: int = 0
    last: bytes | None = None
    ts: float = 0.0


@dataclass(slots=True, eq=False)
class Feed:
    """The events of one replica. `taking`: a replay and what is live do not mix."""

    replica: Replica
    place: Place = field(default_factory=Place)
    taking: asyncio.Lock = field(default_factory=asyncio.Lock)
    hybrid: bool = False
    unkeyed: int = 0


class Turns:
    """Shares the loop: who takes in batches asks after each one whether others have waited long enough.

    All feeds have one between them, so that they hold the loop no longer than one would: when a turn is over,
    each of them has one more batch.
    """

    def __init__(self) -> None:
        # Not loop.time(), which on uvloop stands still as long as the loop is held.
        self._ends = monotonic() + TURN_S
        self._over = False

    async def share(self) -> None:
        """Lets all else run once the turn is over."""
        if monotonic() < self._ends:
            return
        if not self._over:
            self._over = True
            asyncio.get_running_loop().call_soon(self._begin)
            await asyncio.sleep(0)  # who had this turn is not the first in the next
        await asyncio.sleep(0)

    def _begin(self) -> None:
        self._over = False
        self._ends = monotonic() + TURN_S


class KVFeed:
    """Follows replicas that publish their KV events. What it learns goes to the fleet and to the listener."""

    def __init__(self, fleet: Fleet, metrics: Metrics, listener: Listener) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._listener = listener
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Replicas can be followed from now on."""
        self._context = zmq.asyncio.Context()
        self._turns = Turns()

    def follow(self, replica: Replica) -> None:
        """A replica joined, or is back; what it held before is forgotten."""
        self.drop(replica.id)
        self._fleet.forget(replica.id)
        if replica.kv_events is not None:
            self._tasks[replica.id] = asyncio.get_running_loop().create_task(self._follow(Feed(replica)))

    def drop(self, replica_id: str) -> None:
        """A replica left."""
        if (task := self._tasks.pop(replica_id, None)) is not None:
            task.cancel()

    async def stop(self) -> None:
        """Follows nothing any more."""
        tasks = list(self._tasks.values())
        for replica_id in list(self._tasks):
            self.drop(replica_id)
        await asyncio.gather(*tasks, return_exceptions=True)
        self._context.destroy(linger=0)

    async def _follow(self, feed: Feed) -> None:
        assert feed.replica.kv_events is not None
        with (
            self._context.socket(zmq.SUB) as live,
            live.get_monitor_socket(zmq.EVENT_HANDSHAKE_SUCCEEDED) as connections,
        ):
            live.set_hwm(HWM)
            live.subscribe(b"")
            live.connect(feed.replica.kv_events)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._connected(feed, connections))
                group.create_task(self._live(feed, live))

    async def _connected(self, feed: Feed, connections: zmq.asyncio.Socket) -> None:
        """Subscribed first, then asked, so that nothing falls between; and so again after each break."""
        for connection in count():
            await connections.recv_multipart()
            async with feed.taking:
                if connection and feed.replica.kv_replay is None:
                    self._lost(feed, "the connection to its KV events broke")
                    feed.place = Place()
                await self._replay(feed)

    async def _live(self, feed: Feed, live: zmq.asyncio.Socket) -> None:
        """Batches as they come."""
        while True:
            frames = await live.recv_multipart()
            if len(frames) == 3:
                async with feed.taking:
                    await self._heard(feed, int.from_bytes(frames[1], "big"), frames[2])
            else:
                self._lost(feed, f"what it publishes has {len(frames)} parts; a batch of KV events has 3")
            await self._turns.share()

    async def _heard(self, feed: Feed, number: int, payload: bytes) -> None:
        """A live batch: the one that is due, or one of before, or of another engine, or behind a gap."""
        place = feed.place
        if number < place.due and _made_at(payload) > place.ts:
            self._restarted(feed)
        if number > place.due:
            if place.due:
                self._metrics.of(feed.replica.models[0]).event_gaps.inc()
            await self._replay(feed)
        if number > place.due:
            self._skip(feed, number)
        if number == place.due:
            self._take(feed, payload)

    async def _replay(self, feed: Feed) -> None:
        """Takes what the engine still has from the batch that is due on.

        It is asked again from where its answer had a hole or stopped without its end, as vLLM 0.32's may.
        """
        while feed.replica.kv_replay is not None:
            asked = feed.place.due
            start = asked if feed.place.last is None else asked - 1
            try:
                async with aclosing(self._replayed(feed.replica.kv_replay, start)) as batches:
                    whole = await self._take_replayed(feed, batches)
            except TimeoutError:
                whole = feed.place.due == asked
            if whole:
                return

    async def _take_replayed(self, feed: Feed, batches: AsyncIterator[tuple[int, bytes]]) -> bool:
        """False where it has to be asked again: at a hole, or when it is another engine.

        What is missing at the very beginning is lost: just that was asked for.
        """
        place, asked, last = feed.place, feed.place.due, feed.place.last
        async for number, payload in batches:
            if last is not None and number < asked and payload != last:
                break
            last = None
            if number > place.due != asked:
                return False
            if number > place.due:
                self._skip(feed, number)
            if number == place.due:
                self._take(feed, payload)
            await self._turns.share()
        if last is not None:
            self._restarted(feed)
        return last is None

    async def _replayed(self, endpoint: str, start: int) -> AsyncGenerator[tuple[int, bytes], None]:
        """Batches from number `start` on to the last one. Raises TimeoutError where nothing more comes."""
        with self._context.socket(zmq.DEALER) as asked:
            asked.set_hwm(0)  # vLLM drops what does not fit
            asked.linger = 0
            asked.connect(endpoint)
            await asked.send_multipart([b"", start.to_bytes(8, "big")])
            while True:
                async with asyncio.timeout(REPLAY_QUIET_S):
                    frames = await asked.recv_multipart()
                if len(frames) != 4 or frames[2] == END:
                    return
                yield int.from_bytes(frames[2], "big"), frames[3]

    def _take(self, feed: Feed, payload: bytes) -> None:
        """The batch that is due."""
        place = feed.place
        place.due, place.last = place.due + 1, payload
        try:
            batch = decode_batch(payload)
        except msgspec.DecodeError as error:
            self._lost(feed, f"a batch of its KV events cannot be read: {error}")
            return
        place.ts = batch.ts
        replica_id, left = feed.replica.id, list[int]()
        for event in joined(batch.events):
            left += self._fleet.apply(replica_id, event)
        if left:
            self._listener.removed(replica_id, left)
        self._look(feed)

    def _look(self, feed: Feed) -> None:
        """What the index could not make of the events."""
        unkeyed = self._fleet.unkeyed(feed.replica.id)
        if unkeyed != feed.unkeyed:
            # After a cache was forgotten it counts from 0.
            new = unkeyed - feed.unkeyed if unkeyed > feed.unkeyed else unkeyed
            self._metrics.of(feed.replica.models[0]).blocks_unkeyed.inc(new)
            feed.unkeyed = unkeyed
        if not feed.hybrid and self._fleet.is_hybrid(feed.replica.id):
            feed.hybrid = True
            self._listener.doubted(feed.replica.id, Doubt.HYBRID, HYBRID)

    def _skip(self, feed: Feed, number: int) -> None:
        """What lies between cannot be had any more: what is known begins with this batch."""
        first, last = feed.place.due, number - 1
        self._lost(feed, f"its KV events {first} to {last} are lost")
        feed.place.due, feed.place.last = number, None

    def _restarted(self, feed: Feed) -> None:
        """Its numbers begin anew: another engine, with an empty cache."""
        feed.place.due, feed.place.last = 0, None
        self._fleet.forget(feed.replica.id)
        self._listener.restarted(feed.replica.id)

    def _lost(self, feed: Feed, reason: str) -> None:
        """What its cache holds is not known any more."""
        self._metrics.of(feed.replica.models[0]).events_lost.inc()
        self._fleet.forget(feed.replica.id)
        self._listener.doubted(feed.replica.id, Doubt.EVENTS_LOST, reason)


def _made_at(payload: bytes) -> float:
    """When a batch was made, by the engine's clock; 0 if it cannot be read."""
    try:
        return decode_batch(payload).ts
    except msgspec.DecodeError:
        return 0.0
