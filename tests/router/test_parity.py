"""Trust that is lost and found again, on real engines that are broken on purpose."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import sys
from dataclasses import dataclass, replace
from random import Random
from typing import NamedTuple

import httpx
import pytest
from prometheus_client import generate_latest
from router_wire import VLLM_PAGES, WAIT_S, answering, reply, until
from router_wire import engine as scripted
from support import Running, Start, eventually, free_ports
from xxhash import xxh3_64_intdigest

from router.canary import CHAT, request
from router.config import RouterConfig
from router.core.blocks import Prompt
from router.core.fleet import Cached, Fleet, Trust
from router.core.kv_events import BlockStored
from router.core.trust import Cause, Doubt
from router.front import FrontDoor
from router.health import Endpoint, learn
from router.http.sse import PromptTokensDetails, Usage, usage_of
from router.kv_feed import KVFeed
from router.metrics import Metrics
from router.parity import SAMPLE_EVERY, Parity
from router.tokenizer import Tokenizers
from router.tokenizer_config import TokenizerConfig
from workers import demo_model

MODEL = demo_model.NAME
DEMO = {MODEL: TokenizerConfig(source="demo")}


@dataclass
class Engine:
    """A simulated engine at a URL where another may be started after it."""

    start: Start
    ports: int

    @property
    def url(self):
        return f"http://127.0.0.1:{self.ports}"

    def run(self, *flags: str, events: int | None = 1, reports: bool = True, replay: bool = True) -> Running:
        argv = ["--port", str(self.ports), "--speed", "1000", "--served-model-name", MODEL, *flags]
        if reports:
            argv += ["--enable-prompt-tokens-details"]
        if events is not None:
            config = {"enable_kv_cache_events": True, "endpoint": f"tcp://*:{self.ports + events}"}
            if replay:
                config["replay_endpoint"] = f"tcp://*:{self.ports + 4}"
            argv += ["--kv-events-config", json.dumps(config)]
        self.running = self.start(sys.executable, "-m", "workers.simulated", *argv)
        eventually(lambda: self.get("/health").status_code == 200, 30, httpx.TransportError)
        return self.running

    def get(self, path):
        return httpx.get(f"{self.url}{path}", trust_env=False)

    def fault(self, **fault):
        assert httpx.post(f"{self.url}/faults", json=fault, trust_env=False).status_code == 201

    def repair(self):
        httpx.delete(f"{self.url}/faults", trust_env=False)


class Foreign(NamedTuple):
    """An engine that a test scripts."""

    url: str


class Bench:
    """One replica, its feed and its parity, and what a relay does with a request."""

    def __init__(self, engine, tokenizers):
        self.engine = engine
        self.fleet, self.metrics = Fleet(), Metrics()
        self.tokenizers = Tokenizers(tokenizers)
        self.parity = Parity(self.fleet, self.metrics, self.tokenizers, self.announce)
        self.feed = KVFeed(self.fleet, self.metrics, self.parity)
        self.asked = 0
        self.begun = []

    async def join(self):
        self.client = httpx.AsyncClient(trust_env=False, timeout=WAIT_S)
        await self.parity.start()
        self.tokenizers.start()
        replica = await learn(self.client, Endpoint("r", self.engine.url))
        self.fleet.joined(replica, self.now)
        self.feed.start()
        self.announce(replica)

    def announce(self, replica):
        self.tokenizers.follow(replica)
        self.parity.joined(replica)
        self.feed.follow(replica)

    async def leave(self):
        self.parity.left("r")
        await self.parity.stop()
        await self.tokenizers.stop()
        await self.feed.stop()
        await self.client.aclose()

    @property
    def now(self):
        return asyncio.get_running_loop().time()

    @property
    def standing(self):
        return self.fleet.get("r")

    @property
    def trust(self):
        return self.standing.trust

    @property
    def demotions(self):
        """How often it was not EXACT any more."""
        changes = self.metrics.of(MODEL).trust_changes
        return sum(int(changes[kind].value) for kind in changes if kind is not None) - 1

    @property
    def misses(self):
        counters = self.metrics.of(MODEL).misses
        return {cause: int(counters[cause].value) for cause in Cause if counters[cause].value}

    async def ask(self, messages):
        """One request, placed and followed as the relay does it."""
        body = {"model": MODEL, "messages": messages, "max_tokens": 1}
        call = request(CHAT, body)
        prompt = (await self.tokenizers.read(call)).prompt
        cached = self.fleet.view(MODEL, now=self.now, prompt=prompt).cached.get("r", ())
        flight = self.fleet.started("r", self.now, prompt, *([cached] if cached else []))
        self.asked += 1
        self.parity.sampled(b"%d" % self.asked, call, "r", prompt.token_ids)
        reply = await self.client.post(f"{self.engine.url}{CHAT}", json=body)
        self.fleet.first_token(flight, self.now)
        self.fleet.finished(flight, self.now)
        usage = usage_of(reply.raise_for_status().content)
        self.parity.reported(flight, prompt, usage)
        return cached, usage.cached_tokens


@pytest.fixture
def engine(start):
    return Engine(start, free_ports(5))


@contextlib.asynccontextmanager
async def bench(engine, tokenizers=DEMO):
    it = Bench(engine, tokenizers)
    await it.join()
    try:
        yield it
    finally:
        await it.leave()


async def exact(it):
    await until(lambda: it.trust is Trust.EXACT)


async def converse(it, count):
    """So many requests, of conversations that grow by turns."""
    random, begun = Random(it.asked), it.begun
    for _ in range(count):
        if len(begun) < 3 or random.random() < 0.2:
            begun.append([{"role": "system", "content": f"Herd {random.random()} " * 20}])
        messages = random.choice(begun[-5:])
        messages += [{"role": "user", "content": f"How many {random.random()}?"}]
        await it.ask(messages)
        messages += [{"role": "assistant", "content": "Few."}]


async def test_a_newcomer_is_proven_and_its_cache_known(engine):
    engine.run()
    async with bench(engine) as it:
        assert it.trust is not Trust.EXACT
        await exact(it)
        assert it.standing.takes_ids
        await converse(it, 60)
        metrics = it.metrics.of(MODEL)
        assert metrics.predictions.value == 60
        # Now and then a request comes before the events of the one before it; on a busy machine more often.
        assert metrics.predicted_cached.value == pytest.approx(metrics.reported_cached.value, rel=0.2)
        assert it.misses.keys() <= {Cause.LATE}
        it.fleet.joined(replace(it.standing.replica, id="foreign"), it.now)
        it.metrics.observe(it.fleet, (), it.now)
        told = generate_latest(it.metrics.registry).decode().splitlines()
        of = f'model="{MODEL}",replica="r"'
        assert f'herd_replica_trust{{{of},state="exact"}} 1.0' in told
        assert f'herd_replica_trust{{{of},state="load"}} 0.0' in told
        # Of one that nobody looked into nothing is said: an alert would never end.
        assert not [line for line in told if "herd_replica_trust" in line and "foreign" in line]
        assert f'herd_trust_changes_total{{model="{MODEL}",reason="proven",to="exact"}} 1.0' in told
        assert (
            f'herd_trust_changes_total{{model="{MODEL}",reason="tokens_differ",to="approximate"}} 0.0' in told
        )
        assert it.trust is Trust.EXACT


async def test_a_cache_under_pressure_costs_no_trust(engine):
    engine.run("--num-gpu-blocks-override", "128", "--speed", "50")
    async with bench(engine) as it:
        await exact(it)
        await asyncio.gather(*(converse(it, 30) for _ in range(8)))
        await until(lambda: it.misses.get(Cause.EVICTED, 0) > 0)
        assert Cause.UNEXPLAINED not in it.misses
        assert (it.trust, it.demotions) == (Trust.EXACT, 0)


@pytest.mark.parametrize(
    ("events", "flags", "trust", "reason"),
    [
        (None, (), Trust.APPROXIMATE, "its engine publishes no KV events"),
        (1, ("--no-enable-prefix-caching",), Trust.LOAD, "its engine runs without prefix caching"),
    ],
)
async def test_what_an_engine_lacks_lowers_the_trust_and_not_the_service(
    engine, events, flags, trust, reason
):
    engine.run(*flags, events=events)
    async with bench(engine) as it:
        await until(lambda: it.standing.takes_ids)
        assert (it.trust, it.standing.trust_reason) == (trust, reason)
        await converse(it, 5)


async def test_a_foreign_engine_without_tokenize_gets_no_token_ids():
    pages = {**VLLM_PAGES, b"/kv_event_sources": reply(b"{}"), CHAT.encode(): reply(b"{}")}
    async with scripted(answering(pages)) as (_, url), bench(Foreign(url), {"m": DEMO[MODEL]}) as it:
        reason = "its engine has no /tokenize to compare tokens with; its engine publishes no KV events"
        await until(lambda: it.standing.trust_reason == reason)
        assert (it.trust, it.standing.takes_ids) == (Trust.APPROXIMATE, False)
        assert it.standing.key_blocks == 32


async def test_without_a_tokenizer_keys_are_of_text(engine, tmp_path):
    engine.run()
    async with bench(engine, {MODEL: TokenizerConfig(source=str(tmp_path))}) as it:
        await until(lambda: "cannot be loaded" in it.standing.trust_reason)
        assert (it.trust, it.standing.key_blocks, it.standing.takes_ids) == (Trust.APPROXIMATE, 0, False)
        await converse(it, 5)


async def test_an_engine_that_reports_nothing_is_checked_by_its_counters(engine):
    engine.run(reports=False)
    async with bench(engine) as it:
        await exact(it)
        assert "does not report cached tokens" in it.standing.trust_reason
        await converse(it, 50)
        assert it.trust is Trust.EXACT
        engine.fault(kind="drop_kv_events", times=None)
        await converse(it, 50)
        await until(lambda: it.trust is not Trust.EXACT)
        assert it.standing.trust_reason.startswith("its counters tell")
        engine.repair()
        await exact(it)


async def test_what_is_under_way_ends_with_the_replica(engine):
    engine.run()
    async with bench(engine) as it:
        await exact(it)
        engine.fault(kind="hang")
        it.parity.restarted("r")
        it.asked = sampled_id()
        it.parity.sampled(b"%d" % it.asked, request(CHAT, {"model": MODEL, "messages": []}), "r", b"")
        it.parity.left("r")
        it.fleet.left("r")
        await until(lambda: len(asyncio.all_tasks()) == 4)  # this test, and three of its feed
        it.parity.restarted("r")
        it.parity.doubted("r", Doubt.EVENTS_LOST, "late news")
        engine.repair()


# -- broken on purpose


OTHER_TEMPLATE = (
    "{% for message in messages %}[{{ message.role }}] {{ message.content }}\n{% endfor %}[assistant] "
)


async def test_another_template_is_found_before_it_is_trusted(engine, tmp_path):
    (tmp_path / "other.jinja").write_text(OTHER_TEMPLATE)
    engine.run("--chat-template", str(tmp_path / "other.jinja"))
    async with bench(engine) as it:
        await until(lambda: "canary 'plain'" in it.standing.trust_reason)
        assert (it.trust, it.standing.takes_ids) == (Trust.APPROXIMATE, False)
        engine.running.kill()
        engine.run()
        await exact(it)


def sampled_id():
    return next(n for n in range(9999) if xxh3_64_intdigest(b"%d" % n) % SAMPLE_EVERY == 0)


async def test_one_sampled_mismatch_demotes_and_the_same_request_must_be_right_before_it_is_over(engine):
    engine.run()
    async with bench(engine) as it:
        await exact(it)
        engine.fault(kind="template", times=None)
        call = request(CHAT, {"model": MODEL, "messages": [{"role": "user", "content": "How many?"}]})
        ids = (await it.tokenizers.read(call)).prompt.token_ids
        it.parity.sampled(b"%d" % sampled_id(), call, "r", ids)
        await until(lambda: it.trust is not Trust.EXACT)
        assert it.standing.trust_reason.startswith("a live request: its engine makes")
        await until(lambda: "canary" in it.standing.trust_reason)
        assert not it.standing.takes_ids
        engine.repair()
        await exact(it)


async def test_a_prompt_of_another_length_demotes_at_once(engine):
    engine.run()
    async with bench(engine) as it:
        await exact(it)
        engine.fault(kind="template", times=None)
        await converse(it, 1)
        assert it.trust is Trust.APPROXIMATE
        assert it.standing.trust_reason.startswith("its engine counted")
        engine.repair()
        await exact(it)


async def test_what_the_router_could_not_read_is_held_against_nobody(engine):
    engine.run()
    async with bench(engine) as it:
        await exact(it)
        flight = it.fleet.started("r", it.now, Prompt(100, text=b"with an image"))
        it.fleet.finished(flight, it.now)
        for _ in range(9):
            it.parity.reported(
                flight, Prompt(100, text=b"with an image"), Usage(120, 1, PromptTokensDetails(96))
            )
        assert it.metrics.of(MODEL).predictions.value == 0
        assert it.trust is Trust.EXACT


async def test_lost_events_show_in_what_is_reported(engine):
    engine.run()
    async with bench(engine) as it:
        await exact(it)
        await converse(it, 20)
        engine.fault(kind="drop_kv_events", times=None)
        await converse(it, 50)
        await until(lambda: it.trust is not Trust.EXACT)
        assert "predictions were wrong" in it.standing.trust_reason
        engine.repair()
        await exact(it)


async def test_events_that_can_be_replayed_are_not_missed(engine):
    engine.run()
    async with bench(engine) as it:
        await exact(it)
        await converse(it, 10)
        engine.fault(kind="drop_kv_events", times=3)
        await converse(it, 50)
        await until(lambda: it.metrics.of(MODEL).event_gaps.value > 0)
        assert it.demotions == 0
        assert Cause.UNEXPLAINED not in it.misses


async def test_events_that_are_gone_end_exactness_until_canaries_passed(engine):
    engine.run(replay=False)
    async with bench(engine) as it:
        await exact(it)
        await converse(it, 10)
        engine.fault(kind="drop_kv_events", times=1)
        await converse(it, 3)
        await until(lambda: it.demotions == 1)
        assert re.fullmatch(r"its KV events \d+ to \d+ are lost", it.standing.trust_reason)
        assert it.standing.takes_ids
        await exact(it)
        await converse(it, 50)
        await until(lambda: it.trust is Trust.EXACT)
        assert it.demotions == 1


def reported(it, predicted, cached):
    """A response that told so many tokens cached where others were predicted."""
    prompt = Prompt(100, bytes(400))
    flight = it.fleet.started("r", it.now, prompt, Cached(predicted))
    it.fleet.finished(flight, it.now)
    it.parity.reported(flight, prompt, Usage(100, 1, PromptTokensDetails(cached)))


async def test_blocks_behind_unknown_ones_are_a_hole_in_the_events(engine):
    engine.run()
    async with bench(engine) as it:
        await exact(it)
        it.fleet.apply("r", BlockStored([1], list(range(16)), 16, parent_block_hash=2))
        reported(it, 0, 64)
        await until(lambda: it.demotions == 1)
        assert "blocks behind others that they never told of" in it.standing.trust_reason
        await exact(it)


async def test_what_the_index_had_no_room_for_is_held_against_nobody(engine):
    engine.run()
    async with bench(engine) as it:
        await exact(it)
        it.fleet.index.dropped = 1
        for _ in range(9):
            reported(it, 0, 64)
        await until(lambda: it.misses == {Cause.UNLEARNT: 9})
        assert it.trust is Trust.EXACT
        for _ in range(5):
            reported(it, 64, 0)
        await until(lambda: it.demotions == 1)


async def test_another_block_size_after_a_restart(engine):
    engine.run("--block-size", "16")
    async with bench(engine) as it:
        await exact(it)
        await converse(it, 20)
        engine.running.kill()
        engine.run("--block-size", "32")
        await converse(it, 50)
        await until(lambda: it.demotions > 0)
        await exact(it)
        assert it.standing.key_blocks == 32


async def test_an_engine_restarted_with_its_events_elsewhere(engine):
    engine.run()
    async with bench(engine) as it:
        await exact(it)
        await converse(it, 20)
        engine.running.kill()
        engine.run(events=2)
        await converse(it, 50)
        await until(lambda: it.demotions > 0)
        await exact(it)
        assert it.standing.replica.kv_events.endswith(f":{engine.ports + 2}")


async def test_an_engine_restarted_with_an_empty_cache(engine):
    engine.run()
    async with bench(engine) as it:
        await exact(it)
        await converse(it, 20)
        engine.running.kill()
        engine.run()
        await converse(it, 50)
        await until(lambda: it.demotions > 0)
        await exact(it)
        await converse(it, 40)
        assert it.trust is Trust.EXACT


# -- the whole router


@contextlib.asynccontextmanager
async def front_door(engine):
    ports = {"host": "127.0.0.1", "port": 0, "admin_port": 0}
    front = FrontDoor(RouterConfig(policy="kv_aware", tokenizers=DEMO, **ports), promised=(MODEL,))
    await front.start()
    front.membership([Endpoint("r", engine.url)])
    await front.open()
    base = f"http://127.0.0.1:{front.port}"
    try:
        async with httpx.AsyncClient(base_url=base, trust_env=False, timeout=WAIT_S) as client:
            yield front, client
    finally:
        await front.stop(0)


async def test_through_the_front_door(engine):
    engine.run()
    async with front_door(engine) as (front, client):

        async def ask(messages, request_id="other"):
            body = {"model": MODEL, "messages": messages, "max_tokens": 1}
            reply = await client.post(CHAT, json=body, headers={"x-request-id": request_id})
            return reply.raise_for_status().json()["usage"]

        def replica():
            return front.fleet.get("r")

        await until(lambda: replica().trust is Trust.EXACT)
        messages = [{"role": "user", "content": "How many sheep are in the herd? " * 20}]
        await ask(messages)
        metrics = front.metrics.of(MODEL)
        again = await ask(messages)
        assert again["prompt_tokens_details"]["cached_tokens"] > 0
        await until(lambda: metrics.predictions.value == 2)
        assert metrics.predicted_cached.value == metrics.reported_cached.value > 0
        engine.fault(kind="template", times=None)
        await ask(messages, str(sampled_id()))
        await until(lambda: replica().trust is Trust.APPROXIMATE)
        # The sample and the answer's count of tokens tell it both; either may come first.
        assert re.search("part at token 0|its engine counted", replica().trust_reason)
        engine.repair()
        await until(lambda: replica().trust is Trust.EXACT)
