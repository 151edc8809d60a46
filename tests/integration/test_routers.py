"""Two router processes on real Ray Serve: one port, and one goes on whatever happens to the other."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
import yaml
from integration.fleet import Fleet, status
from router_wire import connections, during, one_connection, post
from support import Holder, eventually

from router.http.listener import listening
from router.plan import document
from router.port import Member, Port
from router.watchdog import STUCK_S

pytestmark = pytest.mark.ray

MODEL = "herd-demo"
BODY = b'{"model":"herd-demo","max_tokens":1,"messages":[{"role":"user","content":"Hello"}]}'
CHAT = post("/v1/chat/completions", BODY, "content-type: application/json")
ANSWER = b'"object":"chat.completion"'
# An actor starts in three seconds on a machine that is otherwise idle.
REPLACED_S = 60.0


@pytest.fixture(scope="module")
def holder(tmp_path_factory: pytest.TempPathFactory) -> Holder:
    return Holder(tmp_path_factory.mktemp("holder"))


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory, holder: Holder) -> Iterator[Fleet]:
    folder = tmp_path_factory.mktemp("routers")
    model = {"name": MODEL, "engine": "simulated", "source": "demo", "replicas": 1}
    file = folder / "fleet.yaml"
    file.write_text(yaml.safe_dump(document({"models": [model], "router": {"replicas": 2}})))
    fleet = Fleet(folder, file, env=holder.env)
    try:
        yield fleet.wait_until_up()
    finally:
        fleet.end()


@pytest.fixture
def whole(fleet: Fleet) -> Fleet:
    """The fleet with both routers open, whatever the test before has done to it."""
    eventually(lambda: len(open_members(fleet)) == 2, REPLACED_S)
    return fleet


def open_members(fleet: Fleet) -> list[Member]:
    return [member for member in Port(fleet.port).members() if member.open]


def pids(fleet: Fleet) -> list[int]:
    return [member.process.pid for member in open_members(fleet)]


def replaced(fleet: Fleet, gone: set[int], timeout: float = REPLACED_S) -> list[int]:
    """Waits until none of these is there and two are; they have the first two ranks."""
    found = eventually(lambda: len(now := pids(fleet)) == 2 and not gone & set(now) and now, timeout)
    assert [member.rank for member in open_members(fleet)] == [0, 1]
    return found


def test_both_are_listed_and_both_serve(whole: Fleet) -> None:
    processes = status(whole)["fleet"]["processes"]
    assert [(p["rank"], p["pid"], p["admin_port"]) for p in processes] == [
        (rank, pid, whole.admin_port + rank) for rank, pid in enumerate(pids(whole))
    ]
    for _ in range(20):
        assert asyncio.run(one_connection(whole.port, CHAT, ANSWER)) == "answered"


def test_each_knows_the_other_as_serve_tells(whole: Fleet) -> None:
    for rank, other in ((0, 1), (1, 0)):
        (peer,) = eventually(lambda rank=rank: speaking(whole, rank))
        assert peer["port"] == open_members(whole)[other].contact.port


def speaking(fleet: Fleet, rank: int) -> list[dict[str, Any]]:
    """The other routers that one of them hears."""
    told = httpx.get(f"http://127.0.0.1:{fleet.admin_port + rank}/fleet", trust_env=False).json()
    return [peer for peer in told["peers"] if peer["age_s"] is not None]


@pytest.mark.parametrize("replicas", [2, 1])
def test_a_rolling_update_fails_no_request(whole: Fleet, replicas: int) -> None:
    """By a change of what Serve reserves; with one router too, where the old one goes before the new one."""
    try:
        deploy(whole, replicas, num_cpus=0.01)
        before = set(pids(whole))
        (tally,) = asyncio.run(
            during(
                lambda: deploy(whole, replicas, num_cpus=0.02),
                lambda ended: connections(whole.port, CHAT, ANSWER, 100, ended),
            )
        )
        assert tally.keys() == {"answered"}
        assert tally["answered"] > 200
        assert len(pids(whole)) == replicas
        assert not before & set(pids(whole))
        assert sum(len(member.listeners) for member in open_members(whole)) == 2
    finally:
        deploy(whole, 2)


def deploy(fleet: Fleet, routers: int, num_cpus: float = 0.0) -> None:
    """Another router deployment, in Serve's own way."""
    options = {"name": "Router", "num_replicas": routers, "ray_actor_options": {"num_cpus": num_cpus}}
    fleet.deploy(options, REPLACED_S)


def test_a_killed_router_is_replaced_while_the_other_serves(whole: Fleet) -> None:
    victim, survivor = pids(whole)
    gone = set(open_members(whole)[0].listeners)
    os.kill(victim, signal.SIGKILL)
    # A connection of the moment between its death and the end of its sockets is lost.
    eventually(lambda: not gone & listening("127.0.0.1", whole.port))
    assert asyncio.run(one_connection(whole.port, CHAT, ANSWER)) == "answered"
    assert survivor in replaced(whole, {victim})


def test_a_router_whose_loop_is_stuck_is_replaced_while_the_other_serves(
    whole: Fleet, holder: Holder
) -> None:
    victim, survivor = pids(whole)
    began = time.monotonic()
    holder.hold(victim)
    assert survivor in replaced(whole, {victim}, STUCK_S + REPLACED_S)
    print(f"replaced {time.monotonic() - began:.1f} s after it was stuck")
    assert asyncio.run(one_connection(whole.port, CHAT, ANSWER)) == "answered"
