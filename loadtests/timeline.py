"""Virtual time: what is going to happen, and when."""

from __future__ import annotations

from collections.abc import Callable
from heapq import heappop, heappush
from itertools import count


class Timeline:
    """Calls in order of time; of those at once, in the order in which they were planned."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._numbers = count()

    def at(self, time: float, act: Callable[..., None], *args: object) -> None:
        """Plans a call."""
        heappush(self._events, (time, next(self._numbers), act, args))

    def run(self) -> None:
        """Until nothing is planned any more."""
        while self._events:
            self.now, _, act, args = heappop(self._events)
            act(*args)
