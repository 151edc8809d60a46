"""The churn: replicas are killed, hang, fail and come back, router processes die, and no stream is lost."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from loadtests import bench_faults
from loadtests.bed import Stream
from loadtests.bench import Cores
from loadtests.bench_faults import CHURN, HEAD, Fault, killed
from loadtests.oracle import Oracle
from workers import demo_model

CHURN_S = 120.0


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(demo_model.tokenizer_dir())


def test_nothing_is_lost_in_the_churn(oracle: Oracle) -> None:
    result = asyncio.run(bench_faults.run(replace(CHURN, seconds=CHURN_S), oracle, Cores.of_machine()))
    assert result.outcomes["failed"] == result.outcomes["altered"] == result.outcomes["refused"] == 0
    assert result.outcomes["whole"] > 0.9 * len(result.streams)
    half, whole = map(float, result.notes["router RSS MB"].split(" to "))
    assert whole < half + 150  # as much as a process has that may just have been started at half time


def test_every_row_has_its_cells(oracle: Oracle) -> None:
    result = asyncio.run(bench_faults.run(Fault("kill -9", killed, 8.0), oracle, Cores.of_machine()))
    cells = bench_faults.row(result)
    assert len(cells) == len(HEAD)
    assert cells[2:6] == ["0", "0", "0", "0"]
    assert int(cells[6]) > 0


WHOLE = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: [DONE]\n\n'


@pytest.mark.parametrize(
    ("stream", "outcome"),
    [
        (Stream(0, "a", 200, WHOLE), "whole"),
        (Stream(0, "b", 200, WHOLE), "altered"),
        (Stream(0, "a", 200, WHOLE.removesuffix(b"data: [DONE]\n\n")), "failed"),
        (Stream(0, "a", 200, b'data: {"error":{}}\n\n'), "failed"),
        (Stream(0, "a", 503, b"", retry_after=True), "refused"),
        (Stream(0, "a", 503, b""), "failed"),
        (Stream(0, "a", 0, b"", "reset"), "failed"),
        (Stream(0, "a", 0, b"", "reset", router_died=True), "lost"),
    ],
)
def test_what_became_of_a_stream(stream: Stream, outcome: str) -> None:
    assert stream.outcome == outcome
