"""What many replicas do together, beside the same load divided among smaller fleets; and what they cost.

The load is made of units, one for each replica: so fleets of every size are given the same requests at the
same times, and only how many replicas may share them differs. Then what a router spends on a fleet: CPU time
of a decision, of gossip, memory of the index. Run through `scripts/bench scaleout`.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from heapq import merge
from itertools import count
from random import Random
from statistics import mean

import click
import msgspec
import numpy as np

from loadtests.bench_autoscale import PER_REPLICA, over_and_over
from loadtests.bench_index import BLOCK, CHAIN
from loadtests.bench_placement import HERD, Course, course
from loadtests.cpu import rss_bytes
from loadtests.outcomes import Outcome
from loadtests.report import table
from loadtests.trace import Arrival, compress, spread
from loadtests.twin import Lined, Policy, Report, simulate
from router.core import loads
from router.core.blocks import Prompt
from router.core.fleet import NOTHING_CACHED, Fleet, Replica, Trust, View
from router.core.kv_events import BlockStored
from router.core.placement import Placement, kv_aware
from router.gossip import HEAD, MOST_REPLICAS, ROUND_S
from router.port import Contact

# Engines are empty at first; figures are of what comes after the first part.
WARM_UP_S, LASTS_S = 100.0, 300.0
# By what a replica of a fleet of eight sustains.
LOAD = 0.8
# Units of a copy of the trace; fleets of so many replicas are what others are compared with.
REFERENCE = 8
FLEETS = (1, 2, 4, 8, 16, 32, 64)
# More than one router, where a fleet is that large.
ROUTERS = (2, 4)

# What a decision is measured with: a prompt's tokens, how many of them are cached, and where.
PROMPT_TOKENS, CACHED_TOKENS, HOLDERS = 7_000, 5_000, 4
PREFIX = range(1, CACHED_TOKENS + 1)
PARTS = ("keys of the prompt", "view", "kv_aware", "start, first token, end")
SIZES = (8, 16, 64, 128, 256, 1_000)
STREAMS = 4  # on each replica
PROMPTS, ROUNDS = 50, 7
# Replicas, shards, and blocks of each replica: not all of a cache's 25,000 where that would take long.
CACHES = ((8, 1, 25_000), (64, 1, 25_000), (256, 1, 8_000), (1_000, 1, 2_000), (1_000, 16, 25_000))
# Replicas, routers, shards.
GOSSIPS = ((64, 2, 1), (64, 4, 1), (256, 8, 1), (1_000, 16, 1), (1_000, 16, 16), (1_000, 32, 32))


# -- the load


def units(arrivals: Sequence[Arrival], number: int, speed: float, seed: int = 0) -> list[list[Arrival]]:
    """Loads for one replica each, in order of arrival: a conversation is whole in one of them.

    REFERENCE of them are a copy of the trace from a place of its own, with blocks of its own. `speed`: that
    of a copy. The number must be a multiple of REFERENCE.
    """
    copies, chance, laps = number // REFERENCE, Random(seed), over_and_over(arrivals, 2)
    ids, lasts = 1 + max(max(arrival.hash_ids) for arrival in laps), arrivals[-1].at
    found = []
    for copy in range(copies):
        begins = lasts * (copy + chance.random()) / copies
        cut = [replace(a, at=a.at - begins) for a in laps if begins <= a.at < begins + LASTS_S * speed]
        own = [replace(a, hash_ids=[id + copy * ids for id in a.hash_ids]) for a in cut]
        found += _dealt(compress(spread(own, chance), speed))
    return found


def _dealt(arrivals: Iterable[Arrival]) -> list[list[Arrival]]:
    """Each conversation to the next unit in turn. All share a first block, the second sets them apart."""
    turns, unit_of = count(), dict[tuple[int, ...], int]()
    dealt: list[list[Arrival]] = [[] for _ in range(REFERENCE)]
    for arrival in arrivals:
        conversation = tuple(arrival.hash_ids[:2])
        unit = unit_of.get(conversation)
        if unit is None:
            unit = unit_of[conversation] = next(turns) % REFERENCE
        dealt[unit].append(arrival)
    return dealt


# -- the twin


@dataclass(frozen=True, slots=True)
class Result:
    """All fleets of one size together. `requests`, `tokens`: that ended, a second. `goodput`: requests within
    their SLO, a second and replica. `decisions`: that were made for each request."""

    replicas: int
    routers: int
    requests: float
    tokens: float
    attainment: float
    goodput: float
    hit: float
    ttft_p50: float
    ttft_p99: float
    decisions: float

    @classmethod
    def of(cls, whole: Course, load: Sequence[Sequence[Arrival]], replicas: int, routers: int) -> Result:
        """Divides the units among fleets of so many replicas, and simulates each."""
        setting = replace(whole.setting, replicas=replicas, routers=routers)
        decisions = count()
        outcomes: list[Outcome] = []
        for first in range(0, len(load), replicas):
            part = merge(*load[first : first + replicas], key=lambda arrival: arrival.at)
            outcomes += simulate(part, setting, counted(decisions), seed=first).outcomes
        came = [o for o in outcomes if WARM_UP_S <= o.arrival.at < LASTS_S]
        served = [o for o in came if not o.refused]
        ended = [o for o in outcomes if not o.refused and WARM_UP_S <= ended_at(o) < LASTS_S]
        seconds = LASTS_S - WARM_UP_S
        p50, p99 = np.quantile([o.ttft for o in served], (0.5, 0.99))
        return cls(
            replicas,
            routers,
            requests=len(ended) / seconds,
            tokens=sum(o.arrival.output_length for o in ended) / seconds,
            attainment=mean(o.attained(whole.slo) for o in came),
            goodput=sum(o.attained(whole.slo) for o in came) / seconds / len(load),
            hit=sum(o.reported for o in served) / sum(o.arrival.input_length for o in served),
            ttft_p50=float(p50),
            ttft_p99=float(p99),
            decisions=next(decisions) / len(outcomes),
        )


def ended_at(outcome: Outcome) -> float:
    """When its last token came."""
    return outcome.arrival.at + outcome.ttft + outcome.tpot * (outcome.arrival.output_length - 1)


def counted(decisions: Iterator[int]) -> Lined:
    """Herd's policy behind its line, and how often it is asked."""
    lined = HERD["kv_aware"]
    assert isinstance(lined, Lined)

    def make() -> Policy:
        policy = lined.make()

        def asked(view: View, prompt: Prompt, reports: Mapping[str, Report]) -> Placement | None:
            next(decisions)
            return policy(view, prompt, reports)

        return asked

    return Lined(make, lined.admission)


def measure(
    fleets: Sequence[tuple[int, int]], load: float, seed: int, tell: Callable[[str], None]
) -> list[Result]:
    """Fleets of so many replicas and routers, all of the same units."""
    whole = course("conversation")
    given = units(whole.arrivals, max(size for size, _ in fleets), load * REFERENCE * PER_REPLICA, seed)
    results = []
    for replicas, routers in fleets:
        results.append(Result.of(whole, given, replicas, routers))
        tell(str(results[-1]))
    return results


def twin_report(results: Sequence[Result]) -> str:
    """A row for each size."""
    head = ["replicas", "routers", "fleets", "requests/s", "output tokens/s", "within SLO"]
    head += ["goodput per replica", f"by that of {REFERENCE}", "by that of 1"]
    head += ["hit rate", "TTFT p50 s", "TTFT p99 s", "decisions per request"]
    most = max(result.replicas for result in results)
    return table(head, [_row(result, most // result.replicas, results) for result in results])


def _row(own: Result, fleets: int, results: Sequence[Result]) -> list[str]:
    figures = [f"{own.requests:.1f}", f"{own.tokens:.0f}", f"{own.attainment:.4f}", f"{own.goodput:.4f}"]
    figures += [efficiency(own, results, by) for by in (REFERENCE, 1)]
    figures += [f"{own.hit:.3f}", f"{own.ttft_p50:.2f}", f"{own.ttft_p99:.1f}", f"{own.decisions:.2f}"]
    return [str(own.replicas), str(own.routers), str(fleets), *figures]


def efficiency(own: Result, results: Iterable[Result], by: int) -> str:
    """Goodput per replica by that of fleets of another size, with one router."""
    other = next((r for r in results if (r.replicas, r.routers) == (by, 1)), None)
    return f"{own.goodput / other.goodput:.3f}" if other else "-"


# -- what a router spends


def fleet_of(replicas: int) -> Fleet:
    """So many replicas whose events are followed, with ids as long as addresses are."""
    fleet = Fleet()
    for n in range(replicas):
        id = f"http://10.0.{n // 250}.{n % 250}:8000"
        fleet.joined(Replica(id, id, ("m",), "vllm", block_size=BLOCK, num_blocks=25_000), 0.0)
        fleet.trusted(id, Trust.EXACT, "", BLOCK)
    return fleet


def busy_fleet(replicas: int) -> Fleet:
    """With some streams on each replica, and one prefill."""
    fleet = fleet_of(replicas)
    for id in [standing.id for standing in fleet]:
        for n in range(STREAMS + 1):
            flight = fleet.started(id, 0.0, Prompt(PROMPT_TOKENS))
            if n < STREAMS:
                fleet.first_token(flight, 0.1)
    return fleet


def prompts(number: int) -> list[Prompt]:
    """Whose first tokens are those of PREFIX, and the others their own."""
    tails = range(1, PROMPT_TOKENS - CACHED_TOKENS + 1)
    return [
        Prompt(PROMPT_TOKENS, np.array([*PREFIX, *(1_000 * n + t for t in tails)], "uint32").tobytes())
        for n in range(number)
    ]


def holding(fleet: Fleet) -> Fleet:
    """The same, where HOLDERS replicas, far from each other, hold the prefix."""
    blocks = CACHED_TOKENS // BLOCK
    stored = BlockStored(list(range(1, 1 + blocks)), list(PREFIX[: blocks * BLOCK]), BLOCK, None)
    standings = list(fleet)
    for standing in standings[:: max(1, len(standings) // HOLDERS)][:HOLDERS]:
        fleet.apply(standing.id, stored)
    return fleet


def decision_us(replicas: int) -> dict[str, float]:
    """CPU microseconds of each part of a request's way, the least of some rounds."""
    fleet = holding(busy_fleet(replicas))
    rounds = [_parts_us(fleet, prompts(PROMPTS), 1.0 + n) for n in range(ROUNDS)]
    return {part: min(each[part] for each in rounds) for part in rounds[0]}


def _parts_us(fleet: Fleet, asked: Sequence[Prompt], now: float) -> dict[str, float]:
    clock, laps = time.process_time, list[tuple[float, ...]]()
    for prompt in asked:
        began = clock()
        prompt.keys(BLOCK)
        keyed = clock()
        view = fleet.view("m", now=now, prompt=prompt)
        viewed = clock()
        placement = kv_aware(view)
        chosen = clock()
        assert placement is not None
        id = placement.standing.id
        flight = fleet.started(id, now, prompt, view.cached.get(id, NOTHING_CACHED))
        fleet.first_token(flight, now + 0.1)
        fleet.finished(flight, now + 0.2, 100)
        laps.append((keyed - began, viewed - keyed, chosen - viewed, clock() - chosen))
    return dict(zip(PARTS, (1e6 * mean(times) for times in zip(*laps, strict=True)), strict=True))


def decision_report(sizes: Iterable[int]) -> str:
    """A row for each number of replicas."""
    rows = [(size, decision_us(size)) for size in sizes]
    head = ["replicas", *rows[0][1], "all, us", "decisions/s of a core"]
    return table(head, [_decision_row(size, parts) for size, parts in rows])


def _decision_row(size: int, parts: Mapping[str, float]) -> list[str]:
    whole = sum(parts.values())
    return [str(size), *(f"{us:.0f}" for us in parts.values()), f"{whole:.0f}", f"{1e6 / whole:,.0f}"]


# -- the index


@dataclass(frozen=True, slots=True)
class Filled:
    """An index after replicas told of blocks of their own, what the process grew by, CPU time of a block."""

    told: int
    kept: int
    grown_bytes: int
    apply_us: float

    @classmethod
    def of(cls, replicas: int, shards: int, blocks: int) -> Filled:
        """To be called in a process of its own. Of all replicas a share tells of `blocks` each."""
        fleet = fleet_of(replicas)
        own = list(fleet)[::shards]
        before, took = rss_bytes(os.getpid()), 0.0
        for replica, standing in enumerate(own):
            events = list(chains(replica * blocks, blocks))
            began = time.process_time()
            for event in events:
                fleet.apply(standing.id, event)
            took += time.process_time() - began
        told, grown = len(own) * blocks, rss_bytes(os.getpid()) - before
        return cls(told, len(fleet.index), grown, 1e6 * took / told)


def chains(first: int, blocks: int) -> Iterator[BlockStored]:
    """Prompts of CHAIN blocks that nobody else has, as many as make up so many blocks."""
    for begins in range(first, first + blocks, CHAIN):
        size = min(CHAIN, first + blocks - begins)
        names = [(begins + n + 1) * 0x9E3779B97F4A7C15 % 2**64 for n in range(size)]
        yield BlockStored(names, [begins] * (size * BLOCK), BLOCK, None)


def index_report(caches: Iterable[tuple[int, int, int]]) -> str:
    """A row for each number of replicas and shards, each in a process of its own."""
    head = ["replicas", "shards", "blocks of each", "told", "kept", "process grew by MB", "us per block"]
    rows = []
    for case in caches:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            filled = pool.submit(Filled.of, *case).result()
        figures = [f"{filled.grown_bytes / 1e6:.0f}", f"{filled.apply_us:.2f}"]
        rows.append([*(f"{n:,}" for n in (*case, filled.told, filled.kept)), *figures])
    return table(head, rows)


# -- gossip


def gossip(replicas: int, routers: int, shards: int) -> tuple[float, float]:
    """Bytes that a router sends a second in whole rounds, and the share of a core that these take it.

    As if every router had something at every replica of its share; the network's calls are not in it.
    """
    fleet, heard, me = busy_fleet(replicas), loads.Loads(), Contact("0" * 8, "", 0, "k" * 32)
    encode, decode = msgspec.msgpack.Encoder().encode, msgspec.msgpack.Decoder(loads.Report).decode
    every = list(fleet.loads(1.0).items())
    shares = [dict(every[n::shards]) for n in range(shards)]
    rounds, size = [], 0
    for turn in range(ROUNDS):
        reports = [encode(loads.Report(turn, True, shares[n % shards])) for n in range(1, routers)]
        began = time.process_time()
        fleet.loads(1.0)
        told = encode(loads.Report(turn, True, shares[0]))
        me.sign(told)
        for peer, report in enumerate(reports):
            me.sign(report)
            for id in heard.take(str(peer), decode(report), 1.0) or ():
                fleet.elsewhere(id, heard.at(id))
        rounds.append(time.process_time() - began)
        size = len(told)
    datagrams = -(-len(shares[0]) // MOST_REPLICAS)
    return (size + datagrams * HEAD.size) * (routers - 1) / ROUND_S, min(rounds) / ROUND_S


def gossip_report(cases: Iterable[tuple[int, int, int]]) -> str:
    """A row for each number of replicas, routers and shards."""
    rows = []
    for case in cases:
        sent, share = gossip(*case)
        figures = (f"{sent / 1e6:.2f}", f"{sent * case[1] / 1e6:.1f}", f"{100 * share:.1f}")
        rows.append([*map(str, case), *figures])
    head = ["replicas", "routers", "shards", "MB/s that each sends", "MB/s of all", "% of a core, each"]
    return table(head, rows)


# -- the command


def fleets(largest: int) -> list[tuple[int, int]]:
    """Sizes up to the largest with one router, and that with several."""
    return [(size, 1) for size in FLEETS if size <= largest] + [(largest, routers) for routers in ROUTERS]


@click.command(context_settings={"show_default": True})
@click.option("--only", help="A part of it.", type=click.Choice(["twin", "decision", "index", "gossip"]))
@click.option("--load", default=LOAD, help="Of each replica, by what one of eight sustains.")
@click.option("--largest", default="64", type=click.Choice([str(n) for n in FLEETS if n >= REFERENCE]))
@click.option("--seed", default=0, help="Of where copies of the trace begin.")
def main(only: str | None, load: float, largest: str, seed: int) -> None:
    """Fleets of 1 to 64 replicas in the twin with the same load, and what more of them cost a router."""
    tell = partial(click.echo, err=True)
    parts: Mapping[str, Callable[[], str]] = {
        "twin": lambda: twin_report(measure(fleets(int(largest)), load, seed, tell)),
        "decision": lambda: decision_report(SIZES),
        "index": lambda: index_report(CACHES),
        "gossip": lambda: gossip_report(GOSSIPS),
    }
    for name, part in parts.items():
        if only in (None, name):
            click.echo(f"### {name}\n\n{part()}\n")


if __name__ == "__main__":
    main()
