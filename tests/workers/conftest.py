"""Engines for tests: simulated ones at will, and one of each kind for the contract."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from engine_wire import RunningEngine, StartSimulated, start_engine
from support import Start, processes

# Small enough that a test can reach the limits.
CONTRACT_ARGS = {"block-size": 32, "max-model-len": 2048, "max-num-queued-reqs": 64}


@pytest.fixture
def simulated(start: Start) -> StartSimulated:
    """`simulated(**flags)`: a simulated engine of the demo model."""

    def start_one(**flags: Any) -> RunningEngine:
        return start_engine(start, "simulated", {name.replace("_", "-"): v for name, v in flags.items()})

    return start_one


@pytest.fixture(scope="session", params=["simulated", pytest.param("vllm", marks=pytest.mark.vllm)])
def engine(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[RunningEngine]:
    """One engine of each kind for all contract tests."""
    if request.param == "vllm":
        from workers.vllm_engine import where_can_run

        place = where_can_run()
        if place.platform is None:
            pytest.skip(place.reason)
    with processes(tmp_path_factory.mktemp(request.param)) as start:
        yield start_engine(start, request.param, CONTRACT_ARGS)
