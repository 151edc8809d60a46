"""The overload benchmark: a trace with a burst in it, and what is told of those who came then."""

from random import Random

from loadtests.bench_overload import BEGINS_S, CAPACITY, EASE, LASTS_S, PREMIUM, TIMES, Result, burst, classed
from loadtests.bench_placement import FLEET, Course
from loadtests.simulate import fleet_of
from loadtests.trace import Arrival
from loadtests.twin import Lined, core_policy
from router.core.placement import least_requests
from router.slo import Slo

STEADY = [Arrival(n / 10, 600, 3, [n, n]) for n in range(20_000)]


def per_second(arrivals, first, last):
    return sum(first <= arrival.at < last for arrival in arrivals) / (last - first)


def test_a_part_comes_at_twice_what_the_fleet_sustains():
    arrivals = burst(STEADY)
    assert len(arrivals) == len(STEADY)
    assert [a.at for a in arrivals] == sorted(a.at for a in arrivals)
    ends = BEGINS_S + LASTS_S
    assert round(per_second(arrivals, 0, BEGINS_S)) == round(10 * EASE)
    assert round(per_second(arrivals, BEGINS_S, ends)) == round(10 * CAPACITY * TIMES)
    assert round(per_second(arrivals, ends, ends + 100)) == round(10 * EASE)


def test_some_are_premium_whoever_they_are():
    premium = [arrival for arrival in classed(STEADY, Random(0)) if arrival.priority < 0]
    assert 0.9 * PREMIUM < len(premium) / len(STEADY) < 1.1 * PREMIUM


def test_where_there_is_no_overload_all_goes_well():
    arrivals = [a for a in burst(classed(STEADY, Random(0))) if BEGINS_S - 5 < a.at < BEGINS_S + LASTS_S]
    course = Course(arrivals, [1], 1, fleet_of(FLEET).setting, Slo())
    result = Result.of(course, Lined(core_policy(least_requests)), seed=0, capacity=46.0)
    assert (round(result.goodput, 2), result.premium, result.refused) == (1.0, 1.0, 0.0)
    assert result.late < 1
