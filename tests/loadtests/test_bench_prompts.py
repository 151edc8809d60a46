"""The prompts benchmark from end to end, in its smallest form, and its requests."""

import asyncio
import itertools
import json
from collections import Counter
from random import Random

import pytest

from loadtests import account, bench_prompts, contenders
from loadtests.bench import Cores
from loadtests.bench_prompts import Kind, Measured, Plan
from loadtests.contenders import Contender
from loadtests.generator import Sample
from loadtests.oracle import Oracle
from workers import demo_model
from workers.engine import DEMO

KINDS = (Kind("shared", 4000, groups=2, rate=20), Kind("small", 50, stream=False, rate=20))


@pytest.fixture(scope="module")
def oracle() -> Oracle:
    return Oracle(demo_model.tokenizer_dir())


def test_every_figure_is_there_and_every_reply_was_foretold(oracle: Oracle) -> None:
    plan = Plan(KINDS, connections=2, seconds=0.5, rounds=1, ramp_s=0.3, engines=1)
    herd = Contender(contenders.HERD, contenders.herd("kv_aware"))
    found = asyncio.run(bench_prompts.bench(plan, [herd], True, DEMO, oracle, Cores.of_machine()))
    assert [(one.router, one.kind) for one in found] == [
        *(("direct", "shared"), ("herd", "shared"), ("direct", "small"), ("herd", "small"))
    ]
    assert bench_prompts.broken(found) == []
    for one in found:
        assert one.cost_us > 0 and one.rss_bytes > 1e6 and one.alone.first_p50_ms > 0
        assert 0 <= one.cached <= 100
        assert (one.listening is not None and one.listening.cpu_s > 0) is (one.router == "herd")
        assert one.router != "herd" or one.token_ids == {account.SENT: one.herd["herd_requests_total"]}
    told = bench_prompts.report(found, "Here.")
    parts = (
        "### shared",
        "### small",
        "### At rest",
        "| herd | ",
        "Herd sent token ids with ",
        "events alone",
    )
    for part in parts:
        assert part in told


def test_requests_of_a_kind_are_all_different_and_share_what_they_should(oracle: Oracle) -> None:
    asks = list(itertools.islice(bench_prompts.asks(KINDS[0], 1, oracle, "seed"), 6))
    chats = [json.loads(ask.request.partition(b"\r\n\r\n")[2])["messages"] for ask in asks]
    assert len({chat[-1]["content"] for chat in chats}) == 6
    assert Counter(chat[0]["content"] for chat in chats).most_common() == [
        (chats[0][0]["content"], 3),
        (next(c for c in chats if c[0] != chats[0][0])[0]["content"], 3),
    ]
    assert [ask.expected for ask in asks] == [oracle.says(chat, 3) for chat in chats]


def test_a_group_comes_again_when_all_have_come() -> None:
    drawn = list(itertools.islice(bench_prompts.shuffled(16, Random(1)), 48))
    for start in (0, 16, 32):
        assert sorted(drawn[start : start + 16]) == list(range(16))
    assert drawn[:16] != drawn[16:32]


def test_requests_made_ahead_are_the_first_ones() -> None:
    assert list(itertools.islice(bench_prompts.made(iter("abcd"), 2), 4)) == list("abcd")  # type: ignore[type-var]


def measured(router: str, round: int, cpu_s: float, **more: Counter[str]) -> Measured:
    """100 requests of one kind."""
    sample = Sample(1.0, cpu_s, 500, 100, 10.0 * cpu_s, 20.0, [])
    engines = Counter({"vllm:prompt_tokens_total": 1000, "vllm:prompt_tokens_cached_total": 880})
    told = {"herd": Counter[str](), "token_ids": Counter[str]()} | more
    return Measured(router, round, "32 KB", sample, sample, 1.0, 50_000_000, engines, **told)


def test_a_router_is_compared_with_herd_in_the_same_round() -> None:
    herd = {
        "herd": Counter(
            {"herd_requests_total": 100, "herd_prompt_tokens_total": 1000, "herd_cached_tokens_total": 880}
        ),
        "token_ids": Counter({account.SENT: 98, "no canary yet": 2}),
    }
    found = [measured("direct", n, 0.1) for n in range(2)]
    found += [measured("herd", n, 0.1 * (n + 1), **herd) for n in range(2)]
    found += [measured("peer", n, 0.3 * (n + 1)) for n in range(2)]
    told = bench_prompts.report(found, "Here.")
    rows = {
        line.split(" | ")[0].strip("| "): line.split(" | ") for line in told.splitlines() if " | " in line
    }
    assert "### 32 KB" in told
    row = next(line.split(" | ") for line in told.splitlines() if line.startswith("| peer | 4500 "))
    assert row[2] == "3.00 (3.00..3.00)" and row[4] == "3.50 (2.00..5.00)" and row[5] == "88 (88..88)"
    assert rows["peer"][1].startswith("1.0")  # at rest
    assert "Herd sent token ids with 196 of 200 requests; no canary yet: 4." in told
    assert "10 prompt tokens each to it, 88 % of them cached" in told
