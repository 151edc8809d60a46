"""A client that leaves, at whatever stage: its engine hears of it, and the router keeps nothing."""

import asyncio
import gc

import pytest
from router_wire import client, engine, post, relaying, stream, until

from router.decisions import DecisionsConfig

CHAT = "/v1/chat/completions"
TOKEN = b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"a"},"token_ids":[5]}]}\n\n'
REQUEST = post(CHAT, b'{"model":"m","stream":true}')
ROUNDS = 20


class Stages:
    """An engine that sends so much of a stream and then listens until the router leaves."""

    def __init__(self, sends: bytes) -> None:
        self._sends = sends
        self.waiting = 0
        self.left = 0

    async def __call__(
        self, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        writer.write(self._sends)
        await writer.drain()
        self.waiting += 1
        try:
            await reader.readexactly(1)
        finally:
            self.waiting -= 1
            self.left += 1


@pytest.mark.parametrize("sends", [b"", stream(), stream(TOKEN), stream(TOKEN)[:-9]])
async def test_an_engine_hears_of_every_client_that_leaves(sends):
    stages = Stages(sends)
    async with engine(stages) as (it, url), relaying(url) as (relay, fleet, port):
        tasks = len(asyncio.all_tasks())
        for round_ in range(1, ROUNDS + 1):
            async with client(port) as c:
                await c.send(REQUEST)
                await until(lambda: stages.waiting == 1)
            await until(lambda round_=round_: stages.left == round_)
        await until(lambda: fleet.get("r0").in_flight == 0 and it.open == 0)
        await until(lambda: len(asyncio.all_tasks()) <= tasks)
        left = relay._metrics.registry.get_sample_value("herd_client_disconnects_total", {"model": "m"})
        assert left == ROUNDS


async def test_a_client_that_leaves_while_its_requests_wait():
    stages = Stages(stream(TOKEN))
    async with engine(stages) as (it, url), relaying(url) as (_, fleet, port):
        async with client(port) as c:
            await c.send(REQUEST * 5)
            await until(lambda: stages.waiting == 1)
        await until(lambda: stages.left == 1 and it.open == 0)
        assert fleet.get("r0").finished == 1  # the four that waited never went out
        assert len(it.requests) == 1


async def test_a_client_that_leaves_within_its_request():
    async with engine(Stages(b"")) as (it, url), relaying(url) as (_, fleet, port):
        for cut in range(1, len(REQUEST), 7):
            async with client(port) as c:
                await c.send(REQUEST[:cut])
        async with client(port) as c:
            await c.send(b"GET /health HTTP/1.1\r\nhost: h\r\n\r\n")
            assert (await c.reply())[0] == 200
        assert (fleet.get("r0").finished, it.requests) == (0, [])


async def test_nothing_stays_of_those_that_left():
    """Objects that only a cycle keeps alive are found too: the collector is asked first."""
    stages = Stages(stream(TOKEN))
    few = DecisionsConfig(keep=10)
    async with engine(stages) as (it, url), relaying(url, decisions=few) as (_, _, port):

        async def leave(times: int) -> int:
            for _ in range(times):
                goal = stages.left + 1
                async with client(port) as c:
                    await c.send(REQUEST)
                    await until(lambda: stages.waiting == 1)
                await until(lambda goal=goal: stages.left == goal)
            await until(lambda: it.open == 0)
            gc.collect()
            return sum(str(type(thing).__module__).startswith("router.") for thing in gc.get_objects())

        assert await leave(20) == await leave(20)
