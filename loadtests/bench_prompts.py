"""The prompts benchmark: what a request with a long prompt costs a router that places by KV cache.

Herd by `kv_aware` with token ids and usage on, its peers by `cache_aware`, in front of simulated engines
whose modelled time is next to nothing: so their own CPU, on the core of the load, limits the rate, and the
figure is CPU per request of the router's process tree. Time to first token is that of a request alone, since
behind busy engines it tells how busy they are. Run through `scripts/bench prompts`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any
from urllib.parse import urlsplit

import click
import msgspec

from loadtests import account, contenders, engines, generator, prompts
from loadtests.bench import BenchFailed, Cores, chosen, install_peers, machine, ready, run_bench, trusting
from loadtests.contenders import DIRECT, HERD, Contender
from loadtests.cpu import cpu_seconds, rss_bytes
from loadtests.generator import Ask, Load, Sample
from loadtests.open_loop import Connections
from loadtests.oracle import Oracle
from loadtests.report import added, compared, spread, table, where
from workers import demo_model
from workers.engine import DEMO
from workers.process import EngineProcess

POLICY = "kv_aware"
PEERS_POLICY = "cache_aware"
OUTPUT_TOKENS = 3
GROUPS = 16
# A step takes 1 ms, so that each token of a stream is an event of its own. Prefill is 20 times as fast as by
# the preset 8b-h100: 23 ms for 32 KB, little, yet a reason to send a prompt where it is cached.
ENGINE_ARGS = {
    "step-time": "0.001,1.6e-6,0,0",
    "max-num-batched-tokens": 131_072,
    "max-model-len": 131_072,
}
BLOCK_SIZE = 16
# All groups of the longest prompts fit even into one engine; of 32 KB prompts that are all different, 70.
KV_TOKENS = 1_000_000
IDLE_S = 1.0
REQUESTS = "herd_requests_total"


@dataclass(frozen=True, slots=True)
class Kind:
    """Requests of so many characters, streamed or not; with `groups`, 90 % are the same within one of them.

    `rate`: more of them than the engines answer in a second; so many are made before they are sent.
    """

    name: str
    size: int
    groups: int = 0
    stream: bool = True
    rate: int = 150


KINDS = (
    Kind("32 KB distinct", 32 << 10),
    Kind("32 KB sharing 90 %", 32 << 10, GROUPS),
    Kind("128 KB sharing 90 %", 128 << 10, GROUPS, rate=40),
    Kind("small", 100, stream=False, rate=800),
)


@dataclass(frozen=True, slots=True)
class Target:
    """What is measured: its ports, the process trees whose CPU counts, its engines, its admin port's URL."""

    ports: list[int]
    pids: list[int]
    engines: list[str]
    admin: str | None = None

    def cpu_s(self) -> float:
        return sum(map(cpu_seconds, self.pids))

    def rss_bytes(self) -> int:
        return sum(map(rss_bytes, self.pids))


@dataclass(frozen=True, slots=True)
class Measured:
    """One kind of request through one router in one round, on all connections and on one alone.

    `engines`: what these counted meanwhile. Of Herd: what it counted, and what became of the token ids of the
    last requests; `listening`: its CPU while such requests went past it, straight to its engines.
    """

    router: str
    round: int
    kind: str
    busy: Sample
    alone: Sample
    idle_ms_per_s: float
    rss_bytes: int
    engines: Counter[str]
    herd: Counter[str]
    token_ids: Counter[str]
    listening: Sample | None = None

    @property
    def cost_us(self) -> float:
        """CPU microseconds per request."""
        return per_request_us(self.busy)

    @property
    def cached(self) -> float:
        """Of the engines' prompt tokens, in percent."""
        return (
            100 * self.engines["vllm:prompt_tokens_cached_total"] / self.engines["vllm:prompt_tokens_total"]
        )


def per_request_us(sample: Sample) -> float:
    """CPU microseconds per request."""
    return 1e6 * sample.cpu_s / sample.requests


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured, for how long, how often.

    `ramp_s`: after so long connections are open and code is warm. `kv_tokens`: what an engine's cache holds.
    """

    kinds: tuple[Kind, ...]
    connections: int
    seconds: float
    rounds: int
    ramp_s: float = 2.0
    engines: int = 4
    kv_tokens: int = KV_TOKENS

    def engine_args(self) -> dict[str, Any]:
        """Flags of the engines."""
        return {
            **ENGINE_ARGS,
            "block-size": BLOCK_SIZE,
            "num-gpu-blocks-override": self.kv_tokens // BLOCK_SIZE + 1,
        }


def asks(kind: Kind, port: int, oracle: Oracle, seed: str) -> Iterator[Ask]:
    """Requests that were never made before, without end."""
    groups = shuffled(kind.groups, Random(seed))
    for number in itertools.count():
        own = f"{seed}/{number}"
        if kind.groups:
            messages = prompts.chat(kind.size, own, f"{kind.name}/{next(groups)}")
        elif kind.stream:
            messages = prompts.chat(kind.size, own)
        else:
            messages = prompts.question("You are a helpful assistant.", prompts.text(kind.size, own))
        body = prompts.body(engines.MODEL, messages, OUTPUT_TOKENS, kind.stream)
        yield Ask(generator.message(port, body), oracle.says(messages, OUTPUT_TOKENS))


def shuffled(count: int, chance: Random) -> Iterator[int]:
    """All numbers below `count` in some order, then all again in another."""
    while True:
        yield from chance.sample(range(count), count)


def made(asks: Iterator[Ask], count: int) -> Iterator[Ask]:
    """The same, so many of them made now, since making them takes CPU."""
    return itertools.chain(list(itertools.islice(asks, count)), asks)


async def bench(
    plan: Plan, routers: list[Contender], direct: bool, source: str, oracle: Oracle, cores: Cores
) -> list[Measured]:
    """All rounds. Herd follows its engines' caches: it has its own, so that it rests while others work."""
    async with contextlib.AsyncExitStack() as stack:
        targets: dict[str, Target] = {}
        herds = [router for router in routers if router.name == HERD]
        others = [router for router in routers if router.name != HERD]
        for group, bare in ((others, direct), (herds, False)):
            if not (group or bare):
                continue
            behind = await stack.enter_async_context(
                engines.running(plan.engines, plan.engine_args(), source=source)
            )
            if bare:
                targets[DIRECT] = straight(behind)
            for router in group:
                urls = [engine.url for engine in behind]
                running = stack.enter_context(contenders.running(router, urls, cores.router))
                await ready(router.name, running, engines.MODEL)
                admin = f"http://127.0.0.1:{running.admin_port}" if router.name == HERD else None
                if admin:
                    await trusting(running)
                targets[router.name] = Target([running.port], [running.pid], urls, admin)
        return [one for n in range(plan.rounds) for one in await one_round(n, plan, targets, oracle)]


def straight(behind: Sequence[EngineProcess]) -> Target:
    """The engines themselves, each with its share of the connections."""
    urls = [engine.url for engine in behind]
    return Target([urlsplit(url).port or 0 for url in urls], [engine.pid for engine in behind], urls)


async def one_round(number: int, plan: Plan, targets: dict[str, Target], oracle: Oracle) -> list[Measured]:
    """Each kind on each router in turn, so that what is compared was measured close together."""
    idle = {name: await idle_ms_per_s(target) for name, target in targets.items()}
    found = []
    for kind in plan.kinds:
        for name, target in targets.items():
            try:
                one = await measure(name, number, kind, plan, target, oracle, idle[name])
            except (generator.BrokenReply, OSError) as error:
                raise BenchFailed(f"{name}, {kind.name}: {error}") from None
            click.echo(f"round {number + 1}, {name}, {kind.name}: {one.cost_us:.0f} us", err=True)
            found.append(one)
    return found


async def idle_ms_per_s(target: Target) -> float:
    """CPU that is used while nothing is asked."""
    before = target.cpu_s()
    await asyncio.sleep(IDLE_S)
    return 1000 * (target.cpu_s() - before) / IDLE_S


async def measure(
    name: str, number: int, kind: Kind, plan: Plan, target: Target, oracle: Oracle, idle: float
) -> Measured:
    """One kind through one router: each group once, then on all connections, then on one."""
    fresh = asks(kind, target.ports[0], oracle, f"{name}/{number}/{kind.name}")
    with contextlib.closing(Connections(target.ports[0])) as warm:
        for ask in itertools.islice(fresh, kind.groups):
            await warm.ask(ask)
    ahead = round(kind.rate * (plan.ramp_s + plan.seconds))
    load = Load(made(fresh, ahead), plan.connections, plan.ramp_s, kind.stream)
    before = await counts(target)
    busy = await generator.run(load, target.ports, plan.seconds, target.cpu_s)
    engines_told, herd_told = (after - was for after, was in zip(await counts(target), before, strict=True))
    decided = await account.decisions(target.admin, round(herd_told[REQUESTS])) if target.admin else []
    one = dataclasses.replace(load, connections=1, ramp_s=0.0)
    alone = await generator.run(one, target.ports, plan.seconds / 2, target.cpu_s)
    rss = target.rss_bytes()
    ids = account.token_ids(decided)
    past = [urlsplit(url).port or 0 for url in target.engines]
    listening = await generator.run(load, past, plan.seconds / 2, target.cpu_s) if target.admin else None
    return Measured(name, number, kind.name, busy, alone, idle, rss, engines_told, herd_told, ids, listening)


async def counts(target: Target) -> tuple[Counter[str], Counter[str]]:
    """What the engines have counted, and what Herd has."""
    herd = [target.admin] if target.admin else []
    return await account.counted(target.engines), await account.counted(herd)


def report(found: Sequence[Measured], measured_on: str) -> str:
    """A table per kind, a row per router; then what they do at rest, and the proof that Herd knew."""
    parts = [measured_on]
    for kind in dict.fromkeys(one.kind for one in found):
        of_kind = [one for one in found if one.kind == kind]
        parts += [f"### {kind}", _table(of_kind), *_proof(of_kind)]
    parts += ["### At rest", _at_rest(found)]
    parts.append(
        f"`{DIRECT}`: no router; its CPU and memory are those of the engines. *Of Herd's*: a router's CPU by "
        "Herd's in the same round. *Added TTFT*: of one request at a time (small: until the whole reply), "
        f"beyond `{DIRECT}` in the same round. *Cached*: prompt tokens that engines had in cache. Herd's CPU "
        f"includes their KV events: each block of {BLOCK_SIZE} tokens that they compute or drop."
    )
    return "\n\n".join(parts)


def _table(found: Sequence[Measured]) -> str:
    head = ["router", "CPU us/request", "of Herd's", "requests/s", "added TTFT p50 ms", "cached %", "RSS MB"]
    return table(head, (_row(found, name) for name in _names(found)))


def _row(found: Sequence[Measured], name: str) -> list[str]:
    mine = [one for one in found if one.router == name]
    return [
        name,
        spread([one.cost_us for one in mine], 0),
        compared({(one.router, one.round): one.cost_us for one in found}, name),
        spread([one.busy.requests / one.busy.seconds for one in mine], 0),
        added({(one.router, one.round): one.alone.first_p50_ms for one in found}, name),
        spread([one.cached for one in mine], 0),
        spread([one.rss_bytes / 1e6 for one in mine], 0),
    ]


def _at_rest(found: Sequence[Measured]) -> str:
    kind = found[0].kind
    rest = [
        [name, spread([one.idle_ms_per_s for one in found if (one.router, one.kind) == (name, kind)])]
        for name in _names(found)
    ]
    return table(["router", "CPU ms/s"], rest)


def _proof(found: Sequence[Measured]) -> list[str]:
    """What Herd says of its requests of this kind."""
    ids: Counter[str] = Counter()
    total: Counter[str] = Counter()
    for one in found:
        ids.update(one.token_ids)
        total.update(one.herd)
    if not ids:
        return []
    asked, tokens = total[REQUESTS], total["herd_prompt_tokens_total"]
    others = "".join(f"; {why}: {count}" for why, count in ids.items() if why != account.SENT)
    cached = 100 * total["herd_cached_tokens_total"] / tokens
    listening = spread([per_request_us(one.listening) for one in found if one.listening], 0)
    return [
        f"Herd sent token ids with {ids[account.SENT]} of {ids.total()} requests{others}. "
        f"Engines reported {tokens / asked:.0f} prompt tokens each to it, {cached:.0f} % of them cached. "
        f"Following KV events alone, while such requests went past it: {listening} us per request."
    ]


def _names(found: Sequence[Measured]) -> list[str]:
    return list(dict.fromkeys(one.router for one in found))


def broken(found: Sequence[Measured]) -> list[str]:
    """One line per measurement in which a reply was not what the engines say to the prompt."""
    return [
        f"{one.router}, {one.kind}: {'; '.join(sample.broken)}"
        for one in found
        for sample in (one.busy, one.alone, one.listening)
        if sample and sample.broken
    ]


@click.command()
@click.option("--connections", default=4, show_default=True, help="Requests at a time.")
@click.option("--seconds", default=4.0, show_default=True, help="Length of one measurement.")
@click.option("--rounds", default=3, show_default=True)
@click.option(
    "--kv-tokens",
    type=click.IntRange(200_000),
    default=KV_TOKENS,
    show_default=True,
    help="What an engine's cache holds.",
)
@click.option("--routers", default=None, help="Only these, e.g. direct,herd; default: all that are here.")
@click.option("--model", default=DEMO, show_default=True, help="Whose tokenizer: a model's directory.")
@click.option("--peers", is_flag=True, help=f"First install {', '.join(contenders.PEERS)}.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="All samples.")
def main(
    connections: int, seconds: float, rounds: int, kv_tokens: int, routers: str | None, model: str,
    peers: bool, json_file: Path | None,
) -> None:  # fmt: skip
    """Compare routers on long prompts: CPU per request, added time to first token, memory."""
    if peers:
        install_peers()
    directory = demo_model.tokenizer_dir() if model == DEMO else Path(model)
    here = contenders.contenders(contenders.herd(POLICY), PEERS_POLICY)
    these, direct = chosen(here, routers)
    plan = Plan(KINDS, connections, seconds, rounds, kv_tokens=kv_tokens)
    cores = Cores.of_machine()
    found = run_bench(bench(plan, these, direct, model, Oracle(directory), cores), cores)
    if json_file:
        result = {"machine": machine(cores), "plan": plan, "found": found}
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    click.echo(report(found, where(machine(cores))))
    if faults := broken(found):
        raise click.ClickException("replies were broken:\n" + "\n".join(faults))


if __name__ == "__main__":
    main()
