"""A fleet in the twin that grows and shrinks: nothing is lost, and who comes and goes is treated as such."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loadtests.elastic import Changes, Elastic, Scaler, run
from loadtests.trace import BLOCK_TOKENS, Arrival
from loadtests.twin import Lined, Setting, core_policy, simulate
from router.core.autoscale import Supply
from router.core.demand import Work
from router.core.placement import kv_aware
from router.line import AdmissionConfig
from router.slo import Slo
from workers.simulated.core import EngineConfig
from workers.simulated.step_time import PRESETS

ENGINE = EngineConfig(PRESETS["8b-h100"].step_time, num_gpu_blocks=301, block_size=BLOCK_TOKENS)
SETTING = Setting(ENGINE, replicas=3, slo=Slo())
POLICY = Lined(core_policy(kv_aware), AdmissionConfig(max_wait_s=1e6))


def conversations(count: int, gap: float, seed: int = 1) -> list[Arrival]:
    """Requests of 20 conversations, each a block longer than the one before it."""
    chance = Random(seed)
    courses = [[n * 1000] for n in range(20)]
    found = []
    for number in range(count):
        ids = chance.choice(courses)
        ids.append(ids[-1] + 1)
        at = number * gap * (0.5 + chance.random())
        found.append(Arrival(at, len(ids) * BLOCK_TOKENS - 7, chance.randint(1, 200), list(ids)))
    return sorted(found, key=lambda arrival: arrival.at)


def always(target: int) -> Scaler:
    return lambda now, works, supply: target


def then(first: int, at: float, second: int) -> Scaler:
    return lambda now, works, supply: first if now < at else second


def test_a_fleet_that_stays_as_it_is_does_what_the_twin_does():
    trace = conversations(80, 0.1)
    twin = Elastic(SETTING, POLICY, 7, always(3), ends=20.0)
    assert run(twin, trace) == simulate(trace, SETTING, POLICY, 7)
    assert sum(life.cost_s(5.0, 20.0) for life in twin.lives.values()) == 3 * 15.0


@settings(max_examples=8, deadline=None)
@given(st.lists(st.integers(0, 5), min_size=3, max_size=8), st.floats(0, 9), st.booleans(), st.integers(1, 2))
def test_whatever_a_scaler_wants_requests_are_served_by_replicas_that_may(targets, startup, warm, routers):
    trace = conversations(40, 0.5)
    replay_s = 1.0 if warm else 0.0
    twin = Elastic(
        replace(SETTING, routers=routers),
        POLICY,
        0,
        lambda now, works, supply: targets[int(now / 4)] if now < 4 * len(targets) else 1,
        ends=60.0,
        changes=Changes(startup, replay_s, replay_s),
    )
    outcomes = run(twin, trace).outcomes
    assert [outcome.arrival for outcome in outcomes] == trace
    assert all(outcome.ttft > 0 and not outcome.refused for outcome in outcomes)
    for at, outcome in twin.placed:
        life = twin.lives[outcome.replica]
        assert life.asked_at == 0 or life.asked_at + startup <= at
        assert life.left_at is None or at <= life.left_at
    for life in twin.lives.values():
        assert (life.stopped_at is None) == (life.left_at is None)
        assert life.stopped_at is None or life.stopped_at >= life.left_at


def test_who_comes_to_an_empty_fleet_waits_until_one_has_started():
    twin = Elastic(replace(SETTING, replicas=0), POLICY, 0, wakes, 100.0, Changes(startup_s=30.0))
    (outcome,) = run(twin, [Arrival(5.0, 3000, 5, list(range(6)))]).outcomes
    assert 30.0 < outcome.ttft < 32.0


def wakes(now: float, works: Mapping[str, Work], supply: Supply) -> int:
    return max(supply.target, sum(work.waiting for work in works.values()))


def test_the_newest_leaves_and_stops_when_its_streams_have_ended():
    twin = Elastic(SETTING, POLICY, 0, then(3, 3.0, 2), 60.0)
    outcomes = run(twin, [Arrival(n / 10, 600, 1000, [n, n]) for n in range(30)]).outcomes
    assert [life.left_at for life in twin.lives.values()] == [None, None, 3.0]
    last = max(o.arrival.at + o.ttft + 999 * o.tpot for o in outcomes if o.replica == "replica-2")
    assert twin.lives["replica-2"].stopped_at == pytest.approx(last)


def test_a_newcomer_that_was_warmed_finds_prompts_in_its_cache():
    trace = conversations(200, 0.2)

    def hits(warm_s: float) -> int:
        twin = Elastic(SETTING, POLICY, 0, then(3, 10.0, 5), 60.0, Changes(1.0, warm_s))
        run(twin, trace)
        new = [o for _, o in twin.placed if o.replica in ("replica-3", "replica-4")]
        return sum(o.reported for o in new[:10])

    assert hits(5.0) > 2 * hits(0.0)


def test_one_that_leaves_hands_over_what_only_it_had():
    """The first request keeps one replica busy, so the second goes to the other, which leaves."""
    long, short = list(range(12)), [99, 98]
    trace = [Arrival(0.0, 900, 99, short), Arrival(0.01, 6000, 5, long), Arrival(9.0, 6000, 5, long)]

    def hit(handover_s: float) -> int:
        changes = Changes(handover_s=handover_s)
        twin = Elastic(replace(SETTING, replicas=2), POLICY, 0, then(2, 3.0, 1), 60.0, changes)
        outcomes = run(twin, trace).outcomes
        assert [outcome.replica[-1] for outcome in outcomes] == ["0", "1", "0"]
        return outcomes[2].reported

    assert (hit(0.0), hit(5.0)) == (0, 11 * BLOCK_TOKENS)
