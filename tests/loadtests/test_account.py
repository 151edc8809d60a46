"""What engines and routers tell is read as they mean it."""

import asyncio
from typing import Any

import httpx
from support import Start, router, simulated_engine

from loadtests import account


def test_counts_are_summed_over_servers_by_name_and_label(start: Start) -> None:
    engines = [simulated_engine(start, "--served-model-name", "m") for _ in range(2)]
    for engine, requests in zip(engines, (1, 2), strict=True):
        for _ in range(requests):
            body = {"model": "m", "prompt": "Hello", "max_tokens": 1}
            httpx.post(f"{engine.url}/v1/completions", json=body, trust_env=False).raise_for_status()
    counted = asyncio.run(account.counted(engine.url for engine in engines))
    assert counted["vllm:request_success_total"] == 3
    assert counted['vllm:request_success_total{finished_reason="length"}'] == 3
    assert counted['vllm:request_success_total{finished_reason="stop"}'] == 0
    assert counted['http_requests_total{handler="/v1/completions"}'] == 3


def test_herds_last_decisions_are_told_newest_first(start: Start) -> None:
    engine = simulated_engine(start, "--served-model-name", "m")
    herd = router(start, engine)
    for _ in range(3):
        body = {"model": "m", "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}
        httpx.post(f"{herd.url}/v1/chat/completions", json=body, trust_env=False).raise_for_status()
    told = asyncio.run(account.decisions(herd.admin, 2))
    assert [decision["replica"] for decision in told] == [engine.url] * 2
    assert told[0]["placed_at"] >= told[1]["placed_at"]
    assert account.token_ids(told).total() == 2


def test_herd_says_why_it_does_not_trust_a_cache(start: Start) -> None:
    engine = simulated_engine(start, "--served-model-name", "m")  # has no KV events
    herd = router(start, engine, flags=("--policy", "kv_aware"))
    (reason,) = asyncio.run(account.untrusted(herd.admin))
    assert reason


def decision(predicted: int | None, observed: int | None, token_ids: str = account.SENT) -> dict[str, Any]:
    """As the admin port tells it."""
    return {
        "token_ids": token_ids,
        "predicted": {"cached_tokens": predicted},
        "observed": {"cached_tokens": observed},
    }


def test_predictions_come_true_to_the_token_or_not() -> None:
    decided = [decision(32, 32), decision(0, 0), decision(32, 16), decision(None, 16), decision(16, None)]
    assert account.came_true(decided) == [True, True, False]


def test_token_ids_are_told_by_what_became_of_them() -> None:
    decided = [decision(0, 0), decision(0, 0), decision(0, 0, "no tokenizer")]
    assert account.token_ids(decided) == {account.SENT: 2, "no tokenizer": 1}
