"""How long replicas take from being asked for to serving, as this fleet's own did."""

from __future__ import annotations

from collections import deque
from collections.abc import Set as AbstractSet
from statistics import median

# Of so many of the last: enough that one that pulled an image first is no measure of the others.
KEPT = 5


class StartUps:
    """`assumed`: seconds that one takes, until the first has started."""

    def __init__(self, assumed: float) -> None:
        self._assumed = assumed
        self._took: deque[float] = deque(maxlen=KEPT)
        self._missing: deque[float | None] = deque()  # since when each is; None: since before the first look
        self._known: set[str] | None = None

    @property
    def seconds(self) -> float:
        """What the next one will take."""
        return median(self._took) if self._took else self._assumed

    def look(self, target: int, serving: AbstractSet[str], now: float) -> None:
        """How many there are to be, and which serve. To be told often: who comes is timed by it.

        One that was away and is back is no start; how long one takes that was asked for before the first look
        is not known.
        """
        since = now if self._known is not None else None
        known = self._known if self._known is not None else set(serving)
        for _ in serving - known:
            asked_at = self._missing.popleft() if self._missing else None
            if asked_at is not None:
                self._took.append(now - asked_at)
        self._known = known | serving
        missing = max(0, target - len(serving))
        while len(self._missing) > missing:
            self._missing.pop()
        self._missing.extend([since] * (missing - len(self._missing)))
