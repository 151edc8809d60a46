"""The routers benchmark: what several router processes cost beside one.

First gossip by itself: routers on one loop that tell each other of loaded replicas and of placements. Then
small requests through `herd route` with one process, with two, and with two of which each owns a share of the
requests and passes the others on. Run through `scripts/bench routers`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import httpx

from loadtests import contenders, generator, mock_engine
from loadtests.bench import BenchFailed, Cores, machine, ready, run_bench
from loadtests.bench_relay import engines
from loadtests.contenders import Contender, Ports, Running
from loadtests.cpu import cpu_seconds
from loadtests.report import spread, table
from router.core.fleet import Fleet, Replica
from router.gossip import Gossip
from router.metrics import Metrics
from router.port import Contact

ROUTERS = (2, 4, 16)
REPLICAS = 64
EACH = 4  # requests in flight of each router at each replica
BURST_S = 0.01  # between placements that are told; those within router.gossip.COALESCE_S are one

CONNECTIONS = 64
SETTLE_S = 1.0
WAYS = {
    "one process": (),
    "two processes": ("--processes", "2"),
    "two processes, two shards": ("--processes", "2", "--shards", "2"),
}


@dataclass(frozen=True, slots=True)
class Cost:
    """CPU of all processes for a request, and the share of requests that their owner answered for another."""

    us: float
    passed_on: float


async def gossip_ms(routers: int, bursts: bool, seconds: float) -> float:
    """CPU milliseconds a second for each of so many routers, this program's own included."""
    directory: list[Contact] = []
    peers = [Gossip(loaded_fleet(), Metrics(), lambda: directory) for _ in range(routers)]
    directory += [await peer.start("127.0.0.1") for peer in peers]
    await asyncio.sleep(SETTLE_S)
    cpu, began = time.process_time(), time.monotonic()
    while time.monotonic() - began < seconds:
        for peer in peers if bursts else ():
            peer.placed(replica_id(0))
        await asyncio.sleep(BURST_S)
    cpu, elapsed = time.process_time() - cpu, time.monotonic() - began
    for peer in peers:
        peer.stop()
    return 1000 * cpu / elapsed / routers


async def gossip_rows(seconds: float) -> list[list[str]]:
    """By number of routers: what rounds cost, and what rounds and placements cost."""
    own = await gossip_ms(1, False, seconds)
    rows = []
    for routers in ROUTERS:
        costs = [await gossip_ms(routers, bursts, seconds) - own / routers for bursts in (False, True)]
        rows.append([str(routers), *(f"{cost:.1f}" for cost in costs)])
    return rows


def loaded_fleet() -> Fleet:
    """Replicas of which each has requests."""
    fleet = Fleet()
    for n in range(REPLICAS):
        fleet.joined(Replica(replica_id(n), replica_id(n), ("m",)), now=0.0)
        for _ in range(EACH):
            fleet.started(replica_id(n), now=0.0)
    return fleet


def replica_id(n: int) -> str:
    return f"http://10.0.0.{n}:8000"


def herd(way: str, urls: list[str], ports: Ports, scratch: Path) -> list[str]:
    """`herd route` run in this way; its processes have any free admin ports, as its log tells."""
    return [*contenders.herd("least_requests")(urls, ports, scratch), "--admin-port", "0", *WAYS[way]]


async def request_costs(urls: list[str], rounds: int, seconds: float, cores: Cores) -> dict[str, list[Cost]]:
    """What a small request costs in each way of running routers; in turn, since a shared machine drifts."""
    with contextlib.ExitStack() as stack:
        routers = {}
        for way in WAYS:
            contender = Contender(way, partial(herd, way))
            router = routers[way] = stack.enter_context(contenders.running(contender, urls, cores.router))
            await ready(way, router, mock_engine.MODEL)
            while not admin_ports(router):  # told when all processes are there
                await asyncio.sleep(0.1)
        await asyncio.sleep(SETTLE_S)
        costs: dict[str, list[Cost]] = {way: [] for way in WAYS}
        for _ in range(rounds):
            for way, router in routers.items():
                costs[way].append(await request_cost(router, seconds))
    return costs


async def request_cost(router: Running, seconds: float) -> Cost:
    """What one costs now."""
    request = generator.request(router.port, mock_engine.MODEL, stream=False)
    load = generator.same(request, mock_engine.text(1), CONNECTIONS, SETTLE_S, stream=False)
    before = await passed_on(router)
    try:
        sample = await generator.run(load, [router.port], seconds, partial(cpu_seconds, router.pid))
    except (generator.BrokenReply, OSError) as error:
        raise BenchFailed(str(error)) from None
    after = await passed_on(router)
    if sample.broken:
        raise BenchFailed(f"replies were broken: {'; '.join(sample.broken)}")
    shares = after[0] - before[0], after[1] - before[1]
    return Cost(1e6 * sample.cpu_s / sample.requests, shares[0] / shares[1])


def admin_ports(router: Running) -> list[str]:
    return re.findall(r"\d+", router.log_tail.rpartition("metrics and state:")[2])


async def passed_on(router: Running) -> tuple[float, float]:
    """How many requests were passed on to their owner, and how many answered, by all processes."""
    async with httpx.AsyncClient(trust_env=False) as client:
        pages = [(await client.get(f"http://127.0.0.1:{port}/metrics")).text for port in admin_ports(router)]
    passed = (r"herd_relayed_to_owner_total\{outcome=\"passed\"\}", r"herd_requests_total\{.+\}")
    counts = [
        sum(float(n) for page in pages for n in re.findall(f"^{name} (.+)$", page, re.M)) for name in passed
    ]
    return counts[0], counts[1]


async def bench(rounds: int, seconds: float, cores: Cores) -> str:
    """Both tables."""
    gossip = await gossip_rows(seconds)
    with engines(chunks=1, core=cores.load) as (_, urls):
        costs = await request_costs(urls, rounds, seconds, cores)
    rows = [
        [way, spread([c.us for c in found], 0), spread([100 * c.passed_on for c in found], 0)]
        for way, found in costs.items()
    ]
    head = ["routers", "ms/s", f"ms/s with placements every {1000 * BURST_S:.0f} ms"]
    told = f"Gossip, CPU of each router, {REPLICAS} replicas:\n\n{table(head, gossip)}"
    return f"{told}\n\nSmall requests:\n\n{table(['routers', 'CPU us', '% passed on'], rows)}"


@click.command()
@click.option("--rounds", default=3, show_default=True)
@click.option("--seconds", default=3.0, show_default=True, help="Length of one measurement.")
def main(rounds: int, seconds: float) -> None:
    """Measure what several router processes cost: gossip, and passing requests on to their owner."""
    cores = Cores.of_machine()
    told = run_bench(bench(rounds, seconds, cores), cores)
    where = machine(cores)
    click.echo(f"{where['date']}, {where['cpu']}, Python {where['python']}.\n\n{told}")


if __name__ == "__main__":
    main()
