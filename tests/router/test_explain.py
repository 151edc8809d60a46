"""`herd explain` beside real router processes and engines."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import HERD, ROOT, Server, eventually, get, processes, router, simulated_engine

from router.port import Port

HELLO = {"messages": [{"role": "user", "content": "How many sheep are in the herd? " * 20}], "max_tokens": 4}


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two router processes in front of two engines."""
    with processes(tmp_path_factory.mktemp("explain")) as start:
        engines = [simulated_engine(start) for _ in range(2)]
        front = router(start, *engines, flags=("--processes", "2", "--policy", "kv_aware"))
        eventually(lambda: sum(member.open for member in Port(int(port(front))).members()) == 2)
        yield front


def port(fleet: Server) -> str:
    return fleet.url.rpartition(":")[2]


def explain(*args: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*HERD, "explain", *args], capture_output=True, text=True, timeout=60, cwd=ROOT)


def chat(fleet: Server, request_id: str) -> None:
    """Every request comes on a connection of its own, so both processes get some."""
    model = get(f"{fleet.url}/v1/models").json()["data"][0]["id"]
    reply = httpx.post(
        f"{fleet.url}/v1/chat/completions",
        json={"model": model, **HELLO},
        headers={"x-request-id": request_id},
        timeout=30,
        verify=False,
    )
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
    assert re.search(rf"output tokens +{HELLO['max_tokens']}\b", done.stdout)


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
