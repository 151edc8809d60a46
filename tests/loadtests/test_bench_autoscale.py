"""The autoscaling benchmark: the load of a day, what is told of scalers, and of who comes and goes."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest

from loadtests import bench_autoscale as bench
from loadtests.bench_placement import course
from loadtests.elastic import Changes
from loadtests.trace import Arrival

TRACE = [Arrival(n / 10, 600, 3, [n, n]) for n in range(10_000)]


def test_a_day_has_a_low_a_peak_and_one_crowd():
    speeds = bench.shape(Random(1))
    peak = bench.PEAK * bench.PER_REPLICA
    assert len(speeds) == bench.LASTS_S
    assert min(speeds) == pytest.approx(bench.LOWEST * peak, rel=0.05)
    assert 0.95 * peak < max(speeds) <= bench.BURST_TIMES[1] * peak
    jumps = [after / before for before, after in pairwise(speeds)]
    assert sum(jump > 2.5 for jump in jumps) == 1
    assert bench.shape(Random(1)) == speeds != bench.shape(Random(2))


def test_a_trace_is_warped_to_these_speeds_and_keeps_what_prompts_share():
    speeds = [1.0] * 100 + [5.0] * 50
    arrivals = bench.warped(TRACE, speeds, Random(3))
    assert [a.at for a in arrivals] == sorted(a.at for a in arrivals)
    assert sum(a.at < 100 for a in arrivals) == pytest.approx(1000, abs=2)
    assert sum(a.at >= 100 for a in arrivals) == pytest.approx(2500, abs=2)
    twice = bench.over_and_over(TRACE[:5], 2)
    assert [a.hash_ids for a in twice[:5]] == [a.hash_ids for a in TRACE[:5]]
    assert [a.hash_ids[0] - b.hash_ids[0] for a, b in zip(twice[5:], twice[:5], strict=True)] == [5] * 5


def test_a_short_day_is_told_of(monkeypatch):
    monkeypatch.setattr(bench, "LASTS_S", 60.0)
    monkeypatch.setattr(bench, "WARM_UP_S", 10.0)
    calm = replace(course("conversation"), arrivals=[a for a in TRACE if a.at < 60])
    for name, make in bench.scalers([(4, 600, 0)], calm.slo.tpot_s).items():
        result = bench.Result.of(calm, make(), 3, 0)
        assert result.attainment == 1.0 and result.refused == 0, name
        assert result.late < 1
        assert result.gpu_s == 3 * 50 if name == "herd" else result.gpu_s > 0


def results(**rays: tuple[float, float]) -> dict[str, list[bench.Result]]:
    told = {"herd": (90.0, 0.97), **rays}
    return {name: [bench.Result(gpu_s, attained, 0.0, 0.5)] for name, (gpu_s, attained) in told.items()}


def test_the_best_of_rays_is_the_cheapest_that_is_as_good():
    told = bench.report(results(ray_a=(80.0, 0.96), ray_b=(120.0, 0.98), ray_c=(130.0, 0.99)))
    assert "ray_b **best**" in told
    assert "25.0 % fewer GPU-seconds than Ray's best, 6.9 % fewer" in told
    assert "No setting of Ray's reaches" in bench.report(results(ray_a=(80.0, 0.96)))


def test_who_comes_and_goes_is_told_of(monkeypatch):
    monkeypatch.setattr(bench, "CHANGE_S", 40.0)
    monkeypatch.setattr(bench, "MINUTE_S", 15.0)
    monkeypatch.setattr(bench, "WARM_S", (0.0, 5.0))
    monkeypatch.setattr(bench, "NEWCOMERS", (2, 3))
    whole = course("conversation")
    new, others, ratio, share, attained = (float(figure) for figure in bench.warm_row(whole, [0], 5.0)[1:])
    assert 0 < others < 1 and ratio == pytest.approx(new / others, abs=0.1)
    assert 0 < share < 3 and 0 < attained <= 1
    *_, lost = bench.leave_row(whole, [0], (3, 2), 1.0)
    assert lost == "0"


def test_the_newest_go_at_the_time(monkeypatch):
    monkeypatch.setattr(bench, "CHANGE_S", 20.0)
    monkeypatch.setattr(bench, "MINUTE_S", 5.0)
    twin = bench.changed(course("conversation"), 0, (4, 2), Changes(), load=2)
    assert [life.left_at for life in twin.lives.values()] == [None, None, 20.0, 20.0]
