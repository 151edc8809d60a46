"""Traces as Mooncake writes them: read, checked, written, spread and compressed."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from random import Random
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from support import ROOT

from loadtests.trace import Arrival, TraceError, compress, grain, read, spread, write

LINE = {"timestamp": 1500, "input_length": 600, "output_length": 7, "hash_ids": [3, 4]}
TRACES = ROOT / "loadtests" / "traces"

arrivals = st.lists(
    st.builds(
        lambda ms, length, output, first: Arrival(
            ms / 1e3, length, output, list(range(first, first - -length // 512))
        ),
        st.integers(0, 10**7),
        st.integers(1, 5000),
        st.integers(1, 3000),
        st.integers(0, 10**6),
    ),
    min_size=1,
    max_size=20,
)


@pytest.mark.parametrize("name", ["trace.jsonl", "trace.jsonl.gz"])
@given(requests=arrivals)
def test_what_is_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, name: str, requests: list[Arrival]
) -> None:
    path = tmp_path_factory.mktemp("trace") / name
    write(path, requests)
    assert read(path) == sorted(requests, key=lambda arrival: arrival.at)


def test_the_lines_are_those_of_mooncake(tmp_path: Path) -> None:
    path = tmp_path / "trace.jsonl"
    write(path, [Arrival(1.5, 600, 7, [3, 4])])
    assert [json.loads(line) for line in path.read_text().splitlines()] == [LINE]
    write(tmp_path / "trace.jsonl.gz", [Arrival(1.5, 600, 7, [3, 4])])
    assert gzip.decompress((tmp_path / "trace.jsonl.gz").read_bytes()) == path.read_bytes()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"timestamp": -1}, "timestamp"),
        ({"input_length": 0}, "input_length"),
        ({"output_length": 0}, "output_length"),
        ({"output_length": None}, "output_length"),
        ({"input_length": "600"}, "input_length"),
        ({"hash_ids": [3]}, "600 tokens are 2 blocks of 512, but hash_ids has 1"),
        ({"input_length": 512}, "512 tokens are 1 blocks of 512, but hash_ids has 2"),
        ({"hash_ids": [3, -4]}, r"hash_ids\[1\]"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(f"{json.dumps(LINE)}\n\n{json.dumps(LINE | change)}\n")
    with pytest.raises(TraceError, match=says) as error:
        read(path)
    assert str(error.value).startswith(f"{path}, line 3: ")


@pytest.mark.parametrize("key", list(LINE))
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    path = tmp_path / "trace.jsonl"
    path.write_text(json.dumps({k: v for k, v in LINE.items() if k != key}))
    with pytest.raises(TraceError, match=f"line 1: .*{key}"):
        read(path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("trace.jsonl", b"\n", "no requests"),
        ("trace.jsonl", b"{", "line 1: "),
        ("trace.jsonl.gz", b"no gzip", "gzip"),
        ("trace.jsonl.gz", gzip.compress(b"{}" * 99)[:-12], "end-of-stream"),
    ],
)
def test_a_broken_file_is_named(tmp_path: Path, name: str, content: bytes, says: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(TraceError, match=says) as error:
        read(path)
    assert str(error.value).startswith(str(path))


@pytest.mark.parametrize(
    ("name", "requests", "seconds", "rounded"),
    [("conversation.jsonl.gz", 6000, 1872, 3), ("synthetic.jsonl.gz", 2000, 532.806, 0)],
)
def test_the_shipped_traces_are_as_their_readme_says(
    name: str, requests: int, seconds: float, rounded: float
) -> None:
    trace = read(TRACES / name)
    assert (len(trace), trace[-1].at, grain(trace)) == (requests, seconds, rounded)


def test_rounded_arrivals_are_spread_over_what_they_were_rounded_to() -> None:
    trace = [Arrival(3.0 * (n // 100), n + 1, 1, [0]) for n in range(1000)]
    moved = spread(trace, Random(1))
    assert moved == spread(trace, Random(1)) != spread(trace, Random(2))
    assert [arrival.at for arrival in moved] == sorted(arrival.at for arrival in moved)
    late = [arrival.at - 3.0 * ((arrival.input_length - 1) // 100) for arrival in moved]
    assert 0 <= min(late) < 0.1 and 2.9 < max(late) < 3
    assert sum(late) / len(late) == pytest.approx(1.5, abs=0.1)


def test_measured_arrivals_stay_unless_a_width_is_given() -> None:
    trace = [Arrival(0.4 * n, 1, 1, [0]) for n in range(9)]
    assert spread(trace, Random(1)) == trace
    assert max(b.at - a.at for a, b in zip(trace, spread(trace, Random(1), 0.2), strict=True)) < 0.2


def test_compressed_is_the_same_in_less_time() -> None:
    assert compress([Arrival(3.0, 1, 2, [5])], 1.5) == [Arrival(2.0, 1, 2, [5])]
