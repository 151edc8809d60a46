"""Caches of replicas that come and go, on real engines: what is hot is there before it is asked for."""

from __future__ import annotations

import asyncio
import json
from array import array
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import Any

import httpx
import pytest
from router_wire import front_door, get, until
from support import Server, processes, simulated_engine

from router.core.blocks import block_keys
from router.core.fleet import State, Trust
from router.front import FrontDoor
from router.health import Endpoint
from router.warmup import Origin

EVENTS = json.dumps(
    {
        "enable_kv_cache_events": True,
        "publisher": "zmq",
        "endpoint": "tcp://*:0",
        "replay_endpoint": "tcp://*:0",
    }
)
FLAGS = ("--kv-events-config", EVENTS, "--step-time", "0.002,0,0,0", "--enable-prompt-tokens-details")
PROVEN_S = 60.0
MINE = Origin("herd-demo", None)
SHARED = "All that is asked here begins alike, with many words on the herd and its ways. " * 40


@pytest.fixture
def engines(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Server]]:
    """Two that have computed nothing yet."""
    with processes(tmp_path_factory.mktemp("engines")) as start:
        yield [simulated_engine(start, *FLAGS) for _ in range(2)]


@asynccontextmanager
async def fleet_of(*engines: Server, **settings: Any) -> AsyncIterator[FrontDoor]:
    """A router that knows these caches."""
    async with front_door(policy="kv_aware", **settings) as front:
        announce(front, *engines)
        await known(front, len(engines))
        yield front


def announce(front: FrontDoor, *engines: Server) -> None:
    front.membership(Endpoint(engine.url, engine.url) for engine in engines)


async def known(front: FrontDoor, replicas: int) -> None:
    """So many are given requests, and what each holds is known."""
    async with asyncio.timeout(PROVEN_S):
        while [(s.trust, s.state) for s in front.fleet] != [(Trust.EXACT, State.READY)] * replicas:
            await asyncio.sleep(0.01)


async def cached(url: str, prompt: str, **members: Any) -> int:
    """What of a prompt was cached where it was answered."""
    body = {"model": "herd-demo", "prompt": prompt, "max_tokens": 1, **members}
    async with httpx.AsyncClient(trust_env=False) as client:
        usage = (await client.post(f"{url}/v1/completions", json=body)).raise_for_status().json()["usage"]
    return int(usage["prompt_tokens_details"]["cached_tokens"])


async def asked(front: FrontDoor, **members: Any) -> None:
    """Prompts that begin alike, so that this is hot."""
    for number in range(3):
        await cached(f"http://127.0.0.1:{front.port}", f"{SHARED} {number}", **members)


async def test_a_replica_that_comes_has_what_is_hot_before_it_is_given_requests(engines):
    old, new = engines
    async with fleet_of(old) as front:
        await asked(front)
        announce(front, old, new)
        await until(lambda: front.fleet.get(new.url) is not None)
        assert front.fleet.get(new.url).state is State.WARMING
        assert [s.id for s in front.fleet.view("herd-demo").replicas] == [old.url]
        await known(front, 2)
        assert await cached(new.url, f"{SHARED} 9") > 1_000
        metrics = (await get(front.admin_port, "/metrics"))[2].decode()
        assert 'herd_replayed_prefixes_total{model="herd-demo"} 1.0' in metrics


async def test_a_salted_prefix_is_warm_for_its_owner_alone(engines):
    old, new = engines
    async with fleet_of(old) as front:
        await asked(front, cache_salt="mine")
        announce(front, old, new)
        await known(front, 2)
        assert await cached(new.url, f"{SHARED} 9", cache_salt="mine") > 1_000
        assert await cached(new.url, f"{SHARED} 9") == 0


async def test_a_prefix_that_the_engine_refuses_keeps_no_other_from_being_warm(engines):
    old, new = engines
    async with fleet_of(old) as front:
        await asked(front)
        (hot,) = front._warmup._hot.values()
        refused = array("I", [2**31] * 600).tobytes()  # no such tokens
        size = front.fleet.get(old.url).key_blocks
        for _ in range(9):
            hot.saw(block_keys(refused, size), refused, size, asyncio.get_running_loop().time(), MINE)
        announce(front, old, new)
        await known(front, 2)
        assert await cached(new.url, f"{SHARED} 9") > 1_000


async def test_without_time_for_it_a_replica_comes_cold(engines):
    old, new = engines
    async with fleet_of(old, warmup={"arrival_s": 0}) as front:
        await asked(front)
        announce(front, old, new)
        await until(lambda: len(front.fleet.view("herd-demo").replicas) == 2)
        assert await cached(new.url, f"{SHARED} 9") == 0


async def test_what_only_a_leaving_replica_had_is_computed_elsewhere_while_its_streams_end(engines):
    leaving, staying = engines
    async with fleet_of(leaving, warmup={"arrival_s": 0}) as front:
        await asked(front)
        announce(front, leaving, staying)
        await known(front, 2)
        body = {"model": "herd-demo", "prompt": f"{SHARED} 0", "max_tokens": 400, "stream": True}
        url = f"http://127.0.0.1:{front.port}/v1/completions"
        async with (
            httpx.AsyncClient(trust_env=False, timeout=PROVEN_S) as client,
            client.stream("POST", url, json=body | {"ignore_eos": True}) as stream,
        ):
            lines = stream.aiter_lines()
            await anext(lines)
            assert front.fleet.get(leaving.url).in_flight == 1
            announce(front, staying)
            assert front.fleet.get(leaving.url).state is State.LEAVING
            assert [s.id for s in front.fleet.view("herd-demo").replicas] == [staying.url]
            assert [line async for line in lines if line][-1] == "data: [DONE]"
        await until(lambda: front.fleet.get(leaving.url) is None)
        assert await cached(staying.url, f"{SHARED} 9") > 1_000


async def test_a_replica_that_is_announced_again_while_it_leaves_stays(engines):
    one, other = engines
    async with fleet_of(one, other) as front:
        announce(front, other)
        announce(front, one, other)
        await known(front, 2)
        await asyncio.gather(*front._departures)
        assert {s.id for s in front.fleet.view("herd-demo").replicas} == {one.url, other.url}
