"""`herd route --processes`: real processes on one port, under traffic that counts every connection."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from router_wire import WAIT_S, connections, during, one_connection, post, read_message
from support import (
    HERD,
    ROOT,
    Holder,
    Running,
    Start,
    eventually,
    free_ports,
    get,
    processes,
    simulated_engine,
)

from router.http import listener
from router.port import Member, Port
from router.route import GRACE_S
from router.watchdog import STUCK_S

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


def route(
    start: Start, engine: str, *flags: str, count: int = 2, env: Mapping[str, str] | None = None
) -> Route:
    """`herd route` when all of its processes take connections."""
    port = free_ports(count + 1)
    admin_port = port + 1
    ports = ("--host", "127.0.0.1", "--port", str(port), "--admin-port", str(admin_port))
    parent = start(
        *HERD, "route", *ports, "--processes", str(count), *flags, "--worker-urls", engine, env=env
    )
    eventually(lambda: "Routing to" in parent.output or parent.process.poll() is not None, REPLACED_S)
    assert parent.process.poll() is None, parent.output
    return Route(parent, port, admin_port)


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
        lambda ended: connections(it.port, CHAT, ANSWER, 500, ended),
        *[lambda ended: one_client(it.port, ended)] * 4,
    )
    print(f"new connections {dict(new)}, kept {sum(kept, Counter())}, restarts {took}")
    assert new.keys() == {"answered"}
    assert new["answered"] > 500 * 0.8 * sum(took)
    assert sum(kept, Counter()).keys() == {"answered", "connections"}
    ports = [it.admin_port, it.admin_port + 1]
    eventually(lambda: [member.admin_port for member in it.members] == ports, REPLACED_S)
    assert [len(member.listeners) for member in it.members] == [1, 1]


def test_connections_are_spread_evenly(start: Start, engine: str) -> None:
    it = route(start, engine)
    with contextlib.ExitStack() as opened:
        for _ in range(200):
            opened.enter_context(socket.create_connection(("127.0.0.1", it.port)))
        counts = eventually(lambda: sum(found := connections_of(it)) == 200 and found)
    # Each goes to either with the same chance: 60 of 200 or fewer are 6 standard deviations off.
    assert min(counts) > 60


def connections_of(it: Route) -> list[int]:
    return [process["connections"] for process in status(it)["fleet"]["processes"]]


def status(it: Route) -> dict[str, Any]:
    """What `herd status --json` tells."""
    argv = [*HERD, "status", "--port", str(it.port), "--json"]
    return dict(json.loads(subprocess.run(argv, check=True, capture_output=True, cwd=ROOT).stdout))


def test_status_lists_every_process(start: Start, engine: str) -> None:
    it = route(start, engine, count=3)
    told = status(it)
    assert [(p["rank"], p["pid"], p["admin_port"]) for p in told["fleet"]["processes"]] == [
        (rank, pid, it.admin_port + rank) for rank, pid in enumerate(it.pids)
    ]
    assert get(f"http://127.0.0.1:{it.admin_port + 2}/routers").json() == [
        {"targets": [f"127.0.0.1:{it.admin_port + rank}" for rank in range(3)], "labels": {}}
    ]
    text = subprocess.run([*HERD, "status", "--port", str(it.port)], capture_output=True, text=True, cwd=ROOT)
    for rank, pid in enumerate(it.pids):
        assert re.search(rf"^{rank} +{pid} +{it.admin_port + rank} +0 ", text.stdout, re.MULTILINE)


def test_a_killed_process_is_replaced_while_the_other_serves(start: Start, engine: str) -> None:
    it = route(start, engine)
    (victim, gone), (survivor, _) = [(member.process.pid, set(member.listeners)) for member in it.members]
    os.kill(victim, signal.SIGKILL)
    # A connection of the moment between its death and the end of its sockets is lost.
    eventually(lambda: not gone & listener.listening("127.0.0.1", it.port))
    assert asyncio.run(one_connection(it.port, CHAT, ANSWER)) == "answered"
    after = eventually(lambda: len(it.members) == 2 and it.members, REPLACED_S)
    assert [member.rank for member in after] == [0, 1]
    assert after[1].process.pid == survivor
    assert "ended with status -9" in it.parent.output


@contextlib.contextmanager
def streaming(it: Route) -> Iterator[None]:
    """A stream under way that takes its time."""
    body = b'{"model":"herd-demo","stream":true,"max_tokens":1000,"ignore_eos":true,"prompt":"Hello"}'
    with socket.create_connection(("127.0.0.1", it.port), timeout=WAIT_S) as client:
        client.sendall(post("/v1/completions", body, "content-type: application/json"))
        assert client.recv(4096).startswith(b"HTTP/1.1 200 ")
        yield


def seen(it: Route) -> list[tuple[int, int]]:
    """Requests at the replica as each process sees it: its own, and those of the others."""
    fleets = (get(f"http://127.0.0.1:{it.admin_port + rank}/fleet").json() for rank in range(2))
    replicas = (replica for fleet in fleets for replica in fleet["replicas"])
    return [(replica["in_flight"], replica["elsewhere"]["in_flight"]) for replica in replicas]


def test_each_process_sees_what_the_other_has_in_flight(start: Start) -> None:
    it = route(start, simulated_engine(start, "--step-time", "0.05,0,0,0").url)
    peers = get(f"http://127.0.0.1:{it.admin_port}/fleet").json()["peers"]
    assert [(peer["host"], peer["age_s"] < 1, peer["in_flight"]) for peer in peers] == [
        ("127.0.0.1", True, 0)
    ]
    with streaming(it):
        began = time.monotonic()
        found = eventually(lambda: sorted(now := seen(it)) == [(0, 1), (1, 0)] and now, 1.0)
        print(f"seen by the other after {time.monotonic() - began:.3f} s at most")
        os.kill(it.pids[found.index((1, 0))], signal.SIGKILL)
        began = time.monotonic()
        survivor = f"http://127.0.0.1:{it.admin_port + found.index((0, 1))}"
        eventually(lambda: not get(f"{survivor}/fleet").json()["replicas"][0]["elsewhere"]["in_flight"], 3.0)
        print(f"gone {time.monotonic() - began:.3f} s after its process was killed")
    metrics = get(f"{survivor}/metrics").text
    assert re.search(r'^herd_gossip_datagrams_total\{fate="taken"\} [1-9]', metrics, re.MULTILINE)


def test_processes_pass_requests_on_to_who_owns_them_while_that_lives(start: Start, engine: str) -> None:
    it = route(start, engine, "--shards", "2")
    said = [CHAT.replace(b"Hello", b"Say%2d" % n) for n in range(20)]

    def answers() -> Counter[str]:
        return Counter(asyncio.run(one_connection(it.port, each, ANSWER)) for each in said)

    eventually(lambda: answers().keys() == {"answered"} and passed_on(it), REPLACED_S)
    victim, gone = it.pids[0], set(it.members[0].listeners)
    os.kill(victim, signal.SIGKILL)
    eventually(lambda: not gone & listener.listening("127.0.0.1", it.port))
    assert answers() == {"answered": 20}


def passed_on(it: Route) -> int:
    pages = [get(f"http://127.0.0.1:{it.admin_port + rank}/metrics").text for rank in range(2)]
    counted = r'^herd_relayed_to_owner_total\{outcome="passed"\} (\d+)'
    return sum(int(found) for page in pages for found in re.findall(counted, page, re.MULTILINE))


def test_a_process_whose_loop_is_stuck_is_replaced(start: Start, engine: str, tmp_path: Path) -> None:
    holder = Holder(tmp_path)
    it = route(start, engine, env=holder.env)
    survivor, victim = it.pids
    holder.hold(victim)
    after = eventually(lambda: len(it.pids) == 2 and victim not in it.pids and it.pids, STUCK_S + REPLACED_S)
    assert after[0] == survivor
    assert "Timeout (0:00:10)!" in it.parent.output
    assert asyncio.run(one_connection(it.port, CHAT, ANSWER)) == "answered"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all(start: Start, engine: str, number: int) -> None:
    it = route(start, engine)
    pids = it.pids
    os.kill(it.parent.process.pid, number)
    assert it.parent.process.wait(REPLACED_S) == 0
    assert not any(Path(f"/proc/{pid}").exists() for pid in pids)
    assert Port(it.port).members() == []


def test_a_second_signal_cuts(start: Start, engine: str) -> None:
    it = route(start, engine)
    with socket.create_connection(("127.0.0.1", it.port)) as unfinished:
        unfinished.sendall(b"GET /health HTTP/1.1\r\nhost: h\r\n\r\nGET ")
        assert unfinished.recv(4096).startswith(b"HTTP/1.1 200 ")
        os.kill(it.parent.process.pid, signal.SIGTERM)
        eventually(lambda: not it.members)
        assert it.parent.process.poll() is None  # it gives what is under way its time
        os.kill(it.parent.process.pid, signal.SIGTERM)
        assert it.parent.process.wait(GRACE_S / 2) == 0


def test_processes_end_with_their_parent(start: Start, engine: str) -> None:
    it = route(start, engine)
    members = it.members
    it.parent.process.kill()
    eventually(lambda: not any(member.process.alive for member in members), REPLACED_S)


def test_a_port_that_another_has_is_refused_in_one_sentence(start: Start, engine: str) -> None:
    it = route(start, engine)
    for count in ("1", "2"):
        argv = [*HERD, "route", "--host", "127.0.0.1", "--port", str(it.port), "--processes", count]
        again = subprocess.run([*argv, "--worker-urls", engine], capture_output=True, text=True, cwd=ROOT)
        assert again.returncode == 1
        assert again.stderr.startswith(f"Error: port {it.port} is taken: another fleet has it (herd route ")
        assert len(again.stderr.splitlines()) == 1
    with listener.listen("127.0.0.1", 0, shared=True) as theirs:
        port = theirs.getsockname()[1]
        argv = [*HERD, "route", "--host", "127.0.0.1", "--port", str(port), "--processes", "2"]
        other = subprocess.run([*argv, "--worker-urls", engine], capture_output=True, text=True, cwd=ROOT)
        assert other.returncode == 1
        assert re.fullmatch(
            rf"Error: port {port} is taken: .+ \(process {os.getpid()}\) listens on it\n", other.stderr
        )


def test_port_zero_is_one_port_for_all(start: Start, engine: str) -> None:
    ports = ("--host", "127.0.0.1", "--port", "0", "--admin-port", "0", "--processes", "2")
    parent = start(*HERD, "route", *ports, "--worker-urls", engine)
    said = r"^Routing to 1 engines on port (\d+) in 2 processes; metrics and state: (\d+), (\d+)\.$"
    told = eventually(lambda: re.search(said, parent.output, re.MULTILINE), REPLACED_S)
    assert told is not None
    assert [member.admin_port for member in Port(int(told[1])).members()] == [int(told[2]), int(told[3])]


def test_wrong_settings_are_told_once(start: Start) -> None:
    wrong = start(*HERD, "route", "--processes", "3", "--worker-urls", "localhost:8000")
    assert wrong.process.wait(REPLACED_S) == 1
    assert wrong.output == "Error: --worker-urls: 'localhost:8000' is not of the form http://HOST:PORT\n"
