"""The overload of slow engines: what is told of it, and that who cannot be in time is refused."""

from __future__ import annotations

import asyncio
from collections import Counter

import pytest

from loadtests import overload
from loadtests.bed import Stream, bed_of
from loadtests.bench import Cores
from loadtests.oracle import Oracle
from loadtests.overload import ENGINE_ARGS, FLAGS, HEAD, NAME, SLO, TOKENS, Part, attained, offered
from workers import demo_model

WHOLE = b'data: {"choices":[{"delta":{"content":"a"}}]}\n\ndata: [DONE]\n\n'
SPOKEN_S = (TOKENS - 1) * SLO.tpot_s


def stream(ttft: float = 1.0, spoken_s: float = 1.0, status: int = 200) -> Stream:
    return Stream(5.0, "a", status, WHOLE, retry_after=True, ttft=ttft, ended=5.0 + ttft + spoken_s)


@pytest.mark.parametrize(
    ("one", "good"),
    [
        (stream(), True),
        (stream(SLO.ttft_s + 0.1), False),
        (stream(spoken_s=SPOKEN_S - 0.1), True),
        (stream(spoken_s=SPOKEN_S + 0.1), False),
        (stream(status=429), False),
    ],
)
def test_who_got_what_was_promised(one: Stream, good: bool) -> None:
    assert attained(one) is good


@pytest.mark.parametrize(
    ("streams", "missed"),
    [
        ([stream()] * 99 + [stream(status=429)], []),
        ([stream()] * 90 + [stream(status=429)] * 10, ["too few are within their SLO"]),
        ([stream(5.0)] * 3 + [stream()] * 97, ["of those that were let in too many waited too long"]),
        ([*[stream()] * 99, Stream(5.0, "a", 500, ttft=1.0)], ["failed "]),
    ],
)
def test_what_is_not_as_it_is_to_be(streams: list[Stream], missed: list[str]) -> None:
    capacity = Part("sustained", 10.0, 10.0, [stream()] * 100, [False] * 100)
    assert overload.missed(capacity, Part(NAME, 20.0, 10.0, streams, [False] * 100)) == missed
    assert len(overload._row(capacity, capacity)) == len(HEAD)


def test_premium_requests_must_not_be_harmed() -> None:
    streams, premium = [stream()] * 99 + [stream(status=429)], [False] * 98 + [True] * 2
    part = Part(NAME, 20.0, 10.0, streams, premium)
    assert overload.missed(part, part) == ["premium requests were harmed"]


def test_who_cannot_be_in_time_is_refused_and_premium_requests_go_first() -> None:
    async def flooded() -> Part:
        oracle = Oracle(demo_model.tokenizer_dir())
        async with bed_of(Cores.of_machine(), *FLAGS, engine_args=ENGINE_ARGS) as bed:
            return await offered(NAME, bed, oracle, 60.0, 4.0)

    part = asyncio.run(flooded())
    outcomes = Counter(stream.outcome for stream in part.streams)
    assert outcomes["whole"] + outcomes["refused"] == len(part.streams)
    assert outcomes["refused"] > 0.3 * len(part.streams)
    assert outcomes["whole"] > 0.1 * len(part.streams)
    premium = part.of_class(True)
    assert sum(stream.outcome == "whole" for stream in premium) > 0.8 * len(premium)
