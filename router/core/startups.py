"""How long replicas take from being asked for to serving, as this fleet's own did."""

from __future__ import annotations

from collections import deque
from statistics import median

# Of so many of the last: enough that one that pulled an image first is no measure of the others.
KEPT = 5


class StartUps:
    """`assumed`: seconds that one takes, until the first has started."""

    def __init__(self, assumed: float) -> None:
        self._assumed = assumed
        self._asked: deque[float] = deque()
        self._took: deque[float] = deque(maxlen=KEPT)
        self._target: int | None = None  # before the first look
        self._ready = 0

    @property
    def seconds(self) -> float:
        """What the next one will take."""
        return median(self._took) if self._took else self._assumed

    def look(self, target: int, ready: int, now: float) -> None:
        """How many are asked for, and how many serve. To be told often: who came is timed by it.

        One that comes in the place of another was not asked for, and is not timed; nor is one that was asked
        for before the first look.
        """
        if self._target is not None:
            self._asked.extend([now] * max(0, target - max(self._target, ready)))
        for _ in range(max(0, ready - self._ready)):
            if self._asked:
                self._took.append(now - self._asked.popleft())
        while len(self._asked) > max(0, target - ready):
            self._asked.pop()
        self._target, self._ready = target, ready
