"""`herd loadtest` as an operator runs it, against a router and simulated engines."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from support import HERD, ROOT, Server, processes, router, simulated_engine

from loadtests.figures import Figures, Times, checks
from loadtests.scenarios import SCENARIOS
from loadtests.scenarios.session import Slo
from loadtests.trace import Arrival, write
from router.cli import main
from router.keys import hash_of

# Thresholds that only a machine that stands still breaks.
EASY = ("--max-ttft-p99-ms", "60000", "--max-tpot-p99-ms", "60000")


@dataclass(frozen=True, slots=True)
class Run:
    """How a load test ended: its exit code, what it printed for programs, and its lines."""

    code: int
    told: dict[str, Any]
    lines: str

    @property
    def figures(self) -> dict[str, Any]:
        return self.told["figures"]["all"]


def loadtest(where: Path, server: Server, scenario: str, *options: str, **env: str) -> Run:
    """`herd loadtest --json` in a folder that is not the project's."""
    easy = EASY if scenario != "batch" else ()
    argv = [*HERD, "loadtest", scenario, "--host", server.url, "--json", *easy, *options]
    done = subprocess.run(
        argv, cwd=where, env={**os.environ, "PYTHONPATH": str(ROOT), **env}, capture_output=True, timeout=90
    )
    assert done.stdout, done.stderr.decode()
    return Run(done.returncode, json.loads(done.stdout), done.stderr.decode())


def report_rows(page: Path) -> set[str]:
    """The kinds of rows in a report of Locust's."""
    return set(re.findall(r'"method": "(\w+)"', page.read_text()))


def failed(run: Run) -> list[str]:
    return [check["name"] for check in run.told["checks"] if not check["passed"]]


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    """One of which each token takes 30 ms."""
    with processes(tmp_path_factory.mktemp("engine")) as start:
        yield simulated_engine(start, "--step-time", "0.03,0,0,0")


@pytest.fixture(scope="module")
def front(tmp_path_factory, engine):
    """A router in front of it."""
    with processes(tmp_path_factory.mktemp("router")) as start:
        yield router(start, engine)


def test_a_flash_crowd_passes_and_is_reported(front, tmp_path):
    options = ("--rate", "8", "--duration", "3", "--output-tokens", "8")
    crowd = loadtest(tmp_path, front, "flash_crowd", *options)
    assert crowd.code == 0, crowd
    assert crowd.figures["failures"] == 0
    # 8 a second with three times as many in the middle third: 40 on average.
    assert 20 < crowd.figures["requests"] < 65
    assert crowd.figures["cached_share"] > 0.5
    assert report_rows(tmp_path / "herd-loadtest-flash_crowd.html") >= {"POST", "TTFT", "TPOT", "LATE"}


def test_agents_that_wait_too_long_fail(front, tmp_path):
    options = ("--users", "4", "--duration", "3", "--turns", "4", "--tool-time", "0.1")
    strict = ("--output-tokens", "4", "--max-ttft-p99-ms", "0.01", "--html", "agents/report.html")
    agents = loadtest(tmp_path, front, "agent", *options, *strict)
    assert agents.code == 1
    assert failed(agents) == ["TTFT p99, ms"]
    assert agents.figures["failures"] == 0
    assert agents.figures["cached_share"] > 0.5
    assert agents.figures["output_tokens"] > agents.figures["requests"] > 15
    assert agents.figures["late_ms"]["p99"] is None
    assert report_rows(tmp_path / "agents" / "report.html") >= {"POST", "TTFT", "TPOT"}


def test_arrivals_wait_for_nobody_and_what_does_not_come_fails(front, tmp_path):
    """An answer takes seconds: in a closed loop one user would ask once."""
    options = ("--rate", "10", "--arrivals", "constant", "--duration", "2", "--drain", "1")
    run = loadtest(tmp_path, front, "rag", *options, "--output-tokens", "500")
    assert run.code == 1
    assert run.figures["requests"] >= 15
    assert run.figures["failures"] >= 8
    assert {reason["reason"] for reason in run.told["failures"]} == {"not answered when the run was over"}
    assert run.figures["late_ms"]["p50"] is not None
    assert failed(run) == ["share of requests that failed"]


def test_a_batch_gets_whole_answers(front, tmp_path):
    run = loadtest(tmp_path, front, "batch", "--users", "8", "--duration", "1", "--output-tokens", "16")
    assert run.code == 0, run
    assert run.figures["output_tokens"] > 8 * run.figures["requests"] > 0
    assert run.figures["ttft_ms"]["p99"] is None


def test_a_trace_is_replayed_to_its_end(front, tmp_path):
    write(tmp_path / "trace.jsonl", [Arrival(n / 10, 1024, 64, [1, 2 + n]) for n in range(20)])
    trace = ("--trace", "trace.jsonl", "--speed", "2", "--shrink", "8")
    run = loadtest(tmp_path, front, "trace", *trace, "--duration", "60")
    assert run.code == 0, run
    assert run.figures["requests"] == 20
    assert run.figures["output_tokens"] == 20 * 8
    # One block of two is the same in all.
    assert 0.3 < run.figures["cached_share"] < 0.6


def test_tenants_ask_with_their_keys(start, engine, tmp_path):
    file = tmp_path / "tenants.json"
    tenants = {name: {"keys": [hash_of(f"key-{name}")]} for name in ("quiet", "noisy")}
    file.write_text(json.dumps({"secret": "0" * 64, "tenants": tenants}))
    front = router(start, engine, flags=("--api-keys-file", str(file)))
    keys = ("--keys", "quiet=key-quiet,noisy=key-noisy", "--model", "herd-demo")
    run = loadtest(tmp_path, front, "tenants", "--duration", "2", *keys, HERD_API_KEY="nobody else")
    figures = run.told["figures"]
    # Only the nightly one is refused; the thresholds are about the quiet one.
    assert run.code == 0, run
    assert figures["quiet"]["failures"] == figures["noisy"]["failures"] == 0
    assert figures["nightly"]["failures"] == figures["nightly"]["requests"] > 0
    assert figures["noisy"]["requests"] > figures["quiet"]["requests"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nothing"], "No such command 'nothing'"),
        (["chat", "--arrivals", "poisson"], "--arrivals poisson needs --rate"),
        (["chat", "--arrivals", "trace"], "--arrivals trace needs --trace FILE"),
        (["chat", "--trace", __file__], "--trace needs --arrivals trace"),
        (["chat", "--rate", "3", "--users", "2"], "Give one of both"),
        (["chat", "--turns", "0"], "turns must be at least 1"),
        (["flash_crowd", "--users", "2"], "No such option '--users'"),
        (["trace"], "--trace FILE"),
        (["chat", "--max-failures", "2"], "--max-failures"),
        (["batch", "--max-ttft-p99-ms", "9"], "No such option '--max-ttft-p99-ms'"),
    ],
)
def test_what_makes_no_sense_is_refused(arguments, says):
    result = CliRunner().invoke(main, ["loadtest", *arguments])
    assert result.exit_code == 2
    assert says in result.output


def test_scenarios_and_their_settings_are_listed():
    listing = CliRunner().invoke(main, ["loadtest"])
    assert listing.exit_code == 0
    for scenario in SCENARIOS:
        assert scenario.name in listing.output
        page = CliRunner().invoke(main, ["loadtest", scenario.name, "--help"])
        for setting in scenario.settings():
            assert f"--{setting.name.replace('_', '-')}" in page.output


def test_nothing_to_ask_is_no_success(tmp_path):
    nowhere = Server(None, "http://127.0.0.1:1")  # type: ignore[arg-type]
    run = loadtest(tmp_path, nowhere, "rag", "--duration", "30")
    assert run.code == 1
    assert failed(run)
    assert "no model" in run.told["failures"][0]["reason"]


def test_listing_loads_no_locust():
    """It would make this process's sockets its own."""
    program = "import sys, router.cli, loadtests.loadtest; sys.exit('locust' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)


@pytest.mark.parametrize(
    ("figures", "slo", "verdicts"),
    [
        (Figures(10, 0, 1.0, ttft_ms=Times(1, 2, 3), tpot_ms=Times(1, 1, 1)), Slo(3, 1), [True, True, True]),
        (Figures(10, 1, 1.0, ttft_ms=Times(1, 2, 3)), Slo(2.9, None), [False, False]),
        (Figures(10, 1, 1.0), Slo(None, None, failures=0.1), [True]),
        (Figures(0, 0, 0.0), Slo(None, None, failures=1.0), [False]),
        (Figures(10, 0, 1.0), Slo(100, None), [True, False]),
    ],
)
def test_what_is_not_measured_does_not_pass(figures: Figures, slo: Slo, verdicts: Sequence[bool]):
    assert [check.passed for check in checks(figures, slo)] == verdicts


def test_figures_are_reckoned_from_counts():
    figures = Figures(10, 0, 4.0, prompt_tokens=200, output_tokens=100, cached_tokens=50)
    assert figures.requests_per_second == 2.5
    assert figures.output_tokens_per_second == 25
    assert figures.cached_share == 0.25
    assert Figures(1, 0, 0.0, prompt_tokens=5).cached_share is None
