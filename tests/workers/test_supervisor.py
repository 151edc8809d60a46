"""Whatever is killed, and however, nothing of an engine is left."""

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support import eventually

from workers.process import SUPERVISOR

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the supervisor is made for Linux")

# An engine with a child in its group and one that has left its session; all three wait to be killed.
FAMILY = "sleep 600 & setsid sleep 600 & wait"


class Started:
    """A supervisor with an engine under it, and the owner's end of the link."""

    def __init__(self, *argv: str) -> None:
        self.link, theirs = socket.socketpair()
        with theirs:
            self.outer = subprocess.Popen(
                [sys.executable, "-I", "-S", SUPERVISOR, *argv],
                stdin=theirs,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        self.engine = int(self.link.recv(64))

    def end(self) -> None:
        self.link.close()
        self.outer.wait(10)


@pytest.fixture
def supervise() -> Iterator[Callable[..., Started]]:
    started: list[Started] = []

    def begin(*argv: str) -> Started:
        started.append(Started(*argv))
        return started[-1]

    yield begin
    for one in started:
        one.end()


def alive(pid: int) -> bool:
    """Whether it runs; one that ended and was not yet taken in does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def below(pid: int) -> list[int]:
    """All its descendants."""
    children = [
        int(entry.name)
        for entry in Path("/proc").glob("[0-9]*")
        if alive(int(entry.name)) and parent(int(entry.name)) == pid
    ]
    return children + [grandchild for child in children for grandchild in below(child)]


def parent(pid: int) -> int:
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return 0


def whole_family(started: Started) -> list[int]:
    """The outer and inner supervisor, the engine and its two children, once all are there."""
    eventually(lambda: len(below(started.outer.pid)) == 4)
    return [started.outer.pid, *below(started.outer.pid)]


def all_gone(pids: list[int]) -> bool:
    return eventually(lambda: not any(map(alive, pids)))


def test_the_owners_end_ends_everything(supervise):
    started = supervise("sh", "-c", FAMILY)
    family = whole_family(started)
    started.link.close()
    assert all_gone(family)
    assert started.outer.wait(10) == 128 + signal.SIGKILL


def test_kill_9_of_the_owner_process_ends_everything(tmp_path):
    owner = subprocess.Popen([sys.executable, "-c", OWNER, str(SUPERVISOR), FAMILY], stdout=subprocess.PIPE)
    with owner:
        outer = int(owner.stdout.readline())
        eventually(lambda: len(below(outer)) == 4)
        family = [outer, *below(outer)]
        owner.kill()
    assert all_gone(family)


OWNER = """
import socket, subprocess, sys, time
link, theirs = socket.socketpair()
argv = [sys.executable, "-I", "-S", sys.argv[1], "sh", "-c", sys.argv[2]]
outer = subprocess.Popen(argv, stdin=theirs, stdout=subprocess.DEVNULL, start_new_session=True)
print(outer.pid, flush=True)
theirs.close()
time.sleep(600)
"""


@pytest.mark.parametrize("which", ["outer", "inner"])
def test_kill_9_of_either_supervisor_ends_everything(supervise, which):
    started = supervise("sh", "-c", FAMILY)
    family = whole_family(started)
    os.kill(started.outer.pid if which == "outer" else parent(started.engine), signal.SIGKILL)
    assert all_gone(family)


def test_what_the_engine_leaves_behind_is_ended_before_its_status_is_told(supervise):
    started = supervise("sh", "-c", "setsid sleep 600 & sleep 600 & read go < /dev/stdin; kill -9 $$")
    assert started.outer.wait(10) == 128 + signal.SIGKILL
    assert below(started.outer.pid) == []


@pytest.mark.parametrize(
    ("argv", "status"),
    [
        (("sh", "-c", "exit 0"), 0),
        (("sh", "-c", "exit 7"), 7),
        (("sh", "-c", "kill -SEGV $$"), 128 + signal.SIGSEGV),
        (("/no/such/engine",), 127),
    ],
)
def test_the_status_is_the_engines(supervise, argv, status):
    assert supervise(*argv).outer.wait(10) == status


def test_sigterm_reaches_the_engine_and_it_may_finish(supervise, tmp_path):
    ready = tmp_path / "ready"
    started = supervise("sh", "-c", f"trap 'exit 3' TERM; touch {ready}; while :; do sleep 0.01; done")
    assert eventually(ready.exists)
    started.outer.terminate()
    assert started.outer.wait(10) == 3


def test_signals_that_the_owner_blocks_are_not_blocked_below(supervise):
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    try:
        started = supervise("sleep", "600")
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    started.outer.terminate()
    assert started.outer.wait(10) == 128 + signal.SIGTERM


def test_the_engine_has_no_link_to_its_owner(supervise):
    started = supervise("sleep", "600")
    assert eventually(lambda: Path(f"/proc/{started.engine}/comm").read_text() == "sleep\n")
    assert os.readlink(f"/proc/{started.engine}/fd/0") == "/dev/null"
    assert len(os.listdir(f"/proc/{started.engine}/fd")) == 3


def test_a_signal_to_the_owners_group_does_not_reach_the_engine(supervise):
    started = supervise("sh", "-c", FAMILY)
    family = whole_family(started)
    sessions = [os.getsid(pid) for pid in (started.outer.pid, parent(started.engine), started.engine)]
    assert sessions == [started.outer.pid, parent(started.engine), started.engine]
    assert os.getsid(0) not in {os.getsid(pid) for pid in family}
