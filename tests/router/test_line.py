"""The waiting line on sockets: who waits, who goes first, who is refused, and with what words."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

import msgspec
import pytest
from router_wire import (
    LAST_CHUNK,
    Client,
    Engine,
    client,
    engine,
    post,
    relaying,
    reply,
    said,
    stream,
    until,
)
from support import Start, get, router, simulated_engine

from router.core.fleet import Fleet, Replica
from router.line import AdmissionConfig
from router.relay import Relay
from router.slo import Slo

CHAT = "/v1/chat/completions"
TOKEN = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"a"},"token_ids":[5]}]}\n\n'
DONE = b"data: [DONE]\n\n"


def ask(*headers: str, path: str = CHAT, **members: Any) -> bytes:
    return post(path, msgspec.json.encode({"model": "m", "stream": True, **members}), *headers)


def one_at_a_time(**bounds: Any) -> AdmissionConfig:
    return AdmissionConfig(awaiting=1, **bounds)


@dataclass
class Gate:
    """An engine that answers each request when it is told to."""

    opened: asyncio.Semaphore

    async def __call__(
        self, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await self.opened.acquire()
        writer.write(stream(TOKEN, DONE) + LAST_CHUNK)


@dataclass
class Desk:
    """A router before one such engine."""

    relay: Relay
    fleet: Fleet
    port: int
    engine: Engine
    opened: asyncio.Semaphore

    def metric(self, name: str, **labels: str) -> float:
        value = self.relay._metrics.registry.get_sample_value(f"herd_{name}", {"model": "m", **labels})
        return value or 0.0

    @property
    def waiting(self) -> float:
        return self.metric("requests_waiting")

    async def asks(self, clients: contextlib.AsyncExitStack, *headers: str, **members: Any) -> Client:
        """A client whose request is at the engine or in line."""
        before = self.waiting + len(self.engine.requests)
        c = await clients.enter_async_context(client(self.port))
        await c.send(ask(*headers, **members))
        await until(lambda: self.waiting + len(self.engine.requests) > before)
        return c


@contextlib.asynccontextmanager
async def gated(
    admission: AdmissionConfig, slo: Slo | None = None
) -> AsyncIterator[tuple[Desk, contextlib.AsyncExitStack]]:
    slos = {"*": slo} if slo else None
    opened = asyncio.Semaphore(0)
    async with (
        engine(Gate(opened)) as (it, url),
        relaying(url, admission=admission, slos=slos) as (relay, fleet, port),
        contextlib.AsyncExitStack() as clients,
    ):
        yield Desk(relay, fleet, port, it, opened), clients


async def test_who_finds_the_line_full_is_told_when_to_come_again():
    async with gated(one_at_a_time(max_waiting=1)) as (counter, clients):
        first = await counter.asks(clients)
        second = await counter.asks(clients)
        assert (counter.waiting, counter.metric("waiting_tokens")) == (1, 1)
        status, headers, body = await said(counter.port, ask())
        assert status == 429
        assert int(headers["retry-after"]) >= 1
        error = msgspec.json.decode(body)["error"]
        assert (error["type"], error["code"]) == ("rate_limit_error", "overloaded")
        assert counter.metric("requests_refused_total", reason="full") == 1
        counter.opened.release()
        assert (await first.reply())[0] == 200
        counter.opened.release()
        assert (await second.reply())[0] == 200
        assert counter.waiting == 0
        assert counter.metric("line_wait_seconds_count") == 1


async def test_a_client_that_leaves_leaves_the_line():
    async with gated(one_at_a_time()) as (counter, clients):
        first = await counter.asks(clients)
        async with contextlib.AsyncExitStack() as leaving:
            await counter.asks(leaving)
        await until(lambda: counter.waiting == 0)
        third = await counter.asks(clients)
        counter.opened.release()
        counter.opened.release()
        assert [(await c.reply())[0] for c in (first, third)] == [200, 200]
        assert len(counter.engine.requests) == 2


async def test_classes_go_in_their_order():
    async with gated(one_at_a_time()) as (counter, clients):
        for headers, members in (
            ([], {"user": "first"}),
            ([], {"user": "batch", "priority": 5}),
            ([], {"user": "usual"}),
            (["x-herd-priority: -1"], {"user": "premium", "priority": 9}),
        ):
            await counter.asks(clients, *headers, **members)
        for served in range(1, 5):
            await until(lambda served=served: len(counter.engine.requests) == served)
            counter.opened.release()
        users = [
            msgspec.json.decode(request.partition(b"\r\n\r\n")[2])["user"]
            for request in counter.engine.requests
        ]
        assert users == ["first", "premium", "usual", "batch"]


async def test_where_clients_have_no_say_all_are_of_one_class():
    async with gated(one_at_a_time(priorities=False)) as (counter, clients):
        await counter.asks(clients)
        await counter.asks(clients, user="second")
        await counter.asks(clients, "x-herd-priority: -1", user="third")
        counter.opened.release()
        await until(lambda: len(counter.engine.requests) == 2)
        assert b"second" in counter.engine.requests[1]


@pytest.mark.parametrize(
    ("bounds", "slo", "headers", "reason"),
    [
        ({"max_wait_s": 0.05}, None, [], "waited"),
        ({}, None, ["x-slo-ttft-ms: 50"], "late"),
        ({}, Slo(ttft_s=0.05), [], "late"),
        ({"max_late_s": 60, "max_wait_s": 0.5}, Slo(ttft_s=0.05), [], "waited"),
    ],
)
async def test_nobody_waits_longer_than_it_makes_sense(bounds, slo, headers, reason):
    async with gated(one_at_a_time(**bounds), slo) as (counter, clients):
        await counter.asks(clients)
        status, told, _ = await said(counter.port, ask(*headers))
        assert (status, int(told["retry-after"]) >= 1) == (429, True)
        assert counter.metric("requests_refused_total", reason=reason) == 1


async def test_an_adapter_keeps_its_models_promise():
    opened = asyncio.Semaphore(0)
    async with (
        engine(Gate(opened)) as (it, url),
        relaying(url, admission=one_at_a_time(), slos={"m": Slo(ttft_s=0.05)}) as (relay, fleet, port),
        contextlib.AsyncExitStack() as clients,
    ):
        fleet.left("r0")
        fleet.joined(Replica("r1", url, ("m", "sql"), adapters=frozenset({"sql"})), now=0.0)
        desk = Desk(relay, fleet, port, it, opened)
        await desk.asks(clients, model="sql")
        status, _, body = await said(port, ask(model="sql"))
        assert (status, msgspec.json.decode(body)["error"]["code"]) == (429, "overloaded")


async def test_who_waits_while_the_last_replica_goes_is_told_that_there_is_none():
    async with gated(one_at_a_time(max_wait_s=0.2)) as (counter, clients):
        await counter.asks(clients)
        waiting = await counter.asks(clients)
        counter.fleet.failed("r0", now=0.0)
        status, told, _ = await waiting.reply()
        assert (status, told["retry-after"]) == (503, "1")


async def test_who_waits_goes_to_a_replica_that_comes():
    async with gated(one_at_a_time()) as (counter, clients):
        await counter.asks(clients)
        waiting = await counter.asks(clients)
        counter.fleet.failed("r0", now=0.0)
        counter.opened.release()
        await until(lambda: counter.fleet.get("r0").in_flight == 0)
        assert counter.waiting == 1
        counter.fleet.recovered("r0", now=0.0)
        counter.opened.release()
        assert (await waiting.reply())[0] == 200


@pytest.mark.parametrize("header", ["x-herd-priority: high", "x-slo-ttft-ms: nan", "x-slo-ttft-ms: "])
async def test_nonsense_is_refused_by_its_name(header):
    async with gated(AdmissionConfig()) as (counter, _):
        status, _, body = await said(counter.port, ask(header))
        assert status == 400
        assert msgspec.json.decode(body)["error"]["param"] == header.partition(":")[0]


async def test_what_computes_nothing_does_not_wait():
    async with gated(one_at_a_time()) as (counter, clients):
        await counter.asks(clients)
        await counter.asks(clients, path="/tokenize")
        await until(lambda: len(counter.engine.requests) == 2)


async def test_a_replica_that_fails_one_that_waited_is_not_waited_for_again():
    async def refuses(request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        raise ConnectionResetError

    async def answers(request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(reply(b"{}"))

    async with (
        engine(refuses) as (_, bad),
        engine(answers) as (_, good),
        relaying(bad, good, admission=one_at_a_time()) as (_, _, port),
    ):
        assert [(await said(port, ask()))[0] for _ in range(4)] == [200] * 4


def test_many_at_once_are_spread_evenly(start: Start):
    """600 streams on 4 engines with 8 places each."""
    flags = ("--max-num-seqs", "8", "--served-model-name", "m")
    engines = [simulated_engine(start, *flags) for _ in range(4)]
    front = router(start, *engines, flags=("--policy", "least_requests"))
    port = int(front.url.rpartition(":")[2])

    async def flood() -> Counter[int]:
        messages = [{"role": "user", "content": "hello"}]
        request = ask("content-type: application/json", messages=messages, max_tokens=8)
        replies = await asyncio.gather(*(said(port, request) for _ in range(600)))
        return Counter(status for status, _, _ in replies)

    assert asyncio.run(flood()) == {200: 600}
    served = [finished(engine.url) for engine in engines]
    assert sum(served) == 600
    # Each is given as it answers, so one that gets less of this machine has less.
    assert max(served) < 1.5 * 150


def finished(url: str) -> float:
    """Requests that an engine has answered whole."""
    lines = get(f"{url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith("vllm:request_success_total"))
