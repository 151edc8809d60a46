"""Real vLLM on this machine's CPU, as many engines as Locust keeps busy: one, three, and one again."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from integration.fleet import END_S, HERD, Fleet
from support import Running, eventually

from router.config import AUTOSCALING_POLICY
from router.plan import document
from workers.vllm_engine import where_can_run

pytestmark = [
    pytest.mark.ray,
    pytest.mark.vllm,
    pytest.mark.skipif(where_can_run().platform is None, reason=where_can_run().reason),
    pytest.mark.timeout(600),
]

# Three engines that share two cores with everything else that runs there.
START_S = 300.0
REPLICAS = {"min": 1, "max": 3, "busy": 0.2, "settle_s": 5, "startup_s": 30}
# Prompts of a thousand tokens, of which some begin alike: about what one engine can do, until it is stopped.
LOAD = ["--rate", "1", "--duration", "600", "--chunk-tokens", "80", "--output-tokens", "16"]
LOAD += ["--max-ttft-p99-ms", "240000", "--max-tpot-p99-ms", "10000", "--max-failures", "0"]


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[Fleet]:
    model = {"name": "herd-demo", "engine": "vllm", "source": "demo", "replicas": REPLICAS}
    config = document({"models": [model], "router": {"admission": {"max_wait_s": START_S}}})
    config["applications"][0]["autoscaling_policy"] = {"policy_function": AUTOSCALING_POLICY}
    file = tmp_path / "fleet.yaml"
    file.write_text(yaml.safe_dump(config))
    fleet = Fleet(tmp_path, file)
    try:
        yield fleet.wait_until_up(START_S)
    finally:
        fleet.end()


def test_one_three_and_one_again_and_no_request_fails(fleet: Fleet, tmp_path: Path) -> None:
    assert len(fleet.ready()) == 1
    report = tmp_path / "report.html"
    load = [HERD, "loadtest", "rag", "--port", str(fleet.port), *LOAD, "--html", report]
    running = Running.start(load, tmp_path / "loadtest.log")
    try:
        eventually(lambda: len(fleet.ready()) == 3, START_S)
        running.process.send_signal(signal.SIGINT)
        assert running.process.wait(END_S) == 0, running.output
    finally:
        running.kill()
    assert "<html" in report.read_text()
    eventually(lambda: len(fleet.ready()) == 1, START_S)
