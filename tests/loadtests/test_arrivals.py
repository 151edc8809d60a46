"""When sessions begin."""

from __future__ import annotations

from itertools import islice, pairwise, takewhile
from math import inf
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loadtests.arrivals import CONSTANT, POISSON, moments, paced, traced
from loadtests.trace import Arrival, TraceError, write


def until(end, came):
    return list(takewhile(lambda at: at < end, came))


def test_constant_arrivals_are_evenly_spaced():
    assert list(islice(moments(CONSTANT, [(inf, 4)], ""), 4)) == [0.25, 0.5, 0.75, 1.0]


def test_poisson_arrivals_are_as_many_and_as_uneven_as_that():
    came = until(2000, moments(POISSON, [(inf, 5)], "a"))
    assert len(came) == pytest.approx(10_000, rel=0.04)
    gaps = [later - earlier for earlier, later in pairwise(came)]
    # Of exponential gaps a share of 1/e is longer than the mean.
    assert sum(gap > 0.2 for gap in gaps) / len(gaps) == pytest.approx(0.368, abs=0.02)
    assert came[:50] == list(islice(moments(POISSON, [(inf, 5)], "a"), 50))
    assert came[:50] != list(islice(moments(POISSON, [(inf, 5)], "b"), 50))


pieces = st.lists(st.tuples(st.floats(0.1, 50), st.floats(0.1, 50)), min_size=1, max_size=4)


@given(pieces)
def test_each_piece_of_time_has_its_rate(parts):
    came = until(sum(seconds for seconds, _ in parts), moments(CONSTANT, [*parts, (inf, 1)], ""))
    begin = expected = 0.0
    for seconds, rate in parts:
        expected += seconds * rate
        begin += seconds
        assert sum(at < begin for at in came) == pytest.approx(expected, abs=1.001)


@given(st.lists(st.floats(0.001, 10), min_size=2, max_size=20), pieces)
def test_moments_are_in_order(gaps, parts):
    came = list(islice(paced(iter([*gaps, inf]), [*parts, (inf, 1)]), len(gaps)))
    assert came == sorted(came)
    assert len(came) == len(gaps)


def test_a_traces_moments_are_spread_over_what_they_were_rounded_to(tmp_path: Path):
    write(tmp_path / "trace.jsonl", [Arrival(3.0 * (n // 4), 10, 1, [n]) for n in range(40)])
    requests = traced(tmp_path / "trace.jsonl", "seed")
    assert len({arrival.at for arrival in requests}) == 40
    assert requests == traced(tmp_path / "trace.jsonl", "seed")
    with pytest.raises(TraceError):
        traced(tmp_path / "none.jsonl", "seed")
