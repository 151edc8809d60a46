"""The first-token benchmark on simulated engines, with and without a router before them."""

import asyncio

import pytest
from support import Start, router, simulated_engine

from loadtests import bench_ttft
from loadtests.bench import BenchFailed
from loadtests.bench_ttft import COLD, KINDS, Answer


def test_each_turn_says_what_was_cached_and_who_answered(start: Start) -> None:
    engines = [simulated_engine(start, "--served-model-name", "m", "--speed", "10") for _ in range(2)]
    herd = router(start, *engines, flags=("--policy", "consistent_hash"))
    answers = asyncio.run(bench_ttft.bench(herd.url, herd.admin, conversations=3, size=1000))
    assert len(answers) == 3
    for given in answers:
        assert [one.kind for one in given] == list(KINDS)
        assert len({one.replica for one in given}) == 1 and given[0].replica in {e.url for e in engines}
        cold, *later = given
        assert cold.cached_tokens < 64 < min(one.cached_tokens for one in later)
        assert (
            given[0].prompt_tokens == given[1].prompt_tokens < given[2].prompt_tokens < given[3].prompt_tokens
        )
        assert all(one.first_s > 0 and one.text for one in given)
    told = bench_ttft.report(answers, "Here.")
    assert "3 conversations on " in told
    assert f"| {KINDS[3]} | 3 |" in told and "| 3 of 3 |" in told


def test_an_endpoint_without_decisions_is_measured_too(start: Start) -> None:
    engine = simulated_engine(start, "--served-model-name", "m", "--speed", "10")
    answers = asyncio.run(bench_ttft.bench(engine.url, engine.url, conversations=1, size=500))
    assert {one.replica for one in answers[0]} == {None}
    assert "1 conversations, one request at a time" in bench_ttft.report(answers, "Here.")


def test_an_endpoint_that_is_none_fails_in_a_sentence() -> None:
    with pytest.raises(BenchFailed, match="does not tell its models"):
        asyncio.run(bench_ttft.bench("http://127.0.0.1:9", None, 1, 100))


def test_times_are_set_against_the_cold_ones() -> None:
    answers = [
        [Answer(kind, s, "x", 2000, 0, f"r{n}") for kind, s in zip(KINDS, (2.0, 0.1, 0.2, 0.4), strict=True)]
        for n in range(2)
    ]
    rows = bench_ttft.report(answers, "Here.").splitlines()
    assert f"| {COLD} | 2 | 2000 | 0 | 2000 | 2000 | 1.00 | 2 of 2 |" in rows
    assert f"| {KINDS[1]} | 2 | 2000 | 0 | 100 | 100 | 0.05 | 2 of 2 |" in rows


def test_the_admin_port_is_the_next_one() -> None:
    assert bench_ttft.beside("http://127.0.0.1:8000") == "http://127.0.0.1:8001"
