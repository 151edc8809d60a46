"""The cache benchmark: how well routers place requests whose prefixes do not all fit into every cache.

Simulated engines, each with room for 13 of 40 prefixes of 8 KB; requests come open loop, each with one of the
prefixes and a question of its own. Hits are what the engines report: cached tokens of prompt tokens. Every
contender gets new engines. Run through `scripts/bench cache`.
"""

from __future__ import annotations

import asyncio
import contextlib
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from pathlib import Path
from random import Random

import click
import msgspec

from loadtests import account, contenders, engines, generator, open_loop, prompts
from loadtests.bench import BenchFailed, Cores, chosen, install_peers, machine, ready, run_bench, trusting
from loadtests.contenders import HERD, Contender, haproxy, herd, peer
from loadtests.generator import Ask
from loadtests.oracle import BLOCK_SIZE, Oracle
from loadtests.report import spread, table, where
from workers import demo_model
from workers.engine import DEMO

ENGINES = 4
EXACT = f"{HERD} kv_aware"
GROUPS = 40
PREFIX = 8 << 10
# Prefixes that one engine holds: all four together hold each once, and some twice.
HELD = 13
QUESTION = 40
OUTPUT_TOKENS = 8
# Requests a second.
LOADS = {"full": 60.0, "half": 30.0}
# What a missed character costs an engine: 0.5 ms for 64 of them, about what an 8B model on an H100 takes.
PREFILL_S = 0.5e-3 / 64
# Seconds of a step, and of a decoding sequence and a context token in it: those of the preset 8b-h100.
STEP_S, SEQUENCE_S, CONTEXT_S = 6e-3, 45e-6, 5.6e-8
# Routers have found all their engines after this long.
SETTLE_S = 2.0


@dataclass(frozen=True, slots=True)
class Workload:
    """The requests of a run, the tokens of their prompts, and how many of those could come from a cache."""

    asks: list[Ask]
    prompt_tokens: int
    cacheable: int


@dataclass(frozen=True, slots=True)
class Measured:
    """One router in one round. Counts are those of the run alone.

    Of Herd: what it counted, and whether its predictions of cached tokens came true to the token.
    """

    router: str
    round: int
    prompt_tokens: float
    cached_tokens: float
    requests: list[int]
    extra_calls: float
    first_ms: list[float]
    herd: Counter[str]
    came_true: list[bool]

    @property
    def hits(self) -> float:
        """Cached tokens of prompt tokens, in percent."""
        return 100 * self.cached_tokens / self.prompt_tokens


@dataclass(frozen=True, slots=True)
class Plan:
    """Requests a second, for how long, how often."""

    rate: float
    seconds: float
    rounds: int


def competitors() -> list[Contender]:
    """Herd by three policies, and its peers that are installed by their best for prefixes."""
    ours = [
        Contender(EXACT, herd("kv_aware")),
        Contender("herd consistent_hash", herd("consistent_hash")),
        Contender("herd least_requests", herd("least_requests")),
    ]
    theirs = [
        Contender(f"{name} cache_aware", peer(name, "cache_aware"))
        for name in contenders.PEERS
        if contenders.installed(name)
    ]
    if contenders.installed("vllm-router"):
        theirs.append(Contender("vllm-router kv_aware", contenders.vllm_router_by_events))
    floor = [Contender("haproxy roundrobin", haproxy)] if contenders.haproxy_binary() else []
    return ours + theirs + floor


def messages(group: int, asked: str) -> prompts.Messages:
    """The prompt of one request."""
    return prompts.question(prompts.text(PREFIX, f"group {group}"), prompts.text(QUESTION, asked))


def engine_args(oracle: Oracle) -> dict[str, object]:
    """Flags for engines that hold so many prefixes, and compute a character in that time."""
    lengths = [len(oracle.tokens(messages(group, "any"))) for group in range(GROUPS)]
    blocks = ceil(statistics.mean(lengths) / BLOCK_SIZE)
    prefill_s = PREFILL_S * (PREFIX + QUESTION) / statistics.mean(lengths)
    return {
        "block-size": BLOCK_SIZE,
        "num-gpu-blocks-override": HELD * blocks + 1,  # one is the engine's own
        "step-time": f"{STEP_S},{prefill_s},{SEQUENCE_S},{CONTEXT_S}",
    }


def workload(count: int, port: int, oracle: Oracle, seed: str) -> Workload:
    """So many requests, each of a group that is drawn."""
    chance = Random(seed)
    asks, total, cacheable = [], 0, 0
    before: dict[int, list[int]] = {}
    for number in range(count):
        group = chance.randrange(GROUPS)
        said = messages(group, f"{seed}/{number}")
        tokens = oracle.tokens(said)
        total += len(tokens)
        cacheable += shared(tokens, before.get(group, []))
        before[group] = tokens
        body = prompts.body(engines.MODEL, said, OUTPUT_TOKENS, stream=True)
        asks.append(Ask(generator.message(port, body), oracle.says(said, OUTPUT_TOKENS)))
    return Workload(asks, total, cacheable)


def shared(tokens: Sequence[int], before: Sequence[int]) -> int:
    """How many tokens a cache that holds one prompt saves another: whole blocks of their common beginning."""
    same = next((n for n, pair in enumerate(zip(tokens, before, strict=False)) if pair[0] != pair[1]), 0)
    return same // BLOCK_SIZE * BLOCK_SIZE


async def bench(
    plan: Plan, routers: Sequence[Contender], source: str, oracle: Oracle, cores: Cores
) -> tuple[list[Measured], float]:
    """All rounds, and what part of the prompt tokens, in percent, could have been hits in them."""
    found, ceilings = [], []
    for number in range(plan.rounds):
        for router in routers:
            one, ceiling = await measure(number, plan, router, source, oracle, cores)
            click.echo(f"round {number + 1}, {router.name}: {one.hits:.1f} % hits", err=True)
            found.append(one)
        ceilings.append(ceiling)
    return found, statistics.mean(ceilings)


async def measure(
    number: int, plan: Plan, router: Contender, source: str, oracle: Oracle, cores: Cores
) -> tuple[Measured, float]:
    """One router in front of engines that have seen nothing; the ceiling of hits in percent."""
    async with contextlib.AsyncExitStack() as stack:
        behind = await stack.enter_async_context(engines.running(ENGINES, engine_args(oracle), source=source))
        urls = [engine.url for engine in behind]
        running = stack.enter_context(contenders.running(router, urls, cores.router))
        await ready(router.name, running, engines.MODEL)
        await asyncio.sleep(SETTLE_S)
        if router.name == EXACT:
            await trusting(running)
        ours = router.name.startswith(HERD)
        admin = [f"http://127.0.0.1:{running.admin_port}"] if ours else []
        work = workload(round(plan.rate * plan.seconds), running.port, oracle, f"round {number}")
        moments = open_loop.arrivals(plan.rate, plan.seconds, f"round {number}")
        before = [await account.counted([url]) for url in urls]
        herd_before = await account.counted(admin)
        try:
            first_s = await open_loop.run(work.asks, moments, running.port)
        except (generator.BrokenReply, OSError) as error:
            raise BenchFailed(f"{router.name}: {error}") from None
        told = [await account.counted([url]) - was for url, was in zip(urls, before, strict=True)]
        herd_told = await account.counted(admin) - herd_before
        decided = await account.decisions(admin[0], len(work.asks)) if ours else []
    total = sum(told, Counter[str]())
    one = Measured(
        router=router.name,
        round=number,
        prompt_tokens=total["vllm:prompt_tokens_total"],
        cached_tokens=total["vllm:prompt_tokens_cached_total"],
        requests=[round(one["vllm:request_success_total"]) for one in told],
        extra_calls=total["http_requests_total"] - len(work.asks),
        first_ms=[1000 * s for s in first_s],
        herd=herd_told,
        came_true=account.came_true(decided),
    )
    return one, 100 * work.cacheable / work.prompt_tokens


def report(found: Sequence[Measured], ceiling: float, plan: Plan, measured_on: str) -> str:
    """A row per router, what the best could be, and how well Herd foretold."""
    requests = round(plan.rate * plan.seconds)
    head = ["router", "hits %", "requests per engine", "TTFT p50 ms", "p90", "p99", "extra calls"]
    names = list(dict.fromkeys(one.router for one in found))
    rows = [_row([one for one in found if one.router == name]) for name in names]
    work = f"{requests} requests at {plan.rate:g}/s, {GROUPS} prefixes of {PREFIX >> 10} KB"
    best = f"Ceiling: {ceiling:.1f} % hits. The first request of each prefix misses, {GROUPS} of {requests}"
    return "\n\n".join(
        [
            measured_on,
            f"{work}; {ENGINES} engines that hold {HELD} each.",
            table(head, rows),
            f"{best}; no question is asked twice. *Extra calls*: what else the router asked of the engines.",
            *_foretold(found),
        ]
    )


def _row(mine: Sequence[Measured]) -> list[str]:
    tenths = [statistics.quantiles(one.first_ms, n=100, method="inclusive") for one in mine]
    return [
        mine[0].router,
        spread([one.hits for one in mine]),
        ", ".join(map(str, mine[0].requests)),
        *(spread([of[percent - 1] for of in tenths], 0) for percent in (50, 90, 99)),
        spread([one.extra_calls for one in mine], 0),
    ]


def _foretold(found: Sequence[Measured]) -> list[str]:
    """How well Herd predicted the cached tokens that engines reported."""
    total: Counter[str] = Counter()
    true: list[bool] = []
    for one in found:
        total.update(one.herd)
        true += one.came_true
    if not (count := total["herd_predictions_total"]):
        return []
    misses = total["herd_prediction_misses_total"]
    cause = "herd_prediction_misses_total{cause="
    causes = [f"{key[len(cause) : -1]} {n:.0f}" for key, n in total.items() if key.startswith(cause)]
    near, exact = 100 * (1 - misses / count), 100 * statistics.mean(true)
    return [
        f"Herd predicted the cached tokens of {count:.0f} requests: {near:.1f} % within a block of what the "
        f"engine reported, {exact:.1f} % to the token. Misses by cause: {', '.join(causes) or 'none'}."
    ]


@click.command()
@click.option("--load", default="full", show_default=True, type=click.Choice(list(LOADS)))
@click.option("--seconds", default=10.0, show_default=True, help="For how long requests are sent.")
@click.option("--rounds", default=1, show_default=True)
@click.option("--routers", default=None, help="Only these, e.g. 'herd kv_aware,smg cache_aware'.")
@click.option("--also", multiple=True, help="One more: 'NAME=command {urls} {port}'.")
@click.option("--model", default=DEMO, show_default=True, help="Whose tokenizer: a model's directory.")
@click.option("--peers", is_flag=True, help=f"First install {', '.join(contenders.PEERS)}.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="All figures.")
def main(
    load: str, seconds: float, rounds: int, routers: str | None, also: tuple[str, ...], model: str,
    peers: bool, json_file: Path | None,
) -> None:  # fmt: skip
    """Compare placements: cache hits, requests per engine, time to first token, extra calls."""
    if peers:
        install_peers()
    directory = demo_model.tokenizer_dir() if model == DEMO else Path(model)
    these, _ = chosen(competitors(), routers, also)
    plan, cores = Plan(LOADS[load], seconds, rounds), Cores.of_machine()
    found, ceiling = run_bench(bench(plan, these, model, Oracle(directory), cores), cores)
    if json_file:
        result = {"machine": machine(cores), "plan": plan, "ceiling": ceiling, "found": found}
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    click.echo(report(found, ceiling, plan, where(machine(cores))))


if __name__ == "__main__":
    main()
