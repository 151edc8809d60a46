"""Reports of other routers merged: whatever happens to them on the way, the latest whole one is the truth."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.fleet import Load
from router.core.loads import SILENT_S, Loads, Report

ONE, TWO, THREE = (Load(n, n / 2, n, 100 * n) for n in (1, 2, 3))

reports = st.lists(
    st.tuples(st.booleans(), st.dictionaries(st.sampled_from("abcd"), st.sampled_from([ONE, TWO, THREE]))),
    max_size=12,
).map(lambda told: [Report(n, whole, loads) for n, (whole, loads) in enumerate(told, start=1)])


def known(loads):
    return {replica: load for replica in "abcd" if (load := loads.at(replica)) != Load()}


@pytest.mark.parametrize(
    ("told", "left"),
    [
        ([Report(1, True, {"a": ONE})], {"a": ONE}),
        ([Report(1, True, {"a": ONE}), Report(2, False, {"b": TWO})], {"a": ONE, "b": TWO}),
        ([Report(1, True, {"a": ONE}), Report(2, True, {"b": TWO})], {"b": TWO}),
        ([Report(1, True, {"a": ONE}), Report(2, False, {"a": TWO})], {"a": TWO}),
        ([Report(2, False, {"a": TWO}), Report(1, True, {"a": ONE, "b": ONE})], {"a": TWO}),
        ([Report(1, True, {"a": ONE}), Report(1, True, {})], {"a": ONE}),
        ([Report(1, True, {"a": ONE}), Report(2, False, {"a": Load()})], {}),
    ],
)
def test_a_router_has_what_it_told_last(told, left):
    loads = Loads()
    for report in told:
        loads.take("peer", report, now=0.0)
    assert known(loads) == left


def test_routers_add_up():
    loads = Loads()
    loads.take("one", Report(1, True, {"a": ONE, "b": ONE}), now=0.0)
    loads.take("two", Report(7, True, {"b": TWO}), now=0.0)
    assert known(loads) == {"a": ONE, "b": THREE}


def test_what_may_have_changed_is_told():
    loads = Loads()
    assert loads.take("peer", Report(1, True, {"a": ONE, "b": ONE}), now=0.0) == {"a", "b"}
    assert loads.take("peer", Report(2, False, {"c": ONE}), now=0.0) == {"c"}
    assert loads.take("peer", Report(3, True, {"d": ONE}), now=0.0) == {"a", "b", "c", "d"}
    assert loads.take("peer", Report(3, True, {}), now=0.0) is None
    assert loads.take("peer", Report(2, True, {}), now=0.0) is None


def test_who_falls_silent_is_forgotten_with_its_load():
    loads = Loads()
    loads.take("killed", Report(1, True, {"a": ONE, "b": ONE}), now=0.0)
    loads.take("lives", Report(1, True, {"b": TWO}), now=0.5)
    assert loads.forget_silent(now=SILENT_S) == set()
    assert loads.forget_silent(now=SILENT_S + 0.1) == {"a", "b"}
    assert known(loads) == {"b": TWO}
    assert loads.peers.keys() == {"lives"}
    # One that was only slow is heard again, wherever it is in its count.
    loads.take("killed", Report(9, False, {"a": ONE}), now=2.0)
    assert known(loads) == {"a": ONE, "b": TWO}


@given(st.data(), reports, st.dictionaries(st.sampled_from("abcd"), st.sampled_from([ONE, TWO, THREE])))
def test_any_order_loss_and_doubling_is_healed_by_the_next_whole_report(data, told, now_there):
    arrived = data.draw(st.lists(st.sampled_from(told), max_size=24)) if told else []
    last = Report(len(told) + 1, True, now_there)
    late = data.draw(st.lists(st.sampled_from(told), max_size=5)) if told else []
    loads = Loads()
    for report in [*arrived, last, *late]:
        loads.take("peer", report, now=0.0)
    assert known(loads) == now_there


@given(reports)
def test_in_order_each_report_is_taken_as_it_says(told):
    loads, there = Loads(), {}
    for report in told:
        loads.take("peer", report, now=0.0)
        there = {**({} if report.whole else there), **report.loads}
        assert known(loads) == there
