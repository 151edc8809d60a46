"""How many tries beyond the first a router may spend: a share of its traffic, so that no fault multiplies.

Where replicas fail because they are overloaded, every further try makes it worse. Retries, and streams that
go on elsewhere, share one budget.
"""

from __future__ import annotations

from dataclasses import dataclass

# Finagle's and gRPC's budgets allow a fifth as well, over ten seconds.
SHARE, WINDOW_S = 0.2, 10
# Where there is hardly any traffic a fifth of it is nothing.
LEAST = 10
# All requests of one replica fail at once when it dies. They may all go elsewhere, and once again.
BURSTS = 2


@dataclass(slots=True)
class _Second:
    at: int = -1
    requests: int = 0
    retries: int = 0
    largest: int = 0


class RetryBudget:
    """Counted by the second, in a ring of as many as count."""

    def __init__(self) -> None:
        self._ring = [_Second() for _ in range(WINDOW_S)]

    def placed(self, in_flight: int, now: float) -> None:
        """A request had its first try, at a replica that has so many now."""
        second = self._second(now)
        second.requests += 1
        second.largest = max(second.largest, in_flight)

    def lost(self, in_flight: int, now: float) -> None:
        """A replica failed one of so many, which may be about to fail all."""
        second = self._second(now)
        second.largest = max(second.largest, in_flight)

    def take(self, now: float) -> bool:
        """Spends one try, if there is one."""
        if not self.left(now):
            return False
        self._second(now).retries += 1
        return True

    def left(self, now: float) -> bool:
        """Whether there is one."""
        second = self._second(now)
        lately = [s for s in self._ring if s.at > second.at - WINDOW_S]
        budget = LEAST + SHARE * sum(s.requests for s in lately) + BURSTS * max(s.largest for s in lately)
        return sum(s.retries for s in lately) + 1 <= budget

    def _second(self, now: float) -> _Second:
        at = int(now)
        second = self._ring[at % WINDOW_S]
        if second.at != at:
            second.at, second.requests, second.retries, second.largest = at, 0, 0, 0
        return second
