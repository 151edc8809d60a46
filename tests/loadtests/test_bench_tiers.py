"""The benchmark of cache tiers: a climb for each fleet, compared seed by seed."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

from support import ROOT

from loadtests.bench_placement import FLEET, HERD, Course
from loadtests.bench_tiers import FLEETS, GRIDS, POLICY, Result, report
from loadtests.simulate import fleet_of
from loadtests.trace import Arrival
from router.slo import Slo

TINY = Course(
    [Arrival(float(n), 5000, 50, [n % 3, *range(10 * n, 10 * n + 9)]) for n in range(100, 160)],
    grid=[1, 3, 100],
    common=3,
    setting=fleet_of(FLEET, replicas=2).setting,
    slo=Slo(),
)


def test_the_climb_ends_at_the_first_failure_with_the_run_before_it() -> None:
    assert Result.of(TINY, 0) == Result(3, TINY.run(HERD[POLICY], 0, 3))
    assert Result.of(replace(TINY, grid=[100, 3]), 0).speed == 0


def test_fleets_are_compared_seed_by_seed() -> None:
    summary = TINY.run(HERD[POLICY], 0, 3)
    none, tier = ([Result(speed, summary) for speed in speeds] for speeds in ([2.0, 2.5], [3.0, 3.0]))
    rows = report({"none": none, "5x": tier}).splitlines()[2:]
    assert [row.strip("| ").split(" | ")[:3] for row in rows] == [
        ["none", "2.25 (2.00..2.50)", "1.00 (1.00..1.00)"],
        ["5x", "3.00 (3.00..3.00)", "1.35 (1.20..1.50)"],
    ]


def test_only_the_tier_tells_the_fleets_apart() -> None:
    none, tier = (fleet_of(path).setting for path in FLEETS.values())
    assert tier == replace(none, engine=replace(none.engine, num_cpu_blocks=tier.engine.num_cpu_blocks))
    assert all(grids.keys() == FLEETS.keys() for grids in GRIDS.values())


def test_the_command_prints_a_row_for_each_fleet() -> None:
    argv = [sys.executable, "-m", "loadtests.bench_tiers", "--quick", "--trace", "synthetic"]
    said = subprocess.check_output(argv, cwd=ROOT, text=True, timeout=120)
    assert [row.split(" | ")[0] for row in said.splitlines()[2:]] == ["| none", "| 5x"]
