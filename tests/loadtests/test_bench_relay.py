"""The relay benchmark from end to end, in its smallest form."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from support import ROOT, Start, eventually

from loadtests import generator
from loadtests.bench_relay import NOTING
from loadtests.cpu import tree
from loadtests.mock_engine import MODEL
from router.continuation import Continuation, Leg
from router.openai_api import FAMILIES, parse
from router.prompts import read
from router.tokenizer import Prompter, Tokenizers
from router.tokenizer_config import TokenizerConfig
from workers import demo_model

BENCH = (
    sys.executable,
    "-m",
    "loadtests.bench_relay",
    "--routers=direct,herd,herd-noting",
    "--chunks=20",
    "--rounds=1",
)


def test_every_figure_is_there_and_every_stream_was_whole(tmp_path: Path) -> None:
    result = tmp_path / "result.json"
    options = ("--streams=3,6", "--connections=2", "--seconds=0.5", f"--json={result}")
    done = subprocess.run([*BENCH, *options], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    runs = {run["router"]: run for run in json.loads(result.read_bytes())["runs"]}
    assert list(runs) == ["direct", "herd", NOTING]
    for run in runs.values():
        assert run["rss_bytes"] > 1e6
        assert list(run["samples"]) == ["small", "stream 3", "stream 6"]
        for kind, sample in run["samples"].items():
            assert sample["broken"] == []
            assert sample["cpu_s"] > 0 and sample["requests"] > 0
            assert 0 < sample["first_p50_ms"] <= sample["first_p99_ms"]
            assert (sample["events"] > 0) == (kind != "small")
    for title in ("### 3 streams", "### 6 streams", "### Small requests", "| herd | "):
        assert title in done.stdout


def test_what_the_noting_router_is_asked_is_noted() -> None:
    _, _, body = generator.request(1, MODEL, stream=True).partition(b"\r\n\r\n")
    call = parse(FAMILIES["/v1/chat/completions"], body)
    reading = read(call, Prompter(TokenizerConfig(source=str(demo_model.tokenizer_dir()))))
    assert Continuation({}, Tokenizers({})).notes(Leg(call, reading))


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_a_benchmark_that_is_ended_leaves_nothing_running(start: Start) -> None:
    bench = start(*BENCH, "--streams=3", "--seconds=60", "--routers=herd")
    # The bench itself, its engines, a router.
    family = eventually(lambda: (t := tree(bench.process.pid))[2:] and t, timeout=60)
    bench.process.terminate()
    assert bench.process.wait(30) == 143
    assert not [pid for pid in family[1:] if os.path.exists(f"/proc/{pid}")]


def test_a_router_that_breaks_streams_fails_the_benchmark() -> None:
    """An engine with other chunks than planned stands in for a router that loses some."""
    thief = f"{sys.executable} -m loadtests.mock_engine --engines 1 --chunks 19 --port {{port}}"
    options = ("--streams=2", "--connections=1", "--seconds=0.5", "--routers=direct", f"--also=thief={thief}")
    done = subprocess.run([*BENCH, *options], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "thief, stream 2" in done.stderr and "characters that begin" in done.stderr
