"""How many replicas a model needs: from what is asked of them and what one can do within its SLO.

A replica is busy prefilling for a share of its time, and its streams wait meanwhile. Both limits, how busy it
may be and how slow its streams, are met by the smallest fleet that this module names; requests that come in
bursts, that wait already, and that come while a new replica starts are a part of what is asked.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil, inf, sqrt
from typing import Protocol

from router.core.demand import Demand, Meter, Work
from router.core.step_model import StepModel

# What comes is told by the last SLOW_S; by the last FAST_S where more came in these than chance explains:
# so many standard deviations of a Poisson process. In the twin a fleet that goes by 60 s does more of its
# coming and going for nothing, one that goes by 140 s is late.
SLOW_S, FAST_S, SURGE = 100.0, 10.0, 3.0
# While it surges replicas may be so busy: most surges are over before another replica has started.
SURGE_BUSY = 0.8
# A line that is still there when all replicas that were asked for have started is to be gone in such a time.
DRAIN_S = 30.0
# To shrink, a smaller fleet must have some room to spare; else it would grow again at once. In the twin a
# fleet that shrinks without takes 7 % more GPU time for the same attainment: caches are lost for nothing.
SPARE = 0.85
# Streams may fill so much of the KV cache; above it engines begin to preempt.
FULL = 0.9
# Of more time than this to come nothing is foreseen.
MOST_AHEAD_S = 60.0


class Bounds(Protocol):
    """What the operator wants. Replicas, seconds, and a share of time."""

    @property
    def min(self) -> int:
        """No fewer."""

    @property
    def max(self) -> int:
        """No more."""

    @property
    def busy(self) -> float:
        """For how much of its time a replica may prefill."""

    @property
    def settle_s(self) -> float:
        """So long a smaller fleet has to be enough before it shrinks, however fast replicas start."""

    @property
    def idle_s(self) -> float:
        """After so long without requests the last replica goes, if `min` is 0."""


@dataclass(frozen=True, slots=True)
class Ability:
    """What one replica can do: its step times, and how many tokens its KV cache holds."""

    steps: StepModel
    kv_tokens: float = inf


@dataclass(frozen=True, slots=True)
class Supply:
    """What there is. `target`: replicas asked for before; `ready`: of these, those that serve. `ability`: of
    a typical one. `startup_s`: what a replica took to start. `whole`: every router was heard."""

    target: int
    ready: int
    ability: Ability
    startup_s: float
    whole: bool = True


@dataclass(frozen=True, slots=True)
class Decision:
    """How many replicas there are to be, and why. `needed`: before hysteresis and bounds."""

    at: float
    target: int
    before: int
    needed: int
    reason: str
    demand: Demand


class Autoscaler:
    """Decides for one model. `tpot_s`: how often its streams are to get a token."""

    def __init__(self, bounds: Bounds, now: float, tpot_s: float = inf) -> None:
        self._bounds = bounds
        self._tpot_s = tpot_s
        self._meter = Meter(now)
        self._began = self._busy_at = now
        self._gone_at = -inf  # when there last was no replica and nobody who asked for one
        self._needs: deque[tuple[float, int]] = deque()

    def decide(self, now: float, works: Mapping[str, Work], supply: Supply) -> Decision:
        """To be asked every second or so, with the work of every router by its name."""
        self._meter.observe(now, works)
        per_token_s = supply.ability.steps.prefill_s(1)
        demand = self._foreseen(now, supply, per_token_s)
        if not demand.idle:
            self._busy_at = now
        elif not supply.target:
            self._gone_at = now
        needed, why = self._needed(demand, supply)
        settled = self._settled(now, needed, demand, supply)
        target, reason = self._chosen(now, needed, why, settled, supply)
        return Decision(now, target, supply.target, needed, reason, demand)

    # -- what is asked

    def _foreseen(self, now: float, supply: Supply, per_token_s: float) -> Demand:
        """What will be asked when a replica that is asked for now has started. What came before all were gone
        says nothing of it."""
        slow_s = min(SLOW_S, max(FAST_S, now - self._gone_at))
        slow = self._meter.demand(slow_s, s_per_token=per_token_s)
        fast = self._meter.demand(FAST_S, s_per_token=per_token_s)
        if fast.idle:
            return fast
        expected = slow.requests * FAST_S
        if fast.requests * FAST_S > expected + SURGE * sqrt(expected) + 1:
            return _times(fast, min(1.0, self._bounds.busy / SURGE_BUSY))
        growth = self._growth(slow, per_token_s) if slow_s == SLOW_S else 0.0
        # An average is what was half its time ago.
        return _times(slow, 1 + growth * (SLOW_S / 2 + min(MOST_AHEAD_S, supply.startup_s)))

    def _growth(self, slow: Demand, per_token_s: float) -> float:
        """How much of what comes now was added each second; no less than nothing."""
        if self._meter.remembers_s() < 2 * SLOW_S or not slow.prefill_s:
            return 0.0
        before = self._meter.demand(SLOW_S, before_s=SLOW_S, s_per_token=per_token_s)
        return max(0.0, 1 - before.prefill_s / slow.prefill_s) / SLOW_S

    # -- what that takes

    def _needed(self, demand: Demand, supply: Supply, spare: float = 1.0) -> tuple[int, str]:
        """The fewest replicas for this, and what asks for as many."""
        least = 1 if not demand.idle else 0
        found = [(least, "requests" if least else "nothing")]
        found.append((ceil(demand.prefill_s / (self._bounds.busy * spare)), "prefill"))
        found.append((self._for_streams(demand, supply.ability, max(found)[0]), "streams"))
        found.append((self._for_line(demand, supply), "the line"))
        return max(found, key=lambda each: each[0])

    def _for_streams(self, demand: Demand, ability: Ability, least: int) -> int:
        """So many that their streams get tokens in time and fit into their KV caches."""
        replicas = max(1, least) if demand.output else 0
        while replicas and replicas < self._bounds.max and not self._keep_pace(demand, ability, replicas):
            replicas += 1
        return replicas

    def _keep_pace(self, demand: Demand, ability: Ability, replicas: int) -> bool:
        """Streams at a replica last as long as its steps, and its steps as there are streams: n streams with
        c tokens behind each take a + k n each step, of a share of time that prefill leaves over."""
        left = 1 - demand.prefill_s / replicas
        alone = ability.steps.step_s(0, 0)
        each = (ability.steps.step_s(1000, round(1000 * demand.context)) - alone) / 1000
        rate = demand.output / replicas
        if left <= rate * each:
            return False
        streams = rate * alone / (left - rate * each)
        pace_s = (alone + each * streams) / left
        in_time = pace_s <= self._tpot_s or alone + each >= self._tpot_s  # no fleet makes an engine faster
        return in_time and streams * demand.context <= FULL * ability.kv_tokens

    def _for_line(self, demand: Demand, supply: Supply) -> int:
        """So many that those who still wait when replicas asked for have started are gone DRAIN_S later."""
        left_s = demand.waiting_s + (demand.prefill_s - supply.target) * supply.startup_s
        return ceil(demand.prefill_s + left_s / DRAIN_S) if demand.waiting and left_s > 0 else 0

    # -- what is done about it

    def _settled(self, now: float, needed: int, demand: Demand, supply: Supply) -> int:
        """How many would have been enough all the time for long enough."""
        spared = max(needed, self._needed(demand, supply, SPARE)[0])
        self._needs.append((now, spared))
        while self._needs[0][0] < now - self._settle_s(supply):
            self._needs.popleft()
        return max(need for _, need in self._needs)

    def _settle_s(self, supply: Supply) -> float:
        return max(self._bounds.settle_s, supply.startup_s)

    def _chosen(self, now: float, needed: int, why: str, settled: int, supply: Supply) -> tuple[int, str]:
        least, most, target = self._bounds.min, self._bounds.max, supply.target
        if target < least or target > most:
            return min(most, max(least, target)), "bounds"
        if needed > target:
            return min(most, needed), why if needed <= most else f"{why}, as many as may be"
        if settled >= target:
            return target, "enough"
        if not supply.whole or now - self._began < self._settle_s(supply):
            return target, "not all is known"
        if settled == 0 and now - self._busy_at < self._bounds.idle_s:
            settled = 1
        return min(target, max(least, settled)), "fewer are enough" if settled < target else "enough"


def _times(demand: Demand, times: float) -> Demand:
    """The same with so many times of all that comes."""
    return replace(
        demand,
        requests=demand.requests * times,
        prefill_s=demand.prefill_s * times,
        output=demand.output * times,
    )
