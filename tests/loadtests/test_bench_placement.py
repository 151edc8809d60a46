"""The placement benchmark: a grid that is climbed without a search, seeds, and what the table compares."""

import subprocess
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner
from support import ROOT

from loadtests.baselines import SHIPPED
from loadtests.bench_placement import (
    COURSES,
    FLEET,
    HERD,
    POLICIES,
    REFERENCES,
    Course,
    Result,
    course,
    main,
    report,
    sustainable,
)
from loadtests.simulate import fleet_of
from loadtests.trace import Arrival
from loadtests.twin import core_policy
from router.core.placement import least_requests
from router.slo import Slo

# A request a second of ten blocks, every third of them with the same first one. Two engines have half their
# time to spare at 5 times the speed, and are far behind at 100.
TINY = Course(
    [Arrival(float(n), 5000, 50, [n % 3, *range(10 * n, 10 * n + 9)]) for n in range(100, 160)],
    grid=[1, 3, 5, 100],
    common=3,
    setting=fleet_of(FLEET, replicas=2).setting,
    slo=Slo(),
)
LEAST = REFERENCES["least_requests"]


def test_the_speed_sustained_is_the_last_before_the_first_failure():
    strict = [TINY.run(LEAST, 0, speed).strict for speed in TINY.grid]
    assert strict == [True, True, True, False]
    assert TINY.sustained(LEAST, 0) == 5
    assert replace(TINY, grid=[1, 100, 3]).sustained(LEAST, 0) == 1
    assert replace(TINY, grid=[100, 1]).sustained(LEAST, 0) == 0


def test_a_seed_moves_the_arrivals_and_gives_the_same_run_again():
    assert TINY.run(LEAST, 1, 5) == TINY.run(LEAST, 1, 5)
    assert TINY.run(LEAST, 1, 5) != TINY.run(LEAST, 2, 5)


def test_a_policy_of_ones_own_is_measured_on_several_processes():
    make = core_policy(least_requests)
    assert sustainable(make, TINY, range(3)) == [TINY.sustained(make, seed) for seed in range(3)]


@pytest.mark.parametrize("name", COURSES)
def test_shipped_traces_have_a_grid_and_a_speed_in_common(name):
    whole, part = course(name), course(name, quick=True)
    assert whole.grid == sorted(set(whole.grid))
    assert whole.common in whole.grid
    assert len(part.arrivals) < len(whole.arrivals)
    assert set(part.grid) < set(whole.grid)


def results(sustained):
    common = TINY.run(LEAST, 0, 3)
    return [Result(name, speed, common) for name, speeds in sustained.items() for speed in speeds]


def rows(text):
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("|")]
    return {row[0]: row[1:] for row in cells if row[0] not in ("policy", "---")}


def test_all_are_compared_with_the_best_peer_that_ships_seed_by_seed():
    text = report(
        results({"lmetric": [3.0, 3.0], "smg": [1.0, 1.5], "dynamo": [1.0, 2.0], "kv_aware": [1.1, 2.2]}),
        TINY,
    )
    assert "by that of dynamo" in text
    assert rows(text)["kv_aware"][:2] == ["1.65 (1.10..2.20)", "1.10 (1.10..1.10)"]
    assert rows(text)["dynamo"][1] == "1.00 (1.00..1.00)"
    assert rows(text)["smg"][1] == "0.88 (0.75..1.00)"
    assert list(rows(text)) == ["kv_aware", "dynamo", "smg", "lmetric"], "references stand apart"


def test_a_table_without_peers_compares_with_nobody():
    assert rows(report(results({"lmetric": [3.0], "kv_aware": [1.1]}), TINY))["kv_aware"][1] == "-"


def test_what_sustains_nothing_is_no_measure():
    assert rows(report(results({"smg": [0.0], "kv_aware": [1.1]}), TINY))["kv_aware"][1] == "-"


def test_every_policy_has_one_name():
    assert len(POLICIES) == len(HERD) + len(SHIPPED) + len(REFERENCES)


def test_the_command_prints_the_policies_asked_for():
    asked = ["--quick", "--trace", "synthetic", "--policies", "round_robin,ray"]
    argv = [sys.executable, "-m", "loadtests.bench_placement", *asked]
    said = rows(subprocess.check_output(argv, cwd=ROOT, text=True, timeout=120))
    assert set(said) == {"round_robin", "ray"}
    assert float(said["ray"][0].split()[0]) > 0


@pytest.mark.parametrize(
    ("options", "code", "said"),
    [
        (["--policies", "dynamo,nope"], 2, "no such policy: nope"),
        (["--fleet", "none.yaml"], 1, "Error: none.yaml"),
    ],
)
def test_the_command_says_what_is_wrong(options, code, said):
    done = CliRunner().invoke(main, options)
    assert done.exit_code == code
    assert said in done.output
