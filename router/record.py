"""`herd record`: live traffic of all router processes as a trace that can be replayed.

In the form that Mooncake published theirs, one JSON object a line: `timestamp` (ms since the start),
`input_length`, `output_length` (tokens), `hash_ids` (one number for each begun 512 tokens of the prompt, in
order of their first occurrence), and `session_id` where the client named a session. Lines are in order of the
requests' ends.
"""

from __future__ import annotations

import gzip
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO

import msgspec

from router.admin_client import ask
from router.arrivals import Arrival, Batch
from router.errors import HerdError

LOOK_S = 1.0


class Line(msgspec.Struct, omit_defaults=True):
    """One request of the trace."""

    timestamp: int
    input_length: int
    output_length: int
    hash_ids: list[int]
    session_id: str | None = None


@dataclass(slots=True)
class Recorded:
    """How many requests there are, and of how many of them the prompt was not known."""

    requests: int = 0
    blind: int = 0


class Trace:
    """Makes lines of what came after its start (Unix time), and numbers of what keys name."""

    def __init__(self, start: float) -> None:
        self.recorded = Recorded()
        self._start = start
        self._ids = count()
        self._blocks: dict[int, int] = {}
        self._sessions: dict[int, str] = {}

    def line(self, arrival: Arrival) -> Line | None:
        """A request; a block that is not known is like no other. None if it came before the start."""
        if arrival.at < self._start:
            return None
        self.recorded.requests += 1
        self.recorded.blind += arrival.keys[0] is None
        return Line(
            round((arrival.at - self._start) * 1e3),
            arrival.input_length,
            arrival.output_length,
            [self._id(key) for key in arrival.keys],
            None if arrival.session is None else self._session(arrival.session),
        )

    def _id(self, key: int | None) -> int:
        if key is None:
            return next(self._ids)
        known = self._blocks.get(key)
        if known is None:
            known = self._blocks[key] = next(self._ids)
        return known

    def _session(self, key: int) -> str:
        return self._sessions.setdefault(key, str(len(self._sessions)))


class Routers:
    """The router processes, asked one after the other for what each of them answered."""

    def __init__(self, admins: Callable[[], Sequence[str]]) -> None:
        self._admins = admins
        self._next: dict[str, int] = {}

    def arrivals(self) -> Iterator[Arrival]:
        """What came since the last time. Raises HerdError when no process answers."""
        batches = [batch for admin in self._admins() if (batch := self._ask(admin)) is not None]
        if not batches:
            raise HerdError("The router does not answer.")
        for batch in batches:
            yield from batch.arrivals

    def _ask(self, admin: str) -> Batch | None:
        after = self._next.get(admin)
        reply = ask(f"{admin}/arrivals", **({} if after is None else {"after": after}))
        if reply is None:
            return None
        batch = msgspec.json.decode(reply.raise_for_status().content, type=Batch)
        self._next[admin] = batch.next
        return batch


def run(admins: Callable[[], Sequence[str]], path: Path, seconds: float | None) -> Recorded:
    """Records for so long, or until SIGINT or SIGTERM. Raises HerdError with one sentence."""
    over = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: over.set())
    routers, trace = Routers(admins), Trace(time.time())
    list(routers.arrivals())  # from now on they keep what they answer
    end = time.monotonic() + (math.inf if seconds is None else seconds)
    with _opened(path) as file:
        while not over.wait(max(0.0, min(LOOK_S, end - time.monotonic()))) and time.monotonic() < end:
            _write(file, trace, routers)
        _write(file, trace, routers)
    return trace.recorded


def _write(file: IO[bytes], trace: Trace, routers: Routers) -> None:
    lines = [line for arrival in routers.arrivals() if (line := trace.line(arrival)) is not None]
    file.write(msgspec.json.Encoder().encode_lines(lines))
    file.flush()


def _opened(path: Path) -> IO[bytes]:
    try:
        return gzip.open(path, "wb") if path.suffix == ".gz" else path.open("wb")
    except OSError as error:
        raise HerdError(f"{path}: {error.strerror}") from None
