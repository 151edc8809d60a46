"""`herd route --processes`: real processes on one port, under traffic that counts every connection."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
from router_wire import WAIT_S, post, read_message
from support import HERD, Running, Start, eventually, free_ports, processes

from router.port import Member, Port

MOCK = (sys.executable, "-m", "loadtests.mock_engine", "--engines", "1")
CHAT = post("/v1/chat/completions", b'{"model":"mock","messages":[{"role":"user","content":"Hello"}]}')
ANSWER = b'"content":" alpha"'
# A process starts in a second on a machine that is otherwise idle.
REPLACED_S = 30.0


@dataclass(frozen=True)
class Route:
    """A running `herd route --processes`, in front of one mock engine."""

    parent: Running
    port: int
    admin_port: int

    @property
    def members(self) -> list[Member]:
        """Its processes that take connections, by rank."""
        return [member for member in Port(self.port).members() if member.open]

    @property
    def pids(self) -> list[int]:
        return [member.process.pid for member in self.members]

    def roll(self) -> None:
        """Has every process replaced."""
        before = set(self.pids)
        os.kill(self.parent.process.pid, signal.SIGHUP)
        eventually(lambda: len(self.pids) == len(before) and not before & set(self.pids), REPLACED_S)


@pytest.fixture(scope="module")
def engine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The URL of a mock engine."""
    with processes(tmp_path_factory.mktemp("engine")) as start:
        mock = start(*MOCK)
        yield eventually(lambda: mock.output.strip())


def route(start: Start, engine: str, count: int = 2, **env: str) -> Route:
    """`herd route` when all of its processes take connections."""
    port = free_ports(count + 1)
    admin_port = port + 1
    ports = ("--host", "127.0.0.1", "--port", str(port), "--admin-port", str(admin_port))
    parent = start(*HERD, "route", *ports, "--processes", str(count), "--worker-urls", engine, env=env)
    eventually(lambda: "Routing to" in parent.output or parent.process.poll() is not None, REPLACED_S)
    assert parent.process.poll() is None, parent.output
    return Route(parent, port, admin_port)


async def one_connection(port: int) -> str:
    """Connects, sends one request, reads its reply, closes; how that went."""
    try:
        async with asyncio.timeout(WAIT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.closing(writer):
                writer.write(CHAT)
                return "answered" if ANSWER in await read_message(reader) else "answered wrongly"
    except (OSError, asyncio.IncompleteReadError) as error:
        return type(error).__name__


async def one_client(port: int, ended: asyncio.Event) -> Counter[str]:
    """Sends one request after the other, on one connection until the router says it closes."""
    tally: Counter[str] = Counter()
    while not ended.is_set():
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        tally["connections"] += 1
        with contextlib.closing(writer):
            try:
                closes = False
                while not closes and not ended.is_set():
                    writer.write(CHAT)
                    reply = await asyncio.wait_for(read_message(reader), WAIT_S)
                    tally["answered" if ANSWER in reply else "answered wrongly"] += 1
                    closes = b"connection: close" in reply
                    await asyncio.sleep(0.005)
            except (OSError, asyncio.IncompleteReadError) as error:
                tally[type(error).__name__] += 1
    return tally


async def connections(port: int, per_second: int, ended: asyncio.Event) -> Counter[str]:
    """So many new connections a second until the event, whether or not earlier ones have ended."""
    loop, tasks = asyncio.get_running_loop(), []
    began = loop.time()
    while not ended.is_set():
        for _ in range(int((loop.time() - began) * per_second) - len(tasks)):
            tasks.append(loop.create_task(one_connection(port)))
        await asyncio.sleep(0.002)
    return Counter(await asyncio.gather(*tasks))


async def during(work: Callable[[], None], *traffic: Callable[[asyncio.Event], Awaitable[Any]]) -> list[Any]:
    """What each kind of traffic tells that runs while this works in a thread."""
    ended = asyncio.Event()
    running = [asyncio.ensure_future(one(ended)) for one in traffic]
    try:
        await asyncio.to_thread(work)
    finally:
        ended.set()
    return await asyncio.gather(*running)


async def test_ten_rolling_restarts_lose_no_connection(start: Start, engine: str) -> None:
    """Nor a request of clients that keep their connections."""
    it = route(start, engine)
    took = []

    def restarts() -> None:
        for _ in range(10):
            began = time.monotonic()
            it.roll()
            took.append(time.monotonic() - began)

    new, *kept = await during(
        restarts,
        lambda ended: connections(it.port, 500, ended),
        *[lambda ended: one_client(it.port, ended)] * 4,
    )
    print(f"new connections {dict(new)}, kept {sum(kept, Counter())}, restarts {took}")
    assert new.keys() == {"answered"}
    assert new["answered"] > 500 * 0.8 * sum(took)
    assert sum(kept, Counter()).keys() == {"answered", "connections"}
    assert [member.admin_port for member in it.members] == [it.admin_port, it.admin_port + 1]
    assert [len(member.listeners) for member in it.members] == [1, 1]
