"""The cache benchmark from end to end, in its smallest form, and how it counts."""

import json
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from support import ROOT

from loadtests import bench_cache
from loadtests.bench_cache import BLOCK_SIZE, GROUPS, HELD, Measured, Plan, engine_args, shared, workload
from loadtests.oracle import Oracle
from workers import demo_model

BENCH = (sys.executable, "-m", "loadtests.bench_cache", "--seconds=1", "--load=half")


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(demo_model.tokenizer_dir())


def test_every_figure_is_there(tmp_path: Path) -> None:
    done = subprocess.run(
        [*BENCH, "--routers=herd least_requests", f"--json={tmp_path / 'out'}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out").read_bytes())["found"][0]["requests"]
    row = next(line for line in done.stdout.splitlines() if line.startswith("| herd least_requests | "))
    _, hits, requests, *times, _ = (cell.strip() for cell in row.strip("|").split("|"))
    assert 0 <= float(hits) < 100
    assert sum(map(int, requests.split(", "))) == 30
    assert 0 < float(times[0]) <= float(times[1]) <= float(times[2])
    assert "30 requests at 30/s" in done.stdout and "Ceiling: " in done.stdout


def test_the_first_request_of_a_prefix_can_have_nothing_in_cache(oracle: Oracle) -> None:
    once, twice = workload(1, 1, oracle, "a"), workload(200, 1, oracle, "a")
    assert once.cacheable == 0
    # All forty have come by then, and of every other request all but its question and a block was seen.
    assert twice.cacheable / twice.prompt_tokens == pytest.approx(1 - GROUPS / 200, abs=0.03)
    assert len({ask.request for ask in twice.asks}) == 200


@pytest.mark.parametrize(
    ("tokens", "before", "saved"),
    [
        ([1] * 40, [], 0),
        ([1] * 40, [2] * 40, 0),
        ([1] * 40 + [2], [1] * 40 + [3], 2 * BLOCK_SIZE),
        ([1] * 31 + [2], [1] * 31 + [3], BLOCK_SIZE),
    ],
)
def test_whole_blocks_of_a_common_beginning_are_saved(
    tokens: list[int], before: list[int], saved: int
) -> None:
    assert shared(tokens, before) == saved


def test_engines_hold_so_many_prefixes_and_compute_one_in_its_time(oracle: Oracle) -> None:
    args = engine_args(oracle)
    tokens = len(oracle.tokens(bench_cache.messages(0, "any")))
    blocks = args["num-gpu-blocks-override"]
    assert isinstance(blocks, int)
    assert (blocks - 1) * BLOCK_SIZE // tokens == HELD
    assert tokens * float(str(args["step-time"]).split(",")[1]) == pytest.approx(0.064, rel=0.03)


def measured(router: str, round: int, hits: float, **more: Counter[str] | list[bool]) -> Measured:
    told = {"herd": Counter[str](), "came_true": []} | more
    return Measured(router, round, 1000.0, 10 * hits, [3, 4], 7.0, [10.0, 20.0, 30.0], **told)  # type: ignore[arg-type]


def test_hits_and_predictions_are_reported() -> None:
    herd = Counter(
        {
            "herd_predictions_total": 50,
            "herd_prediction_misses_total": 1,
            'herd_prediction_misses_total{cause="evicted"}': 1,
        }
    )
    ours = measured("herd kv_aware", 0, 91.0, herd=herd, came_true=[True] * 48 + [False] * 2)
    theirs = [measured("peer", number, hits) for number, hits in enumerate((80.0, 90.0))]
    told = bench_cache.report([ours, *theirs], 93.3, Plan(60.0, 10.0, 2), "Here.")
    assert "| herd kv_aware | 91.0 | 3, 4 | 20 |" in told
    assert "| peer | 85.0 (80.0..90.0) | 3, 4 | 20 (20..20) |" in told
    assert "Ceiling: 93.3 % hits" in told and "40 of 600" in told
    assert "50 requests: 98.0 % within a block of what the engine reported, 96.0 % to the token" in told
    assert 'Misses by cause: "evicted" 1.' in told
