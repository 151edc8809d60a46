"""What tests on real sockets and real processes share: `from support import eventually`."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import httpx

T = TypeVar("T")

ROOT = Path(__file__).resolve().parent.parent
HERD = (sys.executable, "-m", "router.cli")
# A router gets so many admin ports in a row; no test has more processes in one.
PROCESSES = 4
# Between two looks: short against what is waited for, long against what a look costs.
POLL_S = 0.05
# A process that got SIGTERM and is still there after this gets SIGKILL.
GRACE_S = 5.0


def eventually(
    look: Callable[[], T], timeout: float = 10.0, tolerate: type[Exception] | tuple[type[Exception], ...] = ()
) -> T:
    """Looks until what it sees is true, and returns that; exceptions in `tolerate` mean not yet."""
    deadline = time.monotonic() + timeout
    while True:
        seen: object
        try:
            if seen := look():
                return seen
        except tolerate as error:
            seen = error
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {timeout} s; last seen: {seen!r}")
        time.sleep(POLL_S)


def free_port() -> int:
    """A port of 127.0.0.1 that nobody listens on now, for programs that cannot take port 0."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def free_ports(count: int) -> int:
    """The first of so many free ports in a row, below those that outgoing connections are given."""
    while True:
        first = random.randrange(10000, 32768 - count)  # ip_local_port_range begins at 32768
        with contextlib.ExitStack() as sockets:
            try:
                for port in range(first, first + count):
                    sockets.enter_context(socket.socket()).bind(("127.0.0.1", port))
            except OSError:
                continue
            return first


@dataclass(frozen=True, slots=True)
class Running:
    """A process that a test started, in a session of its own, with its output in a file."""

    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, argv: Sequence[str | Path], log: Path, env: Mapping[str, str] | None = None) -> Running:
        """Starts it; `env` is added to this process's environment."""
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(arg) for arg in argv],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "PYTHONUNBUFFERED": "1", **(env or {})},
                cwd=ROOT,
                start_new_session=True,
            )
        return cls(process, log)

    @property
    def output(self) -> str:
        """What it has written until now."""
        return self.log.read_text(errors="replace")

    def kill(self) -> None:
        """SIGKILL to its whole group, as when a machine or the kernel takes it."""
        self._signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """Ends its whole group, whatever state that is in."""
        self._signal(signal.SIGTERM)
        try:
            self.process.wait(GRACE_S)
        except subprocess.TimeoutExpired:
            pass
        self.kill()

    def _signal(self, number: signal.Signals) -> None:
        # The group outlives its leader while it has other members, so this is not asked of `process`.
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            pass


Start = Callable[..., Running]


@contextlib.contextmanager
def processes(folder: Path) -> Iterator[Start]:
    """Gives `start(*argv, env=None)`; each process logs in `folder`, and all of them end with the block."""
    started: list[Running] = []

    def start(*argv: str | Path, env: Mapping[str, str] | None = None) -> Running:
        started.append(Running.start(argv, folder / f"process-{len(started)}.log", env))
        return started[-1]

    try:
        yield start
    finally:
        for running in reversed(started):
            running.stop()


class Holder:
    """Holds the event loop of a router process that was started in its `env`: the loop is stuck then."""

    PROGRAM = """
import gc, os, threading, time

def wait():
    while not os.path.exists(os.path.join(os.environ["HOLD"], str(os.getpid()))):
        time.sleep(0.1)
    gc.unfreeze()  # Serve freezes what there is once a replica is made
    for found in gc.get_objects():
        if (type(found).__module__, type(found).__name__) == ("router.http.server", "Server"):
            found.loop.call_soon_threadsafe(time.sleep, 600)

threading.Thread(target=wait, daemon=True).start()
"""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        (folder / "sitecustomize.py").write_text(self.PROGRAM)  # every Python that finds it runs it

    @property
    def env(self) -> dict[str, str]:
        path = (str(self._folder), os.environ.get("PYTHONPATH", ""))
        return {"PYTHONPATH": os.pathsep.join(filter(None, path)), "HOLD": str(self._folder)}

    def hold(self, pid: int) -> None:
        """From now on this process does nothing more in its loop."""
        (self._folder / str(pid)).touch()


@dataclass(frozen=True, slots=True)
class Server:
    """A process of ours that listens: where, and where its operators look."""

    running: Running
    url: str
    admin: str = ""


def simulated_engine(start: Start, *flags: str) -> Server:
    """A simulated engine that answers; flags are those of `herd engine simulated`."""
    port = free_port()
    running = start(
        *HERD, "engine", "simulated", "--port", str(port), "--enable-prompt-tokens-details", *flags
    )
    url = f"http://127.0.0.1:{port}"
    wait_for(running, f"{url}/health")
    return Server(running, url)


def router(start: Start, *engines: Server, flags: Sequence[str] = ()) -> Server:
    """`herd route` in front of these engines, when all of them get requests (from its first process)."""
    port, admin_port = free_port(), free_ports(PROCESSES)
    ports = ("--host", "127.0.0.1", "--port", str(port), "--admin-port", str(admin_port))
    running = start(*HERD, "route", *ports, *flags, "--worker-urls", *(engine.url for engine in engines))
    server = Server(running, f"http://127.0.0.1:{port}", f"http://127.0.0.1:{admin_port}")
    wait_for(running, f"{server.url}/ready")
    eventually(lambda: states(server) == {engine.url: "ready" for engine in engines})
    return server


def states(router: Server) -> dict[str, str]:
    """The state of each replica, as the router sees it."""
    return {replica["id"]: replica["state"] for replica in get(f"{router.admin}/fleet").json()["replicas"]}


def get(url: str, **params: str) -> httpx.Response:
    """GET from a server of this machine; reading certificates for it would cost more than all else."""
    return httpx.get(url, params=params, verify=False, trust_env=False)


def wait_for(running: Running, url: str) -> None:
    """Waits until the process answers 200 there; one that ended instead has its output shown."""

    def answers() -> bool:
        assert running.process.poll() is None, f"{running.process.args} ended:\n{running.output}"
        return get(url).status_code == 200

    eventually(answers, timeout=30, tolerate=httpx.TransportError)
