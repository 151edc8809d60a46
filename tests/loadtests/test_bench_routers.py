"""The routers benchmark from end to end, in its smallest form."""

import subprocess
import sys

from support import ROOT


def test_each_way_of_running_routers_has_its_cost() -> None:
    argv = [sys.executable, "-m", "loadtests.bench_routers", "--rounds=1", "--seconds=1"]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    rows = {row[0]: row[1:] for row in (line.strip("| ").split(" | ") for line in done.stdout.splitlines())}
    passed_on = {
        way: float(rows[way][1].split()[0]) for way in rows if way.endswith(("process", "es", "shards"))
    }
    assert passed_on.pop("two processes, two shards") > 5
    assert passed_on == {"one process": 0, "two processes": 0}
    assert float(rows["4"][0]) > 0
