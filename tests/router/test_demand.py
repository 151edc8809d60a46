"""What is asked, as rates: counts of several routers added up, whoever comes and goes."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.demand import LOOK_BACK_S, UNTOLD_OUTPUT, Counts, Meter, Work, work
from router.core.fleet import Fleet, Replica
from router.core.startups import StartUps


def steady(rate: int, second: int) -> Work:
    """Of a router that has gone on like this for so long."""
    each = Counts(came=1, tokens=100, went=100, prefill_s=0.2, ended=1, output=50)
    counts = Counts._make(part * rate * second for part in each)
    return Work(counts, waiting=2, waiting_tokens=300, in_flight=4)


def test_rates_are_those_of_all_routers_together():
    meter = Meter(0.0)
    for second in range(1, 61):
        meter.observe(second, {"a": steady(1, second), "b": steady(3, second)})
    demand = meter.demand(30.0)
    assert demand.requests == pytest.approx(4)
    assert demand.prefill_s == pytest.approx(4 * 0.2)
    assert demand.output == pytest.approx(4 * 50)
    assert (demand.waiting, demand.in_flight) == (4, 8)
    assert demand.waiting_s == pytest.approx(600 * 0.2 / 100)


def test_before_anything_went_or_ended_there_are_assumptions():
    meter = Meter(0.0)
    meter.observe(10.0, {"a": Work(Counts())})
    meter.observe(20.0, {"a": Work(Counts(came=10, tokens=1_000), waiting=10, waiting_tokens=1_000)})
    demand = meter.demand(10.0, s_per_token=0.01)
    assert (demand.requests, demand.prefill_s, demand.waiting_s) == (1.0, pytest.approx(1.0), 10.0)
    assert demand.output == UNTOLD_OUTPUT


def test_what_a_window_saw_before_is_told_apart():
    meter = Meter(0.0)
    for second in range(1, 101):
        meter.observe(second, {"a": steady(1, min(second, 50))})
    assert meter.demand(40.0).requests == 0
    assert meter.demand(40.0, before_s=50.0).requests == pytest.approx(1)


events = st.lists(
    st.tuples(st.sampled_from("abc"), st.booleans(), st.integers(0, 5)), min_size=1, max_size=300
)


@given(events)
def test_routers_that_come_go_and_begin_anew_never_make_demand_negative_or_grow_beyond_what_came(course):
    meter, works, came = Meter(0.0), {}, 0
    for second, (name, gone, more) in enumerate(course, start=1):
        if gone:
            works.pop(name, None)
        else:
            counts = works.get(name, Work()).counts
            came += more
            works[name] = Work(counts.plus(Counts(came=more, tokens=more)))
        meter.observe(float(second), works)
        demand = meter.demand(60.0)
        assert 0 <= demand.requests * min(60.0, second) <= came + 1e-6
        assert meter.remembers_s() <= LOOK_BACK_S + 1


def test_the_work_of_a_router_outlives_its_replicas():
    fleet = Fleet()
    for name in ("a", "b"):
        fleet.joined(Replica(name, "", ("m",)), now=0.0)
        flight = fleet.started(name, 1.0)
        assert work(fleet, "m", []).in_flight == 1
        fleet.first_token(flight, 1.1)
        fleet.finished(flight, 2.0, output_tokens=7)
        fleet.left(name)
    counts = work(fleet, "m", []).counts
    assert (counts.ended, counts.output) == (2, 14)


@pytest.mark.parametrize(
    ("looks", "seconds"),
    [
        ([(0, "", 0)], 60.0),
        ([(0, "", 0), (1, "", 5), (1, "a", 25)], 20.0),
        ([(1, "a", 0), (3, "a", 10), (3, "ab", 30), (3, "abc", 50)], 30.0),  # 20 and 40
        ([(2, "", 0), (2, "ab", 1)], 60.0),  # asked for by another
        ([(3, "ab", 0), (4, "abc", 1), (4, "abcd", 21)], 20.0),  # one that was, and one of ours
        ([(2, "ab", 0), (2, "a", 10), (2, "ab", 90)], 60.0),  # one was away
        ([(2, "ab", 0), (2, "a", 10), (2, "ac", 40)], 30.0),  # one died and was replaced
        ([(0, "", 0), (2, "", 5), (1, "", 10), (1, "a", 15), (2, "a", 20), (2, "ab", 27)], 8.5),  # called off
    ],
)
def test_a_start_takes_as_long_as_starts_took(looks, seconds):
    startups = StartUps(60.0)
    for target, serving, now in looks:
        startups.look(target, set(serving), now)
    assert startups.seconds == seconds
