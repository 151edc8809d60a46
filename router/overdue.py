"""Requests of which nothing comes though their replica is well: they are taken elsewhere.

That their replica is busy is no reason: they wait for a multiple of what its step model predicts, once that
has seen enough, and another replica must have room. The slow try is ended before the next one begins, so no
engine computes a request twice.
"""

from __future__ import annotations

import asyncio

from router.core.fleet import Fleet, Flight, State
from router.core.retry_budget import RetryBudget
from router.core.step_model import TELLING

LOOK_S = 0.25
# So many times the time to first token that was predicted, and at least so many seconds.
TIMES, LEAST_S = 5.0, 2.0
# Seconds of prefill at another replica, beyond which that has no room.
ROOM_S = 0.3


class Overdue:
    """Looks after streams that wait for their first token."""

    def __init__(self, fleet: Fleet, budget: RetryBudget) -> None:
        self._fleet = fleet
        self._budget = budget
        self._waiting: dict[int, tuple[Flight, asyncio.Timeout]] = {}
        self._timer: asyncio.TimerHandle | None = None

    def wait(self, flight: Flight, patience: asyncio.Timeout) -> None:
        """A stream waits; `patience` is ended when it has waited too long."""
        self._waiting[id(flight)] = flight, patience
        if self._timer is None:
            self._timer = asyncio.get_running_loop().call_later(LOOK_S, self._look)

    def over(self, flight: Flight) -> None:
        """It waits no more."""
        self._waiting.pop(id(flight), None)

    def _look(self) -> None:
        loop, self._timer = asyncio.get_running_loop(), None
        for flight, patience in list(self._waiting.values()):
            if self._is_overdue(flight, loop.time()):
                self.over(flight)
                patience.reschedule(loop.time())
        if self._waiting:
            self._timer = loop.call_later(LOOK_S, self._look)

    def _is_overdue(self, flight: Flight, now: float) -> bool:
        waited = now - flight.started_at
        if waited < max(LEAST_S, TIMES * flight.forecast.ttft_s):
            return False
        known = flight.standing.steps.prefill.observations >= TELLING
        return known and self._has_room_elsewhere(flight, now) and self._budget.left(now)

    def _has_room_elsewhere(self, flight: Flight, now: float) -> bool:
        own = flight.standing
        return any(
            s is not own
            and s.state is State.READY
            and s.replica.models == own.replica.models
            and s.backlog_s(now) < ROOM_S
            for s in self._fleet
        )
