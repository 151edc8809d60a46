"""Who decides how many replicas there are, and what people are told."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any

import pytest
from router_wire import VLLM_PAGES, answering, client, engine, front_door, get, post, reply, until

from router import line, scaling
from router.config import RouterConfig
from router.front import FrontDoor
from router.health import Endpoint
from router.scaling import Replicas

CHAT = post("/v1/chat/completions", b'{"model":"m"}')
PAGES = {**VLLM_PAGES, b"/v1/chat/completions": reply(b'{"answer":1}')}


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(scaling, "TICK_S", 0.02)
    monkeypatch.setattr(line, "TICK_S", 0.01)


@asynccontextmanager
async def routers(count: int, **replicas: Any) -> AsyncIterator[list[FrontDoor]]:
    """So many router processes of one port, which decide on the replicas of `m` together."""
    settings: dict[str, Any] = {"scaling": {"m": Replicas(**replicas)}}
    async with AsyncExitStack() as stack:
        fronts = [await stack.enter_async_context(front_door(**settings))]
        for _ in range(count - 1):
            fronts.append(await stack.enter_async_context(front_door(port=fronts[0].port, **settings)))
        await until(lambda: sum(bool(front.targets) for front in fronts) == 1)
        yield fronts


async def test_a_request_waits_for_the_first_replica():
    async with engine(answering(PAGES)) as (_, url), routers(1, min=0, max=2) as (front,):
        assert front.ready and front.targets == {"m": 0}
        async with client(front.port) as c:
            await c.send(CHAT)
            await until(lambda: front.targets == {"m": 1})
            front.membership([Endpoint("a", url)])
            assert (await c.reply())[2] == b'{"answer":1}'
        told = json.loads((await get(front.admin_port, "/scaling"))[2])["m"]
        (change,) = told["changes"]
        assert (change["before"], change["target"], change["reason"]) == (0, 1, "requests")
        assert change["demand"]["waiting"] == 1
        metrics = (await get(front.admin_port, "/metrics"))[2].decode()
        assert 'herd_replicas_target{model="m"} 1.0' in metrics


async def test_a_client_that_will_not_wait_is_told_so_in_its_own_time():
    async with routers(1, min=0, max=2) as (front,), client(front.port) as c:
        await c.send(CHAT.replace(b"\r\n", b"\r\nx-slo-ttft-ms: 50\r\n", 1))
        status, headers, _ = await c.reply()
        assert (status, "retry-after" in headers) == (503, True)


async def test_one_router_decides_and_the_next_goes_on_where_it_left_off():
    async with routers(2, min=0, max=2) as fronts, client(fronts[0].port) as c:
        await c.send(CHAT)
        await until(lambda: any(front.targets == {"m": 1} for front in fronts))
        leader, other = sorted(fronts, key=lambda front: not front.targets)
        assert other.targets == {}
        for front in fronts:  # whichever is asked
            await until(lambda front=front: bool(front._scaling.described(0.0, history=True)["m"]["changes"]))
            (change,) = front._scaling.described(0.0, history=True)["m"]["changes"]
            assert (change["before"], change["target"], change["reason"]) == (0, 1, "requests")
        await leader.retire()
        await until(lambda: other.targets == {"m": 1})


async def test_who_comes_knows_an_older_decision_and_does_not_impose_it():
    settings: dict[str, Any] = {"scaling": {"m": Replicas(min=0, max=9, settle_s=600)}}
    async with front_door(**settings) as old:
        pool = old._scaling._pools["m"]
        pool.target, pool.version = 6, 3
        async with front_door(port=old.port, **settings) as new:
            await until(lambda: [f._scaling._pools["m"].target for f in (old, new)] == [6, 6])
            await until(lambda: old.targets | new.targets == {"m": 6})


async def test_a_dry_run_tells_and_changes_nothing():
    dry = {"m": Replicas(min=2, max=3, dry_run=True)}
    async with engine(answering(PAGES)) as (_, url), front_door(scaling=dry) as front:
        front.membership([Endpoint("a", url)])
        await until(lambda: front.fleet.get("a") is not None)

        def told() -> dict[str, Any]:
            return front._scaling.described(0.0, history=True)["m"]

        await until(lambda: [change["before"] for change in told()["changes"]] == [1, 0])
        assert told()["dry_run"] and [change["target"] for change in told()["changes"]] == [2, 2]
        assert front.targets == {}


@pytest.mark.parametrize("replicas", [{"min": 1, "max": 2}, {"min": 0, "max": 2, "dry_run": True}])
async def test_who_gets_no_replica_by_asking_is_told_at_once(replicas):
    async with front_door(scaling={"m": Replicas(**replicas)}) as front, client(front.port) as c:
        assert not front.ready
        await c.send(CHAT)
        assert (await c.reply())[0] == 503


async def test_what_serve_has_already_asked_for_is_where_a_new_router_begins():
    config = RouterConfig(host="127.0.0.1", port=0, admin_port=0, scaling={"m": Replicas(min=0, max=5)})
    front = FrontDoor(config, promised=("m",))
    await front.start({"m": 3})
    assert front.targets == {"m": 3}
    await front.stop(0)
