"""The policy benchmark names every policy."""

import subprocess
import sys

from support import ROOT

from router.core.placement import POLICIES


def test_every_policy_has_a_figure_for_every_fleet() -> None:
    argv = [sys.executable, "-m", "loadtests.bench_policies", "--rounds=1"]
    said = subprocess.check_output(argv, cwd=ROOT, text=True, timeout=60)
    rows = {row[0]: row[1:] for row in (line.strip("| ").split(" | ") for line in said.splitlines())}
    for policy in POLICIES:
        assert len(rows[policy]) == 3
        assert all(float(figure) > 0 for figure in rows[policy])
