"""Streams outlive real vLLM engines: killed while ten streams run, nobody notices.

Two kills by default, as an engine takes half a minute to come back; HERD_KILLS=5 is fifty streams over five.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

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

KILLS, STREAMS = int(os.environ.get("HERD_KILLS", "2")), 10
TOKENS = 160
TRUST_S, DOWN_S = 120.0, 60.0
ARGS = {"max-model-len": 2048, "block-size": 32}


@dataclass(slots=True)
class Fleet:
    """Two engines behind a router."""

    start: Start
    engines: list[Server]
    router: Server

    def replicas(self) -> dict[str, Any]:
        return {told["id"]: told for told in get(f"{self.router.admin}/fleet").json()["replicas"]}

    def trusted(self) -> bool:
        return all(told["trust"] == "exact" and told["state"] == "ready" for told in self.replicas().values())

    def busiest(self) -> int:
        """The engine that decodes most streams, once it has enough of them."""
        told = self.replicas()
        decoding = [told[engine.url]["decoding"] for engine in self.engines]
        return decoding.index(max(decoding)) if max(decoding) >= STREAMS // 3 else -1

    def kill(self, number: int, core_only: bool) -> None:
        """The engine's core, of which its server then tells; or all of it at once, as when a machine goes."""
        running = self.engines[number].running
        if core_only:
            os.kill(core_of(running.process.pid), signal.SIGKILL)
        else:
            running.kill()

    def revive(self, number: int) -> None:
        """Another engine in its place, when nothing of the old one is left."""
        self.engines[number].running.kill()
        port = urlsplit(self.engines[number].url).port
        self.engines[number] = started(self.start, port)
        eventually(self.trusted, TRUST_S)


def core_of(pid: int) -> int:
    """The process of an engine's that computes."""
    for task in Path(f"/proc/{pid}/task").iterdir():
        for child in (task / "children").read_text().split():
            if b"EngineCore" in Path(f"/proc/{child}/cmdline").read_bytes():
                return int(child)
            if found := core_of(int(child)):
                return found
    return 0


def started(start: Start, port: int | None = None) -> Server:
    engine = start_engine(start, "vllm", ARGS, port)
    assert isinstance(engine.process, Running)
    return Server(engine.process, engine.url)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Fleet]:
    with processes(tmp_path_factory.mktemp("engines")) as start:
        engines = [started(start) for _ in range(2)]
        server = router(start, *engines, flags=("--policy", "kv_aware", "--tokenizer", "demo"))
        fleet = Fleet(start, engines, server)
        eventually(fleet.trusted, TRUST_S)
        yield fleet


def asked(number: int) -> dict[str, Any]:
    """One of the streams; the model says nonsense, some of it in half characters."""
    topics = ("the herd", "日本語の牛と山羊", "🐄🐑🐐", "été à la ferme", "code: def f(x):")
    messages = [{"role": "user", "content": f"Tell {number} of {topics[number % len(topics)]}."}]
    return {
        "model": MODEL,
        "messages": messages,
        "max_tokens": TOKENS,
        "min_tokens": TOKENS // 2,
        "temperature": 0,
        "ignore_eos": True,
        "stream": True,
        "return_token_ids": True,
        "stream_options": {"include_usage": True},
        **({"stop": ["qzx", "\n\n\n\n"]} if number % 3 == 0 else {}),
    }


async def said(client: httpx.AsyncClient, url: str, number: int) -> dict[str, Any]:
    """What one stream comes to."""
    text, ids, finish, usage, known, last = "", [], None, None, set(), ""
    async with client.stream("POST", f"{url}/v1/chat/completions", json=asked(number)) as reply:
        assert reply.status_code == 200
        async for line in reply.aiter_lines():
            last = line.removeprefix("data: ") or last
            if not line.startswith("data: {"):
                continue
            chunk = json.loads(last)
            assert "error" not in chunk, last
            known.add((chunk["id"], chunk["created"]))
            usage = chunk.get("usage") or usage
            for choice in chunk["choices"]:
                text += choice["delta"].get("content") or ""
                ids += choice.get("token_ids") or []
                finish = choice["finish_reason"] or finish
    assert len(known) == 1 and last == "[DONE]"
    counts = {name: usage[name] for name in ("prompt_tokens", "completion_tokens", "total_tokens")}
    return {"text": text, "ids": ids, "finish": finish, "usage": counts}


def test_streams_outlive_their_engines(fleet: Fleet) -> None:
    numbers = range(STREAMS)

    async def all_of_them(client: httpx.AsyncClient) -> list[dict[str, Any]]:
        return await asyncio.gather(*(said(client, fleet.router.url, number) for number in numbers))

    async def undisturbed() -> list[dict[str, Any]]:
        async with httpx.AsyncClient(timeout=300, trust_env=False) as client:
            return await all_of_them(client)

    async def disturbed(core_only: bool) -> tuple[list[dict[str, Any]], int]:
        async with httpx.AsyncClient(timeout=300, trust_env=False) as client:
            streams = asyncio.create_task(all_of_them(client))
            await asyncio.to_thread(eventually, lambda: fleet.busiest() >= 0, DOWN_S)
            victim = fleet.busiest()
            fleet.kill(victim, core_only)
            return await streams, victim

    calm = asyncio.run(undisturbed())
    for kill in range(KILLS):
        stormy, victim = asyncio.run(disturbed(core_only=kill % 2 == 0))
        assert stormy == calm
        if kill < KILLS - 1:
            fleet.revive(victim)
    metrics = get(f"{fleet.router.admin}/metrics").text
    continued = f'herd_stream_continuations_total{{model="{MODEL}",outcome="continued"}}'
    (line,) = [line for line in metrics.splitlines() if line.startswith(continued)]
    assert float(line.rpartition(" ")[2]) >= KILLS
