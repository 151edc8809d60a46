"""How many replicas are needed: by tables of demand, and by what must hold whatever is asked."""

from __future__ import annotations

from dataclasses import dataclass
from math import inf

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.autoscale import FAST_S, Ability, Autoscaler, Decision, Supply
from router.core.demand import Counts, Work
from router.core.step_model import GPU, StepModel

ABILITY = Ability(StepModel(GPU), kv_tokens=400_000)
PER_TOKEN_S = ABILITY.steps.prefill_s(1)
STARTUP_S = 20.0


@dataclass(frozen=True)
class Within:
    """What an operator wants."""

    min: int = 1
    max: int = 16
    busy: float = 0.7
    settle_s: float = 60.0
    idle_s: float = 120.0


class Fleet:
    """A fleet whose replicas start after STARTUP_S, second by second, and what is asked of it."""

    def __init__(self, within: Within, replicas: int, tpot_s: float = inf) -> None:
        self.now, self.target, self.whole = 0.0, replicas, True
        self.work = Work()
        self.scaler = Autoscaler(within, 0.0, tpot_s)
        self.decisions: list[Decision] = []

    def goes_on(self, seconds: int, rate: float = 0.0, tokens: int = 0, output: int = 100, waiting: int = 0):
        """For so long, `rate` requests come each second, of so many uncached and output tokens; no chance."""
        for _ in range(seconds):
            self.now += 1
            now = Counts(rate, rate * tokens, rate * tokens, rate * tokens * PER_TOKEN_S, rate, rate * output)
            counts = self.work.counts.plus(now)
            self.work = Work(counts, waiting, waiting * tokens, round(rate), decoding=1, context=1000)
            supply = Supply(self.target, self.target, ABILITY, STARTUP_S, self.whole)
            decision = self.scaler.decide(self.now, {"router": self.work}, supply)
            self.decisions.append(decision)
            self.target = decision.target
        return self

    @property
    def last(self) -> Decision:
        return self.decisions[-1]


# 33 us a token: 10 requests of 7,000 tokens a second keep 2.3 replicas prefilling.
BUSY = {"rate": 10, "tokens": 7_000}


@pytest.mark.parametrize(
    ("asked", "tpot_s", "target", "reason"),
    [
        ({"rate": 10, "tokens": 7_000}, inf, 4, "prefill"),
        ({"rate": 1, "tokens": 10}, inf, 1, "enough"),
        ({"rate": 40, "tokens": 100, "output": 300}, 0.012, 3, "streams"),
        ({"rate": 200, "tokens": 7_000}, inf, 16, "prefill, as many as may be"),
        ({"rate": 1, "tokens": 10}, 0.005, 1, "enough"),  # no fleet makes a step of 6 ms shorter
    ],
)
def test_as_many_as_what_comes_takes(asked, tpot_s, target, reason):
    fleet = Fleet(Within(), 1, tpot_s).goes_on(100, **asked)
    assert fleet.target == target
    assert reason in {decision.reason for decision in fleet.decisions}


def test_a_line_is_worked_off_by_more_than_what_comes_takes():
    steady = Fleet(Within(), 4).goes_on(100, **BUSY).target
    assert Fleet(Within(), 4).goes_on(100, **BUSY, waiting=1_000).target > steady


def test_a_surge_is_answered_within_seconds():
    fleet = Fleet(Within(), 4).goes_on(200, **BUSY).goes_on(12, rate=30, tokens=7_000)
    assert fleet.target == 9  # 30 requests a second keep 7 replicas prefilling


def test_growth_is_foreseen():
    growing = Fleet(Within(), 1)
    for second in range(300):
        growing.goes_on(1, rate=second / 15, tokens=7_000)
    flat = Fleet(Within(), 1).goes_on(300, rate=270 / 15, tokens=7_000)  # as much as in its last minute
    assert growing.target > flat.target


def test_a_smaller_fleet_must_have_been_enough_for_a_while():
    fleet = Fleet(Within(), 4).goes_on(200, **BUSY)
    before = fleet.now
    fleet.goes_on(300, rate=2, tokens=7_000)
    shrunk = next(decision for decision in fleet.decisions if decision.target < 4)
    assert shrunk.reason == "fewer are enough" and shrunk.at >= before + Within.settle_s
    assert fleet.target == 1


def test_demand_at_a_limit_does_not_make_the_fleet_swing():
    fleet = Fleet(Within(), 4).goes_on(200, **BUSY)
    for second in range(600):
        fleet.goes_on(1, rate=12 if second % 40 < 20 else 10, tokens=7_000)
    changes = {decision.target for decision in fleet.decisions[260:]}
    assert len(changes) == 1


def test_to_nothing_when_nobody_asks_and_back_with_the_first_request():
    within = Within(min=0)
    fleet = Fleet(within, 2).goes_on(60, rate=1, tokens=10).goes_on(round(within.idle_s))
    assert fleet.target == 1
    assert fleet.goes_on(round(FAST_S) + 1).target == 0
    assert fleet.goes_on(100).target == 0
    assert fleet.goes_on(1, waiting=1).target == 1


def test_the_first_request_after_nothing_is_one_request_whatever_came_before():
    within = Within(min=0, settle_s=5, idle_s=5)
    fleet = Fleet(within, 4).goes_on(300, **BUSY).goes_on(40)
    assert fleet.target == 0
    assert fleet.goes_on(1, rate=1, tokens=700).goes_on(30).last.target <= 1
    assert fleet.goes_on(20).goes_on(30, **BUSY).target == 4  # and of many it is as many as ever


def test_growth_out_of_nearly_nothing_is_no_more_than_what_came_lately():
    fleet = Fleet(Within(max=100), 1).goes_on(300, rate=1, tokens=10).goes_on(100, rate=10, tokens=7_000)
    assert max(decision.target for decision in fleet.decisions) <= 1.7 * 4  # half a window and a start on


def test_with_routers_missing_it_grows_but_does_not_shrink():
    fleet = Fleet(Within(min=0), 4).goes_on(200, **BUSY)
    fleet.whole = False
    assert fleet.goes_on(400).target == 4
    assert fleet.last.reason == "not all is known"
    assert fleet.goes_on(60, rate=30, tokens=7_000).target > 4
    fleet.whole = True
    assert fleet.goes_on(400).target == 0


def test_who_has_just_begun_to_look_does_not_shrink():
    assert Fleet(Within(), 5).goes_on(58).target == 5


def test_a_router_that_begins_anew_takes_nothing_away():
    scaler = Autoscaler(Within(), 0.0)
    supply = Supply(1, 1, ABILITY, STARTUP_S)
    many = Work(Counts(1_000, 7_000_000, 7_000_000, 7_000_000 * PER_TOKEN_S))
    for second in range(60):
        decision = scaler.decide(float(second), {"old": many}, supply)
    assert decision.demand.requests == 0
    decision = scaler.decide(61.0, {"new": Work(Counts(5))}, supply)
    assert decision.demand.requests == 0


asked = st.fixed_dictionaries(
    {
        "seconds": st.integers(1, 90),
        "rate": st.sampled_from([0, 1, 5, 20, 100]),
        "tokens": st.sampled_from([1, 500, 20_000]),
        "waiting": st.sampled_from([0, 0, 50]),
    }
)


@given(st.lists(asked, min_size=1, max_size=6), st.integers(0, 3), st.integers(3, 12), st.integers(0, 20))
def test_whatever_is_asked_bounds_hold_and_each_decision_says_why(course, least, most, replicas):
    fleet = Fleet(Within(least, most), replicas, tpot_s=0.05)
    for part in course:
        fleet.goes_on(**part)
    for decision in fleet.decisions:
        assert least <= decision.target <= most
        assert decision.reason
    changes = [d for d in fleet.decisions[1:] if d.target < d.before]
    assert all(d.reason == "fewer are enough" for d in changes)
