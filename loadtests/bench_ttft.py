"""The first-token benchmark: how long the first token takes cold, and where the prompt is cached already.

Conversations through one endpoint, one request at a time: each opens with a text that nobody sent before,
asks the same again, then goes on; so on real vLLM one sees what KV cache saves. Without --url three of them
are started on this machine, with the demo model, and `herd route` in front. Run through `scripts/bench ttft`.
"""

from __future__ import annotations

import contextlib
import os
import statistics
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import click
import httpx
import msgspec

from loadtests import contenders, engines, prompts
from loadtests.bench import BenchFailed, Cores, machine, ready, run_bench, trusting
from loadtests.contenders import HERD, Contender
from loadtests.prompts import Messages
from loadtests.report import table, where

ENGINES = 3
POLICY = "kv_aware"
OUTPUT_TOKENS = 16
REPLY_S = 300.0
# In order: what a conversation has in cache, if its replica is found again.
COLD, REPEAT, TURN_2, TURN_3 = KINDS = ("cold", "the same again", "next turn", "the turn after")


@dataclass(frozen=True, slots=True)
class Answer:
    """One reply: its time to first token, its text, tokens of the prompt and of these cached, who gave it."""

    kind: str
    first_s: float
    text: str
    prompt_tokens: int
    cached_tokens: int
    replica: str | None


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What is asked; `admin`: where a router tells its decisions, if anywhere."""

    url: str
    admin: str | None
    model: str


async def ask(client: httpx.AsyncClient, at: Endpoint, kind: str, messages: Messages) -> Answer:
    """One stream, read to its end; raises BenchFailed for what is none."""
    body = {"model": at.model, "messages": messages, "max_tokens": OUTPUT_TOKENS, "temperature": 0}
    options = {"ignore_eos": True, "stream": True, "stream_options": {"include_usage": True}}
    began = time.perf_counter()
    first_s, said, usage = None, [], None
    url = f"{at.url}/v1/chat/completions"
    async with client.stream("POST", url, json=body | options) as reply:
        if reply.status_code != httpx.codes.OK:
            raise BenchFailed(f"{url} answers {reply.status_code}: {(await reply.aread())[:300]!r}")
        async for line in reply.aiter_lines():
            if not line.startswith("data: {"):
                continue
            event: dict[str, Any] = msgspec.json.decode(line.removeprefix("data: "))
            usage = event.get("usage") or usage
            for choice in event.get("choices", ()):
                said.append(choice["delta"].get("content") or "")
                if said[-1] and first_s is None:
                    first_s = time.perf_counter() - began
    if first_s is None or usage is None:
        raise BenchFailed(f"{url} said nothing, or no usage")
    cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
    replica = await replica_of(client, at.admin, reply.headers.get("x-request-id"))
    return Answer(kind, first_s, "".join(said), usage["prompt_tokens"], cached, replica)


async def replica_of(client: httpx.AsyncClient, admin: str | None, request_id: str | None) -> str | None:
    """Which replica answered, as the router's admin port tells it."""
    if admin is None or request_id is None:
        return None
    told = await client.get(f"{admin}/decisions/{request_id}")
    return str(told.json()["attempts"][-1]["replica"]) if told.is_success else None


async def converse(at: Endpoint, conversations: int, size: int) -> list[list[Answer]]:
    """Each conversation's answers in order; all conversations take their first turn, then all the next."""
    run = os.urandom(4).hex()  # the endpoint may remember those of another run
    chats: list[Messages] = [
        prompts.question(prompts.text(size, f"{run}/{n}"), "What is this about?")
        for n in range(conversations)
    ]
    answers: list[list[Answer]] = [[] for _ in chats]
    async with httpx.AsyncClient(trust_env=False, timeout=REPLY_S) as client:
        for kind in KINDS:
            for chat, given in zip(chats, answers, strict=True):
                if kind not in (COLD, REPEAT):
                    chat += [
                        {"role": "assistant", "content": given[-1].text},
                        {"role": "user", "content": "And what else?"},
                    ]
                given.append(await ask(client, at, kind, chat))
                click.echo(f"{kind}: {1000 * given[-1].first_s:.0f} ms", err=True)
    return answers


@contextlib.asynccontextmanager
async def own_fleet() -> AsyncIterator[Endpoint]:
    """Real vLLM on this machine's CPU with the demo model, and Herd in front."""
    async with engines.running(ENGINES, {}, kind="vllm") as behind:
        herd = Contender(HERD, contenders.herd(POLICY))
        with contenders.running(herd, [engine.url for engine in behind]) as router:
            await ready(HERD, router, engines.MODEL)
            await trusting(router)
            urls = (f"http://127.0.0.1:{port}" for port in (router.port, router.admin_port))
            yield Endpoint(*urls, engines.MODEL)


@contextlib.asynccontextmanager
async def fleet_at(url: str, admin: str | None) -> AsyncIterator[Endpoint]:
    """An endpoint that others started."""
    async with httpx.AsyncClient(trust_env=False) as client:
        try:
            models = (await client.get(f"{url}/v1/models")).raise_for_status().json()["data"]
        except httpx.HTTPError as error:
            raise BenchFailed(f"{url} does not tell its models: {error}") from None
    yield Endpoint(url, admin or beside(url), models[0]["id"])


def beside(url: str) -> str:
    """Where Herd's admin port is unless told otherwise: the next one."""
    parts = urlsplit(url)
    return f"http://{parts.hostname}:{(parts.port or 80) + 1}"


async def bench(url: str | None, admin: str | None, conversations: int, size: int) -> list[list[Answer]]:
    """The conversations, with what is there or with what is started for them."""
    async with fleet_at(url, admin) if url else own_fleet() as at:
        return await converse(at, conversations, size)


def report(answers: Sequence[Sequence[Answer]], measured_on: str) -> str:
    """A row per kind of turn, then how often a conversation found its replica again."""
    head = [
        "turn",
        "requests",
        "prompt tokens",
        "cached tokens",
        "TTFT p50 ms",
        "p90 ms",
        "of cold",
        "same replica",
    ]
    cold = statistics.median(given[0].first_s for given in answers)
    rows = [_row(place, answers, cold) for place in range(len(KINDS))]
    used = {one.replica for given in answers for one in given}
    spread = "" if None in used else f" on {len(used)} replicas"
    told = f"{len(answers)} conversations{spread}, one request at a time."
    return f"{measured_on} {told}\n\n{table(head, rows)}"


def _row(place: int, answers: Sequence[Sequence[Answer]], cold_s: float) -> list[str]:
    these = [given[place] for given in answers]
    times = [one.first_s for one in these]
    stayed = sum(one.replica == given[0].replica for one, given in zip(these, answers, strict=True))
    known = all(one.replica for one in these)
    return [
        KINDS[place],
        str(len(these)),
        f"{statistics.median(one.prompt_tokens for one in these):.0f}",
        f"{statistics.median(one.cached_tokens for one in these):.0f}",
        f"{1000 * statistics.median(times):.0f}",
        f"{1000 * statistics.quantiles(times, n=10, method='inclusive')[8]:.0f}" if len(times) > 1 else "-",
        f"{statistics.median(times) / cold_s:.2f}",
        f"{stayed} of {len(these)}" if known else "-",
    ]


@click.command()
@click.option("--url", default=None, help="An endpoint, e.g. http://127.0.0.1:8000; default: start a fleet.")
@click.option("--admin-url", default=None, help="Its admin port.  [default: the port after that of --url]")
@click.option("--conversations", default=6, show_default=True)
@click.option(
    "--size", default=4500, show_default=True, help="Characters of the first prompt, some 2,000 tokens."
)
def main(url: str | None, admin_url: str | None, conversations: int, size: int) -> None:
    """Compare the time to first token of new prompts with that of known ones."""
    answers = run_bench(bench(url, admin_url, conversations, size))
    click.echo(report(answers, where(machine(Cores.of_machine()))))


if __name__ == "__main__":
    main()
