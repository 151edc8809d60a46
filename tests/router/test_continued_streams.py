"""Streams whose engine fails go on at another: real engines, real sockets, the same events as undisturbed."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import count
from typing import Any

import httpx
import pytest
from router_wire import client, front_door, post, until
from support import Server, processes, simulated_engine

from router.core.fleet import Trust
from router.front import FrontDoor
from router.health import Endpoint

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
EVENTS = json.dumps(
    {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": "tcp://*:0",
        "replay_endpoint": "tcp://*:0",
    }
)
SAY = {"messages": [{"role": "user", "content": "Tell of the herd, its cows and goats, in full."}]}
PROVEN_S = 60.0
SAME = ("id", "created", "model", "object")


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    flags = ("--kv-events-config", EVENTS, "--step-time", "0.002,0,0,0")
    with processes(tmp_path_factory.mktemp("engines")) as start:
        yield [simulated_engine(start, *flags) for _ in range(2)]


@asynccontextmanager
async def fleet_of(engines: list[Server], **settings: Any) -> AsyncIterator[FrontDoor]:
    """A router that knows both caches; no faults are set."""
    for engine in engines:
        repair(engine)
    async with front_door(policy="kv_aware", **settings) as front:
        front.membership(Endpoint(f"r{n}", engine.url) for n, engine in enumerate(engines))
        async with asyncio.timeout(PROVEN_S):
            while [s.trust for s in front.fleet] != [Trust.EXACT] * len(engines):
                await asyncio.sleep(0.02)
        try:
            yield front
        finally:
            for engine in engines:
                repair(engine)


def repair(engine: Server) -> None:
    httpx.delete(f"{engine.url}/faults", trust_env=False)


def fault(engines: list[Server], **told: Any) -> None:
    for engine in engines:
        assert httpx.post(f"{engine.url}/faults", json=told, trust_env=False).status_code == 201


def faults(engine: Server) -> list[Any]:
    """Those that have not struck yet."""
    return list(httpx.get(f"{engine.url}/faults", trust_env=False).json())


async def events_of(front: FrontDoor, path: str, members: dict[str, Any]) -> list[Any]:
    """The events of a stream, decoded; `[DONE]` and broken connections as words."""
    body = {"model": "herd-demo", "stream": True, "temperature": 0, **members}
    async with client(front.port) as c:
        await c.send(post(path, json.dumps(body).encode(), "content-type: application/json"))
        status, _ = await c.head()
        data = b"".join([chunk async for chunk in c.chunks()]) if status == 200 else b""
    events = [event.removeprefix(b"data: ") for event in data.split(b"\n\n")[:-1]]
    return [status, *(event.decode() if event == b"[DONE]" else json.loads(event) for event in events)]


def summed(events: list[Any]) -> dict[str, Any]:
    """What the stream comes to: chunks may be cut otherwise, what they say may not."""
    chunks = [event for event in events[1:] if isinstance(event, dict)]
    choices = [choice for chunk in chunks for choice in chunk["choices"]]
    logprobs = [choice["logprobs"] for choice in choices if choice.get("logprobs")]
    return {
        "status": events[0],
        "last": events[-1],
        "one": len({tuple(chunk[name] for name in SAME) for chunk in chunks}),
        "roles": sum("role" in choice.get("delta", {}) for choice in choices),
        "text": "".join(c.get("text") or c.get("delta", {}).get("content") or "" for c in choices),
        "ids": [i for choice in choices for i in choice.get("token_ids") or []],
        "finish": [c["finish_reason"] for c in choices if c["finish_reason"]],
        "stop": [c.get("stop_reason") for c in choices if c["finish_reason"]],
        "usage": [chunk["usage"] for chunk in chunks if chunk.get("usage")],
        "logprobs": [entry for each in logprobs for entry in each.get("content") or each.get("tokens") or []],
    }


async def broken(front: FrontDoor, engines: list[Server], path: str, members: dict[str, Any], **told: Any):
    """The stream undisturbed, and with each of its engines failing once: what both come to."""
    calm = summed(await events_of(front, path, members))
    fault(engines, **told)
    stormy = summed(await events_of(front, path, members))
    for engine in engines:
        repair(engine)
    return calm, stormy


def alike(calm: dict[str, Any], stormy: dict[str, Any]) -> None:
    """All is equal; how much of the prompt was cached differs only because it was asked before."""
    for usage in (*calm["usage"], *stormy["usage"]):
        usage.pop("prompt_tokens_details", None)
    assert stormy == calm


def continued(front: FrontDoor) -> float:
    return front.metrics.of("herd-demo").continuations["continued"].value


VARIANTS = {
    "chat": (CHAT, SAY | {"max_tokens": 60}),
    "usage and ids": (
        CHAT,
        SAY | {"max_tokens": 60, "return_token_ids": True, "stream_options": {"include_usage": True}},
    ),
    "logprobs": (CHAT, SAY | {"max_tokens": 40, "logprobs": True, "top_logprobs": 2}),
    "completion": (TEXT, {"prompt": "The herd", "max_tokens": 50}),
    "completion of ids": (TEXT, {"prompt": [5, 6, 7, 8, 9], "max_tokens": 50, "return_token_ids": True}),
    "default length": (TEXT, {"prompt": "The herd"}),
    "min_tokens": (CHAT, SAY | {"max_tokens": 60, "min_tokens": 60}),
    "max_completion_tokens": (CHAT, SAY | {"max_completion_tokens": 45}),
    "stop far off": (CHAT, SAY | {"max_tokens": 60, "stop": ["\n\n\n", "never said by anyone"]}),
    "tools offered": (
        CHAT,
        SAY | {"max_tokens": 40, "tools": [{"type": "function", "function": {"name": "f"}}]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("variant", VARIANTS)
async def test_a_stream_goes_on_as_if_nothing_had_happened(engines: list[Server], variant: str) -> None:
    path, members = VARIANTS[variant]
    async with fleet_of(engines) as front:
        for after, kind in ((1, "cut"), (2, "error_event"), (14, "cut")):
            before = continued(front)
            told = {"kind": kind, "after_chunks": after}
            alike(*await broken(front, engines, path, members, **told))
            assert continued(front) > before


async def test_a_stop_string_is_found_wherever_the_stream_was_cut(engines: list[Server]) -> None:
    async with fleet_of(engines) as front:
        text = summed(await events_of(front, CHAT, SAY | {"max_tokens": 60}))["text"]
        stop = text[60:68]
        assert text.index(stop) == 60
        for shown in (False, True):
            members = SAY | {"max_tokens": 60, "stop": [stop], "include_stop_str_in_output": shown}
            for after in range(1, 40, 8):
                calm, stormy = await broken(front, engines, CHAT, members, kind="cut", after_chunks=after)
                assert calm["stop"] == [stop] and calm["text"] == text[: 68 if shown else 60]
                alike(calm, stormy)
        assert continued(front) >= 10


async def test_one_that_fails_the_rest_is_no_end(engines: list[Server]) -> None:
    """Whichever is asked first, the other one has no word for the rest, or none for the beginning."""
    async with fleet_of(engines) as front:
        members = SAY | {"max_tokens": 60, "stream_options": {"include_usage": True}}
        calm = summed(await events_of(front, CHAT, members))
        for cut, failing in (engines, engines[::-1]):
            fault([cut], kind="cut", after_chunks=10)
            fault([failing], kind="status", status=500)
            alike(calm, summed(await events_of(front, CHAT, members)))


@pytest.mark.parametrize(
    "members",
    [
        {"seed": 1, "temperature": 1},
        {"frequency_penalty": 0.5},
        {"presence_penalty": 0.5},
        {"bad_words": ["sheep dog"]},
        {"n": 2},
        {"response_format": {"type": "json_object"}},
    ],
    ids=["seed", "frequency", "presence", "words", "choices", "grammar"],
)
async def test_what_cannot_go_on_ends_honestly(engines: list[Server], members: dict[str, Any]) -> None:
    async with fleet_of(engines) as front:
        fault(engines, kind="cut", after_chunks=6)
        events = await events_of(front, CHAT, SAY | {"max_tokens": 60, **members})
        assert "error" in events[-1] and events[-1] != "[DONE]"
        assert continued(front) == 0
        assert front.metrics.of("herd-demo").continuations["impossible"].value == 1


async def test_off_is_off(engines: list[Server]) -> None:
    async with fleet_of(engines, continuation={"*": "off"}) as front:
        fault(engines, kind="error_event", after_chunks=6)
        events = await events_of(front, CHAT, SAY | {"max_tokens": 60})
        assert "error" in events[-1]


@pytest.mark.parametrize("told", [{"kind": "error_event"}, {"kind": "status", "status": 500}])
async def test_before_the_first_word_another_is_asked(engines: list[Server], told: dict[str, Any]) -> None:
    async with fleet_of(engines) as front:
        for engine in engines:
            fault([engine], **told)
            for number in count():
                if not faults(engine):
                    break  # it has struck
                messages = [{"role": "user", "content": f"Tell {number} of {engine.url}"}]
                members = {"messages": messages, "max_tokens": 20, "seed": 4, "temperature": 1}
                whole = summed(await events_of(front, CHAT, members))
                assert (whole["last"], whole["roles"], len(whole["finish"])) == ("[DONE]", 1, 1)


async def test_a_replica_that_fails_what_it_is_asked_is_out_until_it_generates(engines: list[Server]) -> None:
    async with fleet_of(engines) as front:
        fault(engines[:1], kind="status", status=500, times=None)
        for n in range(12):
            members = {"messages": [{"role": "user", "content": f"Tell {n}"}], "max_tokens": 2}
            assert (await events_of(front, CHAT, members))[0] == 200
        states = {s.id: s.state for s in front.fleet}
        assert states == {"r0": "down", "r1": "ready"}
        repair(engines[0])
        await until(lambda: all(s.state == "ready" for s in front.fleet))


async def test_a_replica_that_hangs_is_noticed_and_its_streams_go_on(engines: list[Server]) -> None:
    async with fleet_of(engines) as front:
        members = SAY | {"max_tokens": 60}
        calm = summed(await events_of(front, CHAT, members))
        fault(engines[:1], kind="hang", after_chunks=10)
        stormy = [
            summed(s) for s in await asyncio.gather(*(events_of(front, CHAT, members) for _ in range(8)))
        ]
        for each in stormy:
            alike(calm, each)
        assert continued(front) >= 1
        assert {s.id: s.state for s in front.fleet} == {"r0": "down", "r1": "ready"}
        repair(engines[0])
        await until(lambda: all(s.state == "ready" for s in front.fleet))


async def test_a_request_that_fails_everywhere_takes_nobody_out(engines: list[Server]) -> None:
    """Each replica is asked once; the client hears what the last one said."""
    async with fleet_of(engines) as front:
        fault(engines, kind="status", status=500, times=1)
        async with client(front.port) as c:
            body = json.dumps({"model": "herd-demo", "max_tokens": 2, **SAY}).encode()
            await c.send(post(CHAT, body, "content-type: application/json"))
            status, _, told = await c.reply()
        assert (status, b"fault injected" in told) == (500, True)
        assert front.metrics.of("herd-demo").retries["failed"].value == 2
        assert {s.state for s in front.fleet} == {"ready"}


async def test_several_choices_of_which_one_has_ended_are_not_whole(engines: list[Server]) -> None:
    async with fleet_of(engines) as front:
        members = SAY | {"max_tokens": 60, "n": 2, "stop": ["e"]}
        for after in (4, 12, 24):
            fault(engines, kind="cut", after_chunks=after)
            events = await events_of(front, CHAT, members)
            ended = {c["index"] for e in events[1:-1] for c in e["choices"] if c["finish_reason"]}
            assert (events[-1] == "[DONE]") is (ended == {0, 1})
            for engine in engines:
                repair(engine)
