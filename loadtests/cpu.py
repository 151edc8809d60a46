"""Which core a process runs on and what it uses: pinning, CPU time and memory of process trees (Linux)."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path

PAGE_BYTES = os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def pinned(cores: set[int]) -> Iterator[None]:
    """The calling thread runs on these cores, and so does for good whatever process it starts meanwhile."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cores)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def tree(pid: int) -> list[int]:
    """A living process and its living descendants."""
    children: dict[int, list[int]] = {}
    for status in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            # The second field is the command in parentheses and may hold anything; the parent is the fourth.
            parent = int(status.read_text().rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(status.parent.name))
    found = [pid]
    for member in found:
        found += children.get(member, [])
    return found


def cpu_seconds(pid: int) -> float:
    """User and system time that a process tree has used; children that have ended are not in it."""
    return sum(_process_clock(member) for member in tree(pid))


def rss_bytes(pid: int) -> int:
    """Resident memory of a process tree; pages that its processes share count once for each."""
    pages = (Path(f"/proc/{member}/statm").read_text().split()[1] for member in tree(pid))
    return sum(int(count) for count in pages) * PAGE_BYTES


def _process_clock(pid: int) -> float:
    # clock_getcpuclockid(3), which Python lacks: the same sum as in /proc/PID/stat, in ns instead of 10 ms.
    return time.clock_gettime(((~pid) << 3) | 2)
