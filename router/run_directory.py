"""What a running fleet leaves on disk, so that other commands find it and can end exactly it.

A run directory holds `fleet.json` (this record), `serve.yaml` (what was deployed), `logs/` and a lock that
the running `herd up` holds. A process is named by its id and its start time: ids are used again.
"""

from __future__ import annotations

import fcntl
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec

from router.errors import HerdError

# Between looks at whether processes have ended.
POLL_S = 0.05
# What is left when Serve and Ray were shut down, or were killed, serves nobody: it needs no time for streams.
SWEEP_S = 5.0
# `herd up` itself needs at most half of it (router.up.STOP_S, then Ray); after that it is stuck.
DOWN_S = 60.0

# Where a session's logs are in Ray's folder.
RAY_LOGS = re.compile(r"\S+/session_[^/\s]+/logs/")


class AlreadyUp(HerdError):
    """A `herd up` is running in this run directory."""


class Process(msgspec.Struct, frozen=True):
    """A process of this machine: its id, its start (clock ticks after boot), and its name for people."""

    pid: int
    started: int
    name: str = ""

    @property
    def alive(self) -> bool:
        """Still the same process, and not a zombie."""
        stat = _stat(self.pid)
        return stat is not None and stat.started == self.started and stat.state != "Z"

    def signal(self, number: int) -> None:
        """Signals it, if it is still the same process."""
        if self.alive:
            try:
                os.kill(self.pid, number)
            except ProcessLookupError:
                return


class Record(msgspec.Struct, omit_defaults=True):
    """One `herd up`: who runs it, where the fleet is, and everything that was started for it."""

    herd: Process
    engine: str
    models: list[str]
    endpoint: str
    admin: str  # of the first router process; the next ones have the next ports
    run_directory: str
    routers: int = 1
    dashboard: str | None = None
    ray_address: str | None = None
    token_auth: bool = False
    keyed: bool = False  # clients need an API key
    ready: bool = False
    ray_folder: str | None = None
    processes: list[Process] = []


class RunDirectory:
    """One folder per fleet of this machine."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._record = path / "fleet.json"
        self.serve_config = path / "serve.yaml"
        self.logs = path / "logs"

    @contextmanager
    def claimed(self) -> Iterator[None]:
        """Holds the folder for one fleet; what its record names before and after that is ended.

        Raises AlreadyUp.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        with self._locked(fcntl.LOCK_NB) as lock:
            self.sweep()
            with self._guarded(lock):
                try:
                    yield
                finally:
                    self.sweep()

    def sweep(self) -> None:
        """Ends what the record names and is still there, keeps its logs, and forgets it."""
        if (record := self.read()) is None:
            return
        end((p for p in record.processes if p.pid != os.getpid()), SWEEP_S)
        if record.ray_folder is not None:
            self._keep_logs(Path(record.ray_folder))
            shutil.rmtree(record.ray_folder, ignore_errors=True)
        self._record.unlink()

    def down(self) -> bool:
        """Ends the fleet, gracefully where its `herd up` still runs. False if there is none."""
        if (record := self.read()) is None:
            return False
        end([record.herd], DOWN_S)
        with self._locked():
            self.sweep()
        return True

    def write(self, record: Record) -> None:
        """Replaces the record, whole or not at all."""
        new = self._record.with_suffix(".new")
        new.write_bytes(msgspec.json.format(msgspec.json.encode(record)))
        new.replace(self._record)

    def read(self) -> Record | None:
        """The record, if there is one."""
        try:
            return msgspec.json.decode(self._record.read_bytes(), type=Record)
        except FileNotFoundError:
            return None
        except msgspec.DecodeError as error:
            raise HerdError(f"{self._record} is not a record of a fleet: {error}") from None

    @contextmanager
    def _locked(self, how: int = 0) -> Iterator[int]:
        with (self.path / "lock").open("w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | how)
            except BlockingIOError:
                raise AlreadyUp(f"A fleet is already up here: see `herd status` ({self.path}).") from None
            yield lock.fileno()

    @contextmanager
    def _guarded(self, lock: int) -> Iterator[None]:
        """A process that sweeps when this one is killed: of Ray some parts may stay behind then.

        It shares the lock, so that nobody claims the folder before it is done.
        """
        argv = [sys.executable, "-m", __name__, str(self.path)]
        with subprocess.Popen(argv, stdin=subprocess.PIPE, pass_fds=[lock], start_new_session=True):
            yield

    def kept(self, text: str) -> str:
        """The text with paths of logs as they are once `sweep` has kept them."""
        return RAY_LOGS.sub(f"{self.logs}/", text)

    def _keep_logs(self, ray_folder: Path) -> None:
        """The engines' and Serve's, in place of those of the run before."""
        shutil.rmtree(self.logs, ignore_errors=True)
        self.logs.mkdir()
        session = ray_folder / "session_latest" / "logs"
        for log in [*session.glob("engine-*.log"), *session.glob("serve")]:
            shutil.move(log, self.logs / log.name)


def default(port: int) -> RunDirectory:
    """The run directory of the fleet on a port, by the XDG rules for state."""
    state = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    return RunDirectory(Path(state) / "herd" / str(port))


def this_process() -> Process:
    """The one that asks."""
    stat = _stat(os.getpid())
    assert stat is not None
    return stat.process


def descendants(ancestor: int) -> list[Process]:
    """Every process below one, as it is now; zombies are left out."""
    stats = [s for s in map(_stat, _pids()) if s is not None and s.state != "Z"]
    children: dict[int, list[_Stat]] = {}
    for stat in stats:
        children.setdefault(stat.parent, []).append(stat)
    below, open_ends = [], [ancestor]
    while open_ends:
        found = children.get(open_ends.pop(), [])
        below += [s.process for s in found]
        open_ends += [s.pid for s in found]
    return below


def wait_gone(processes: Iterable[Process], timeout_s: float) -> list[Process]:
    """Waits until all have ended; those that have not after `timeout_s` are returned."""
    deadline = time.monotonic() + timeout_s
    left = [p for p in processes if p.alive]
    while left and time.monotonic() < deadline:
        time.sleep(POLL_S)
        left = [p for p in left if p.alive]
    return left


def end(processes: Iterable[Process], grace_s: float) -> None:
    """SIGTERM, and after `grace_s` SIGKILL, for those of them that are still there."""
    processes = list(processes)
    for process in processes:
        process.signal(signal.SIGTERM)
    for process in wait_gone(processes, grace_s):
        process.signal(signal.SIGKILL)


class _Stat(msgspec.Struct, frozen=True):
    """The fields of /proc/PID/stat that tell who a process is (proc(5))."""

    pid: int
    name: str
    state: str
    parent: int
    started: int

    @property
    def process(self) -> Process:
        return Process(self.pid, self.started, self.name)


def _stat(pid: int) -> _Stat | None:
    try:
        text = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    # The name comes second, in brackets, and may itself hold brackets and spaces.
    head, _, tail = text.rpartition(")")
    fields = tail.split()
    return _Stat(pid, head.partition("(")[2], fields[0], parent=int(fields[1]), started=int(fields[19]))


def _pids() -> list[int]:
    return [int(entry) for entry in os.listdir("/proc") if entry.isdigit()]


if __name__ == "__main__":  # the guard: standard input ends with whoever started it
    sys.stdin.buffer.read()
    RunDirectory(Path(sys.argv[1])).sweep()
