"""`herd explain` beside real router processes and engines."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
from rich.console import Console
from support import HERD, ROOT, Server, eventually, get, processes, router, simulated_engine

from router.explain import WIDTH, as_text
from router.port import Port

QUESTION = "How many sheep are in the herd? " * 20
MAX_TOKENS = 4


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two router processes in front of two engines."""
    with processes(tmp_path_factory.mktemp("explain")) as start:
        engines = [simulated_engine(start) for _ in range(2)]
        front = router(start, *engines, flags=("--processes", "2", "--policy", "kv_aware"))
        eventually(lambda: sum(member.open for member in Port(int(port(front))).members()) == 2)
        eventually(lambda: "load" not in trusts(front), timeout=30)
        yield front


def trusts(fleet: Server) -> set[str]:
    """How well both processes know the caches of both engines."""
    admins = get(f"{fleet.admin}/routers").json()[0]["targets"]
    return {r["trust"] for admin in admins for r in get(f"http://{admin}/fleet").json()["replicas"]}


def port(fleet: Server) -> str:
    return fleet.url.rpartition(":")[2]


def explain(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*HERD, "explain", *args], capture_output=True, text=True, timeout=60, cwd=ROOT)


def chat(fleet: Server, *request_ids: str) -> None:
    """A question that nobody asked before; one process gets all of these, since they share a connection."""
    model = get(f"{fleet.url}/v1/models").json()["data"][0]["id"]
    messages = [{"role": "user", "content": f"{request_ids[0]}: {QUESTION}"}]
    body = {"model": model, "messages": messages, "max_tokens": MAX_TOKENS}
    with httpx.Client(base_url=fleet.url, timeout=30, verify=False) as client:
        for request_id in request_ids:
            headers = {"x-request-id": request_id}
            reply = client.post("/v1/chat/completions", json=body, headers=headers)
            assert reply.raise_for_status().headers["x-request-id"] == request_id


def told(fleet: Server, *args: str) -> Any:
    done = explain("--port", port(fleet), "--json", *args)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_request_is_explained_whichever_process_placed_it(fleet):
    ids = [f"which-{number}" for number in range(20)]
    for request_id in ids:
        chat(fleet, request_id)
    listed = told(fleet, "--last", "20")
    assert [each["request_id"] for each in listed] == ids[::-1]
    of_each = {each["process"]: each for each in listed}
    assert len(of_each) == 2
    assert [told(fleet, each["request_id"]) for each in of_each.values()] == list(of_each.values())


def test_a_long_question_asked_twice_goes_where_its_cache_is(fleet):
    chat(fleet, "first", "again")
    first, again = (told(fleet, request_id)["attempts"][-1] for request_id in ("first", "again"))
    assert (again["replica"], again["branch"]) == (first["replica"], "cached")
    predicted, observed = again["predicted"], again["observed"]
    for name in ("prompt_tokens", "cached_tokens"):
        assert predicted[name] == observed[name] > 0
    chosen, other = sorted(again["candidates"], key=lambda candidate: not candidate["chosen"])
    assert chosen["cached_tokens"] == predicted["cached_tokens"] > other["cached_tokens"]
    assert chosen["prefill_s"] < other["prefill_s"]
    assert chosen["cost_s"] < other["cost_s"]
    assert predicted["ttft_s"] > 0
    admins = get(f"{fleet.admin}/routers").json()[0]["targets"]
    metrics = "".join(get(f"http://{admin}/metrics").text for admin in admins)
    ratios = re.findall(r"herd_ttft_prediction_ratio_count\{.*\} (.+)", metrics)
    assert sum(map(float, ratios)) >= 2


def test_people_get_tables(fleet):
    chat(fleet, "for-people")
    done = explain("--port", port(fleet), "for-people")
    assert done.returncode == 0, done.stderr
    (attempt,) = told(fleet, "for-people")["attempts"]
    assert attempt["reason"] in done.stdout
    for candidate in attempt["candidates"]:
        mark = "→" if candidate["chosen"] else " "
        assert re.search(
            rf"^{mark} +{candidate['replica']} +{candidate['trust']} ", done.stdout, re.MULTILINE
        )
    observed = attempt["observed"]
    assert re.search(rf"prompt tokens +{observed['prompt_tokens']}\b", done.stdout)
    assert re.search(rf"output tokens +{MAX_TOKENS}\b", done.stdout)


def test_a_request_that_was_placed_again_shows_each_attempt():
    def attempt(replica: str, outcome: str, cached: int, ttft_s: float | None) -> dict[str, Any]:
        candidate = {
            "replica": replica, "chosen": True, "trust": "exact", "cached_tokens": 1600,
            "slower_tokens": 800, "loading_s": 0.002, "backlog_s": 0.055, "prefill_s": 1.5, "ttft_s": 1.56,
            "step_s": 0.006, "busy": 0.25,
            "cost_s": 1.6, "decoding": 1, "in_flight": 2,
        }  # fmt: skip
        return {
            "placed_at": 1e9, "replica": replica, "reason": "costs least", "branch": "cached",
            "token_ids": "sent", "outcome": outcome, "candidates": [candidate],
            "predicted": {"prompt_tokens": 8000, "cached_tokens": 1600, "ttft_s": 0.5},
            "observed": {
                "prompt_tokens": 8000, "cached_tokens": cached, "output_tokens": 9,
                "ttft_s": ttft_s, "duration_s": 3.0,
            },
        }  # fmt: skip

    attempts = [
        attempt("r0", "no connection; tried elsewhere", 0, None),
        attempt("r1", "answered 200", 1584, 1),
    ]
    told = {"process": 1, "request_id": "a", "model": "m", "policy": "kv_aware", "attempts": attempts}
    console = Console(width=WIDTH, file=StringIO())
    console.print(as_text(told))
    lines = [" ".join(line.split()) for line in console.file.getvalue().splitlines()]
    assert "Attempt 1 of 2: no connection; tried elsewhere" in lines
    assert "Attempt 2 of 2: answered 200" in lines
    assert "→ r1 exact 1,600 800 55 ms 2 ms 1.50 s 1.56 s 6 ms 25% 1.60 s 1 2" in lines
    assert "cached tokens 1,600 1,584 -16" in lines
    assert "first token 500 ms 1.00 s 2.00 times as long" in lines


def test_without_an_id_the_last_are_listed(fleet):
    chat(fleet, "listed")
    heads, first, *_ = explain("--port", port(fleet)).stdout.splitlines()
    assert heads.split()[:2] == ["PLACED", "REQUEST"]
    assert first.split()[1] == "listed"


def test_an_unknown_id_is_told_in_one_sentence(fleet):
    done = explain("--port", port(fleet), "no-such-request")
    assert done.returncode == 1
    assert done.stderr == "Error: No router process keeps a decision on request 'no-such-request'.\n"


def test_no_fleet_is_told_as_status_tells_it(tmp_path: Path):
    done = explain("--run-dir", str(tmp_path), "x")
    assert done.returncode == 3
    assert done.stderr == f"Error: No fleet is up here ({tmp_path}).\n"


def test_one_request_or_several():
    done = explain("x", "--last", "2")
    assert done.returncode == 2
    assert "Give one of both" in done.stderr
