"""The connections benchmark from end to end, in its smallest form."""

import subprocess
import sys

from support import ROOT

BENCH = (sys.executable, "-m", "loadtests.bench_connections")
# One of the issue's own figures, with thousands of clients; here there are hundreds, and pages are large.
MOST_KB = 20.0


def test_an_idle_client_costs_little_memory() -> None:
    done = subprocess.run(
        [*BENCH, "--connections=500", "--seconds=0.5"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    *_, row = done.stdout.strip().splitlines()
    router, count, kilobytes, _, rss = (cell.strip() for cell in row.strip("|").split("|"))
    assert (router, count) == ("herd", "500")
    assert 0 < float(kilobytes) < MOST_KB
    assert float(rss) > 10


def test_a_router_that_is_none_fails_the_benchmark() -> None:
    options = ("--connections=2", "--seconds=0.1", f"--also=none={sys.executable} -c 'print(42)'")
    done = subprocess.run([*BENCH, *options], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "none does not route requests. Its log ends:\n42" in done.stderr
