"""`herd record`: what real router processes answered, as a trace that loadtests can read."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import HERD, ROOT, Server, Start, eventually, get, processes, router, simulated_engine

from loadtests import trace
from router.arrivals import Arrival
from router.port import Port
from router.record import Trace

WORDS = "How many sheep are in the herd? "


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two router processes in front of an engine."""
    with processes(tmp_path_factory.mktemp("record")) as start:
        engine = simulated_engine(start)
        front = router(start, engine, flags=("--processes", "2"))
        eventually(lambda: sum(member.open for member in Port(int(port(front))).members()) == 2)
        yield front


def port(fleet: Server) -> str:
    return fleet.url.rpartition(":")[2]


def chat(fleet: Server, repeats: int, **headers: str) -> int:
    """How many tokens the prompt had."""
    model = get(f"{fleet.url}/v1/models").json()["data"][0]["id"]
    messages = [{"role": "user", "content": WORDS * repeats}]
    reply = httpx.post(
        f"{fleet.url}/v1/chat/completions",
        json={"model": model, "messages": messages, "max_tokens": 5, "ignore_eos": True},
        headers=headers,
        timeout=30,
        verify=False,
    )
    return int(reply.raise_for_status().json()["usage"]["prompt_tokens"])


def test_the_traffic_of_all_processes_becomes_a_trace(fleet: Server, start: Start, tmp_path: Path):
    file = tmp_path / "trace.jsonl.gz"
    recorder = start(*HERD, "record", file, "--port", port(fleet))
    eventually(file.exists)  # when it has asked every process to keep what it answers
    sizes = [chat(fleet, 20 * (number + 1)) for number in range(12)]
    recorder.process.send_signal(signal.SIGINT)
    assert recorder.process.wait(20) == 0, recorder.output
    assert recorder.output == f"12 requests in {file}.\n"  # and no prompt that was not known
    found = trace.read(file)
    assert sorted(arrival.input_length for arrival in found) == sorted(sizes)
    assert {arrival.output_length for arrival in found} == {5}
    longest = sorted(found, key=lambda arrival: arrival.input_length)[-2:]
    assert longest[0].hash_ids[0] == longest[1].hash_ids[0]  # each prompt begins as the one before
    assert longest[0].hash_ids[-1] != longest[1].hash_ids[-1]
    assert 0 <= found[0].at < found[-1].at < 60


def test_it_ends_by_itself_after_a_time(fleet: Server, tmp_path: Path):
    file = tmp_path / "trace.jsonl"
    done = subprocess.run(
        [*HERD, "record", str(file), "--port", port(fleet), "--seconds", "0.1"],
        capture_output=True, text=True, timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, f"0 requests in {file}.\n")
    assert file.read_bytes() == b""


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (("{path}/none/trace.jsonl", "--port", "{port}"), 1, "No such file or directory"),
        (("{path}/trace.jsonl", "--run-dir", "{path}"), 3, "No fleet is up here"),
    ],
)
def test_what_cannot_be_is_told_in_one_sentence(fleet, tmp_path, arguments, code, says):
    filled = [argument.format(path=tmp_path, port=port(fleet)) for argument in arguments]
    done = subprocess.run([*HERD, "record", *filled], capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == code
    assert says in done.stderr
    assert done.stderr.startswith("Error: ") and done.stderr.count("\n") == 1


def test_blocks_and_sessions_are_numbered_by_their_first_occurrence():
    made = Trace(start=100.0)
    lines: list[Any] = [
        made.line(Arrival(101.5, 600, 3, [77, 88], session=9)),
        made.line(Arrival(100.25, 1300, 4, [77, 66, None], session=5)),
        made.line(Arrival(99.0, 1, 1, [1])),  # before the start
        made.line(Arrival(102.0, 1, 1, [None], session=9)),
        made.line(Arrival(103.0, 2, 2, [88])),
    ]
    assert [line and line.hash_ids for line in lines] == [[0, 1], [0, 2, 3], None, [4], [1]]
    assert [line and line.session_id for line in lines] == ["0", "1", None, "0", None]
    assert [line and line.timestamp for line in lines] == [1500, 250, None, 2000, 3000]
    assert (made.recorded.requests, made.recorded.blind) == (4, 1)
