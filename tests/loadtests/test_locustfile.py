"""Locust as a load tester runs it, against a router and simulated engines."""

from __future__ import annotations

import json
import re
import sys
from typing import Any

import httpx
import pytest
from support import Start, get, router, simulated_engine

LOCUST = (sys.executable, "-m", "locust", "-f", "loadtests/locustfile.py", "--headless", "--only-summary")
CHAT = "/v1/chat/completions"
Rows = dict[str, dict[str, Any]]


def locust(start: Start, host: str, *options: str) -> tuple[int, Rows, str]:
    """A run of 3 s: its exit code, its rows by request type, and all that it wrote."""
    users = ("--host", host, "-u", "4", "-r", "4", "-t", "3s", "--stop-timeout", "5", "--json")
    running = start(*LOCUST, *users, "--think-time", "0.1", "--output-tokens", "16", *options)
    code = running.process.wait(60)
    report = re.search(r"^\[$.*?^\]$", running.output, re.MULTILINE | re.DOTALL)
    rows = json.loads(report[0]) if report else []
    return code, {row["method"]: row for row in rows}, running.output


def mean_ms(row: dict[str, Any]) -> float:
    return row["total_response_time"] / row["num_requests"]


def fault(engine_url: str, **fault: object) -> None:
    httpx.post(f"{engine_url}/faults", json=fault, verify=False).raise_for_status()


def metric(url: str, name: str) -> float:
    """The sum over all labels of one sample name of a /metrics page."""
    lines = re.findall(rf"^{name}(?:\{{.*\}})? (\S+)$", get(f"{url}/metrics").text, re.MULTILINE)
    assert lines, name
    return sum(map(float, lines))


def test_chats_are_measured_from_the_first_token(start):
    # 0.3 ms per prompt token and 20 ms per step: a first token takes long, and so do those after it.
    engine = simulated_engine(start, "--step-time", "0.02,0.0003,0,0")
    front = router(start, engine)
    code, rows, output = locust(start, front.url, "--turns", "3")
    assert code == 0, output
    requests = rows["POST"]["num_requests"]
    assert requests >= 8
    assert {row["num_failures"] for row in rows.values()} == {0}
    assert [rows[kind]["num_requests"] for kind in ("TTFT", "TPOT")] == [requests, requests]
    assert {row["name"] for row in rows.values()} == {CHAT, "/v1/models"}
    tokens = metric(front.admin, "herd_output_tokens_total")
    assert 8 * requests < tokens <= 16 * requests
    # The engine timed the same requests from its side; router and sockets may add to that, and take nothing.
    prefix = "vllm:time_to_first_token_seconds"
    engine_ms = 1000 * metric(engine.url, f"{prefix}_sum") / metric(engine.url, f"{prefix}_count")
    assert mean_ms(rows["TTFT"]) >= engine_ms
    assert mean_ms(rows["TPOT"]) >= 0.95 * 20
    # From the first token, not from the end: the steps after it are not in it.
    assert mean_ms(rows["POST"]) - mean_ms(rows["TTFT"]) >= 0.95 * 20 * (tokens / requests - 1)


def test_a_chat_grows_and_its_beginning_is_found_in_cache(start):
    engine = simulated_engine(start)
    lengths = ("--system-tokens", "300", "--prompt-tokens", "60", "--turns", "4")
    code, rows, output = locust(start, engine.url, *lengths)
    assert code == 0, output
    requests = rows["POST"]["num_requests"]
    prompt_tokens = metric(engine.url, "vllm:prompt_tokens_total")
    # More than a system prompt and one question each: history came along. Most of that was in cache.
    assert prompt_tokens / requests > 450
    assert metric(engine.url, "vllm:prefix_cache_hits_total") / prompt_tokens > 0.5


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ({"kind": "error_event"}, "BrokenStream: error event"),
        ({"kind": "cut"}, "HTTPParseError: Incomplete response"),
        ({"kind": "status", "status": 503}, "status 503"),
        ({"kind": "die"}, "Connection refused"),
    ],
    ids=lambda value: value["kind"] if isinstance(value, dict) else "",
)
def test_what_breaks_is_a_failure(start, kind, said):
    engine = simulated_engine(start, "--served-model-name", "m")
    often = {} if kind["kind"] == "die" else {"times": None}
    chunks = {"after_chunks": 3} if kind["kind"] in ("die", "cut", "error_event") else {}
    fault(engine.url, **kind, **often, **chunks)
    code, rows, output = locust(start, engine.url, "--model", "m", "-t", "1s")
    assert code == 1
    assert rows["POST"]["num_failures"] == rows["POST"]["num_requests"] > 0
    assert "TPOT" not in rows
    assert said in output


def test_a_stream_that_the_router_breaks_off_is_a_failure(start):
    engine = simulated_engine(start)
    front = router(start, engine, flags=("--continuation", "off"))
    fault(engine.url, kind="cut", after_chunks=3)
    code, rows, output = locust(start, front.url)
    assert code == 1
    assert rows["POST"]["num_failures"] == 1 < rows["POST"]["num_requests"]
    assert "The stream broke off" in output


def test_no_server_ends_the_run_at_once(start):
    code, rows, output = locust(start, "http://127.0.0.1:1", "-t", "50s")
    assert code == 1
    assert rows["GET"]["num_failures"] > 0
    assert "no model" in output


def test_a_wrong_setting_is_refused(start):
    code, rows, output = locust(start, "http://127.0.0.1:1", "--turns", "0")
    assert code == 1
    assert not rows
    assert "turns must be at least 1, not 0" in output
