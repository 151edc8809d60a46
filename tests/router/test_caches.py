"""What routers know of caches, before real engines: one that comes late, and two that divide the fleet."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from router_wire import client, front_door, post
from support import Server, processes, simulated_engine

from router.core.fleet import Trust
from router.front import FrontDoor
from router.health import Endpoint

EVENTS = json.dumps(
    {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": "tcp://*:0",
        "replay_endpoint": "tcp://*:0",
    }
)
STORY = "The herd crossed the river before the rain came, and nobody was lost. " * 12
TALKS = 12
# Tokenizers load and canaries are answered within seconds; the machine may be busy.
PROVEN_S = 60.0


@pytest.fixture(scope="module")
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    with processes(tmp_path_factory.mktemp("engines")) as start:
        yield [simulated_engine(start, "--kv-events-config", EVENTS) for _ in range(2)]


def announce(front: FrontDoor, engines: list[Server], each: int = 1) -> None:
    """The engines as members of the fleet, each under so many ids."""
    front.membership(Endpoint(f"r{n}", engines[n % 2].url) for n in range(each * len(engines)))


async def proven(front: FrontDoor, count: int = 2) -> None:
    """Waits until so many replicas are there and the router knows the caches that are its to know."""

    def known() -> bool:
        standings = list(front.fleet)
        exact = all(s.trust is Trust.EXACT for s in standings if front.fleet.knows(s.id))
        return len(standings) == count and exact

    async with asyncio.timeout(PROVEN_S):
        while not known():
            await asyncio.sleep(0.02)


async def ask(front: FrontDoor, said: str, request_id: str) -> None:
    body = {"model": "herd-demo", "max_tokens": 2, "messages": [{"role": "user", "content": said + STORY}]}
    headers = ("content-type: application/json", f"x-request-id: {request_id}")
    async with client(front.port) as c:
        await c.send(post("/v1/chat/completions", json.dumps(body).encode(), *headers))
        assert (await c.reply())[0] == 200


async def told(front: FrontDoor, request_id: str) -> dict[str, Any] | None:
    """The decision on a request, if this router made it."""
    async with client(front.admin_port) as c:
        await c.send(f"GET /decisions/{request_id} HTTP/1.1\r\nhost: h\r\n\r\n".encode())
        status, _, body = await c.reply()
    return json.loads(body)["attempts"][-1] if status == 200 else None


async def test_a_router_that_comes_late_predicts_as_if_it_had_been_there(engines: list[Server]) -> None:
    loop = asyncio.get_running_loop()
    async with front_door(policy="kv_aware") as first:
        announce(first, engines)
        await proven(first)
        for n in range(TALKS):
            await ask(first, f"Story {n}. ", f"first-{n}")
        began = loop.time()
        async with front_door(policy="kv_aware") as late:
            announce(late, engines)
            await proven(late)
            print(f"proven {loop.time() - began:.2f} s after it came")
            for n in range(TALKS):
                await ask(late, f"Story {n}. ", f"late-{n}")
                before, after = await told(first, f"first-{n}"), await told(late, f"late-{n}")
                assert before is not None and after is not None
                assert after["replica"] == before["replica"]
                assert after["predicted"]["cached_tokens"] == after["observed"]["cached_tokens"] > 100


async def test_routers_that_divide_the_fleet_know_all_of_it_together(engines: list[Server]) -> None:
    settings = {"policy": "kv_aware", "replicas": 2, "shards": 2}
    async with front_door(**settings) as one, front_door(**settings) as two:
        both = (one, two)
        for each in both:
            announce(each, engines, each=8)
            each.meet([one.contact, two.contact])
        for each in both:
            await proven(each, count=16)
        shares = [{s.id for s in front.fleet if front.fleet.knows(s.id)} for front in both]
        assert not shares[0] & shares[1] and len(shares[0] | shares[1]) == 16
        for asked, front in enumerate((one, two, one)):  # in turns: events may come a little after a reply
            for n in range(TALKS):
                await ask(front, f"Chapter {n}. ", f"{n}-{asked}")
        owned = [await told(one, f"{n}-0") is not None for n in range(TALKS)]
        assert set(owned) == {True, False}
        for n, by_one in enumerate(owned):
            owner, other = both if by_one else both[::-1]
            assert await told(other, f"{n}-2") is None
            for asked in (1, 2):
                decision = await told(owner, f"{n}-{asked}")
                assert decision is not None
                predicted, observed = decision["predicted"], decision["observed"]
                assert predicted["cached_tokens"] == observed["cached_tokens"] > 100
                assert owner.fleet.knows(decision["replica"])
        for front in both:
            foreign = [s for s in front.fleet if not front.fleet.knows(s.id)]
            assert foreign and all(s.trust is Trust.LOAD for s in foreign)
