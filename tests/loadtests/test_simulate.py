"""`herd simulate`: fleet files for the twin, and policies side by side."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from support import HERD, ROOT

from loadtests import simulate
from loadtests.trace import Arrival, write
from router.errors import ConfigError

SIM_8B = ROOT / "deploy" / "sim-8b.yaml"


def fleet_file(folder: Path, **model: Any) -> Path:
    """deploy/sim-8b.yaml with another model."""
    document = yaml.safe_load(SIM_8B.read_text())
    document["applications"][0]["args"]["models"][0] |= model
    path = folder / "fleet.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


@pytest.fixture
def trace(tmp_path: Path) -> Path:
    path = tmp_path / "trace.jsonl"
    write(path, [Arrival(3 * (n // 9), 700 * n + 1, 20, list(range(n * 700 // 512 + 1))) for n in range(90)])
    return path


def herd_simulate(*arguments: str | Path) -> str:
    argv = [*HERD, "simulate", *map(str, arguments)]
    return subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, text=True, timeout=60).stdout


def test_the_shipped_fleet_is_eight_h100() -> None:
    fleet = simulate.fleet_of(SIM_8B)
    assert (fleet.setting.replicas, fleet.setting.routers, fleet.policy) == (8, 1, "kv_aware")
    assert fleet.setting.engine.num_gpu_blocks == 400_000 // 512 + 1
    assert simulate.fleet_of(SIM_8B, replicas=3, routers=2).setting.replicas == 3


def test_engine_args_are_those_of_the_engine(tmp_path: Path) -> None:
    args = {"preset": "70b-4xh100", "block_size": 512, "max-num-seqs": 7, "speed": 2}
    engine = simulate.fleet_of(fleet_file(tmp_path, engine_args=args)).setting.engine
    assert (engine.max_num_seqs, engine.step_time.step, engine.num_gpu_blocks) == (7, 8e-3, 879)


def test_an_offloading_fleet_has_a_cpu_tier_five_times_the_gpus() -> None:
    path = SIM_8B.with_name("sim-8b-offload.yaml")
    fleet, plain = simulate.fleet_of(path), simulate.fleet_of(SIM_8B)
    assert fleet.setting.engine.num_cpu_blocks // 5 == fleet.setting.engine.num_gpu_blocks - 2 == 780
    assert replace(fleet.setting.engine, num_cpu_blocks=0) == plain.setting.engine
    arrivals = [Arrival(0.0, 5, 1, []), Arrival(60.0, 5, 1, [])]
    assert "399,872 tokens of KV cache, 1,998,848 on the CPU" in simulate.title("t", 1, arrivals, fleet)


@pytest.mark.parametrize(
    ("model", "says"),
    [
        ({"engine_args": {}}, "models.0.engine_args: traces tell of blocks of 512 tokens, not 16"),
        ({"engine_args": {"preset": "abacus"}}, "models.0.engine_args: argument --preset: invalid choice"),
        ({"engine_args": {"speed": -1}}, "models.0.engine_args: --speed must be above 0"),
        ({"engine": "vllm"}, "models.0.engine: "),
    ],
)
def test_what_cannot_be_simulated_is_named(tmp_path: Path, model: dict[str, Any], says: str) -> None:
    path = fleet_file(tmp_path, **model)
    with pytest.raises(ConfigError) as error:
        simulate.fleet_of(path)
    assert str(error.value).startswith(f"{path}: {says}")


def test_policies_are_compared_side_by_side(trace: Path) -> None:
    said = herd_simulate(
        "--trace",
        trace,
        "--fleet",
        SIM_8B,
        "--policy",
        "kv_aware",
        "--policy",
        "round_robin",
        "--policy",
        "llmd_precise",
    )
    lines = said.splitlines()
    assert lines[0].startswith("trace.jsonl x 1: 90 requests in 0.5 min, ")
    (heads,) = [line.split() for line in lines if "round_robin" in line]
    assert heads == ["kv_aware", "round_robin", "llmd_precise"]
    (cached,) = [line.split()[3::2] for line in lines if line.startswith("prompt tokens cached")]
    assert min(float(cached[0]), float(cached[2])) > float(cached[1])


def test_programs_are_told_in_json_what_was_simulated(trace: Path) -> None:
    def figures(seed: int) -> dict[str, Any]:
        options = ("--seed", str(seed), "--speed", "2", "--routers", "2", "--replicas", "3")
        told = json.loads(herd_simulate("--trace", trace, "--fleet", SIM_8B, "--json", *options))
        assert (told["seed"], told["speed"], told["routers"], told["replicas"]) == (seed, 2.0, 2, 3)
        (policy,) = told["policies"]
        assert policy.pop("policy") == "kv_aware"
        assert policy.pop("cpu_s") >= 0
        return policy

    one, other = figures(1), figures(2)
    assert one["requests"] == 81
    assert one["ttft_p50"] != other["ttft_p50"]


def test_the_router_does_not_need_the_load_tests() -> None:
    """`herd simulate` imports them when it runs."""
    program = "import sys, router.cli, router.front; sys.exit('loadtests' in sys.modules)"
    subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
