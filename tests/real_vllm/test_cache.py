"""The router's knowledge of caches against real vLLM: three replicas on this machine's CPU, without Ray."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from engine_wire import MODEL, start_engine
from support import Running, Server, Start, eventually, get, processes, router

from workers.vllm_engine import where_can_run

pytestmark = [
    pytest.mark.vllm,
    pytest.mark.skipif(where_can_run().platform is None, reason=where_can_run().reason),
    pytest.mark.timeout(900),
]

BLOCK = 32
REPLICAS = 3
# Of 32 tokens: two conversations of 1,000 tokens and not a third. One block is vLLM's own.
SMALL_CACHE = 80
TRUST_S = 120.0


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Three vLLM engines with a small KV cache, and a router that trusts all of them."""
    with processes(tmp_path_factory.mktemp("cache")) as start:
        engines = [started(start) for _ in range(REPLICAS)]
        server = router(start, *engines, flags=("--policy", "kv_aware", "--tokenizer", "demo"))
        eventually(lambda: set(trusts(server)) == {"exact"}, TRUST_S)
        yield server


def started(start: Start) -> Server:
    args = {"num-gpu-blocks-override": SMALL_CACHE, "max-model-len": 2048, "block-size": BLOCK}
    engine = start_engine(start, "vllm", args)
    assert isinstance(engine.process, Running)
    return Server(engine.process, engine.url)


def trusts(server: Server) -> list[str]:
    replicas = get(f"{server.admin}/fleet").json()["replicas"]
    assert len(replicas) == REPLICAS
    return [replica["trust"] for replica in replicas]


def ask(server: Server, messages: list[dict[str, str]]) -> tuple[str, dict[str, Any]]:
    """The answer, and the router's record of where it came from."""
    body = {"model": MODEL, "messages": messages, "max_tokens": 16, "temperature": 0, "ignore_eos": True}
    reply = httpx.post(f"{server.url}/v1/chat/completions", json=body, timeout=120, trust_env=False)
    assert reply.status_code == 200, reply.text
    decision = get(f"{server.admin}/decisions/{reply.headers['x-request-id']}").json()
    (attempt,) = decision["attempts"]
    assert attempt["token_ids"] == "sent"
    assert attempt["predicted"]["prompt_tokens"] == attempt["observed"]["prompt_tokens"]
    return reply.json()["choices"][0]["message"]["content"], attempt


def converse(server: Server, topic: str, turns: int) -> list[dict[str, Any]]:
    """The record of every turn of a conversation that opens with about 1,000 tokens."""
    told = " ".join(f"{topic} {number}" for number in range(250))
    messages = [{"role": "system", "content": told}, {"role": "user", "content": "What is this about?"}]
    records = []
    for _ in range(turns):
        said, record = ask(server, messages)
        records.append(record)
        messages += [{"role": "assistant", "content": said}, {"role": "user", "content": "Go on, please."}]
    return records


def off_by(record: dict[str, Any]) -> int:
    return abs(record["predicted"]["cached_tokens"] - record["observed"]["cached_tokens"])


def test_every_turn_lands_on_its_cache(fleet: Server) -> None:
    for topic in ("herd", "flock", "pack"):
        first, *others = converse(fleet, topic, turns=4)
        assert 750 < first["observed"]["prompt_tokens"] < 1500
        assert {record["replica"] for record in others} == {first["replica"]}
        for before, record in zip([first, *others], others, strict=False):
            kept = before["observed"]["prompt_tokens"] // BLOCK * BLOCK
            assert record["observed"]["cached_tokens"] >= kept - BLOCK
            assert off_by(record) <= BLOCK


def test_predictions_follow_what_a_small_cache_evicts(fleet: Server) -> None:
    """More conversations than fit, each asked again when much of it is gone."""
    topics = [f"topic {number}" for number in range(9)]
    for topic in topics:
        converse(fleet, topic, turns=1)
    again = [converse(fleet, topic, turns=1)[0] for topic in topics]
    assert any(record["observed"]["cached_tokens"] == 0 for record in again)
    assert [off_by(record) <= BLOCK for record in again] == [True] * len(again)


def test_nobody_lost_trust_over_it(fleet: Server) -> None:
    assert set(trusts(fleet)) == {"exact"}
    metrics = get(f"{fleet.admin}/metrics").text
    unexplained = f'herd_prediction_misses_total{{cause="unexplained",model="{MODEL}"}} 0.0'
    assert unexplained in metrics
