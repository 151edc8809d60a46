"""How a fleet ends: asked to, cut short, failed to start, killed in part. Nothing may be left."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest
from integration.fleet import END_S, Fleet, gone, herd, listens
from support import eventually

pytestmark = pytest.mark.ray

StartFleet = Callable[..., Fleet]


@pytest.fixture
def start_fleet(tmp_path: Path) -> Iterator[StartFleet]:
    fleets = []

    def start(*args: str | Path) -> Fleet:
        fleets.append(Fleet(tmp_path, "--engine", "simulated", *args))
        return fleets[-1]

    try:
        yield start
    finally:
        for fleet in fleets:
            fleet.end()


def assert_nothing_left(fleet: Fleet, processes: list, folder: str) -> None:
    """No process, no port, no temporary folder, no record; but the engines' logs."""
    eventually(lambda: gone(processes), END_S)
    assert not listens(fleet.port)
    assert not listens(fleet.admin_port)
    assert not Path(folder).exists()
    assert fleet.directory.read() is None
    assert list(fleet.directory.logs.glob("engine-*.log"))


def test_ctrl_c_lets_a_stream_finish_and_leaves_nothing(start_fleet: StartFleet) -> None:
    fleet = start_fleet().wait_until_up()
    record = fleet.record
    body = {"model": "herd-demo", "prompt": "Hello", "max_tokens": 200, "ignore_eos": True, "stream": True}
    with httpx.stream(
        "POST", f"{fleet.url}/v1/completions", json=body, timeout=60, trust_env=False
    ) as stream:
        lines = stream.iter_lines()
        next(lines)
        fleet.signal(signal.SIGINT)
        fleet.signal(signal.SIGINT)  # a second one is harmless
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert len(rest) > 150
    assert fleet.wait() == 0, fleet.output
    assert_nothing_left(fleet, record.processes, str(record.ray_folder))


def test_ctrl_c_in_the_middle_of_the_start_leaves_nothing(start_fleet: StartFleet) -> None:
    fleet = start_fleet()
    eventually(lambda: (r := fleet.directory.read()) and any("Serve" in p.name for p in r.processes), END_S)
    record = fleet.record
    os.killpg(fleet.running.process.pid, signal.SIGINT)  # as a terminal does: to Ray's dashboard too
    assert fleet.wait() == 130, fleet.output
    eventually(lambda: gone(record.processes), END_S)
    assert not Path(str(record.ray_folder)).exists()
    assert fleet.directory.read() is None


def test_a_model_that_is_not_there_ends_in_one_sentence(start_fleet: StartFleet, tmp_path: Path) -> None:
    fleet = start_fleet("--model", tmp_path / "nothing-here")
    record = eventually(lambda: (r := fleet.directory.read()) and r.processes and r, END_S)
    assert fleet.wait(END_S * 2) == 1
    error = fleet.output.splitlines()[-1]
    assert error.startswith("Error: the simulated engine of ")
    assert "nothing-here" in error
    assert "Traceback" not in fleet.output
    log = Path(error.partition("its log: ")[2].rstrip(")."))
    assert log.is_relative_to(fleet.directory.logs)
    assert log.is_file()
    assert_nothing_left(fleet, record.processes, str(record.ray_folder))


def test_herd_up_killed_takes_all_along(start_fleet: StartFleet) -> None:
    fleet = start_fleet().wait_until_up()
    record = fleet.record
    fleet.signal(signal.SIGKILL)
    fleet.wait()
    eventually(lambda: fleet.directory.read() is None, END_S)
    assert herd("status", "--run-dir", fleet.directory.path).returncode == 3
    assert_nothing_left(fleet, record.processes, str(record.ray_folder))


def test_a_killed_raylet_ends_the_fleet(start_fleet: StartFleet) -> None:
    fleet = start_fleet().wait_until_up()
    record = fleet.record
    raylet = next(p for p in record.processes if p.name == "raylet")
    os.kill(raylet.pid, signal.SIGKILL)
    assert fleet.wait() == 1
    assert fleet.output.splitlines()[-1] == (
        f"Error: Ray's raylet (process {raylet.pid}) ended, and the fleet with it."
    )
    assert_nothing_left(fleet, record.processes, str(record.ray_folder))


def test_herd_down_ends_a_running_fleet(start_fleet: StartFleet) -> None:
    fleet = start_fleet().wait_until_up()
    record = fleet.record
    assert herd("down", "--run-dir", fleet.directory.path).returncode == 0
    assert fleet.wait() == 0
    assert_nothing_left(fleet, record.processes, str(record.ray_folder))
    assert herd("down", "--run-dir", fleet.directory.path).returncode == 3
