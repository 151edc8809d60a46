"""What a placement costs: microseconds per choice by policy and fleet, and per affinity key by request.

Pure functions on one core and nothing else of the router; the best of some runs, since machines are shared.
Run through `scripts/bench policies`.
"""

from __future__ import annotations

from collections.abc import Callable
from random import Random
from timeit import repeat

import click
import msgspec

from loadtests.report import table
from router.affinity import affinity_key
from router.core.fleet import Fleet, Replica
from router.core.placement import POLICIES, Policy
from router.openai_api import FAMILIES, parse

REPLICAS = (4, 64, 1000)
LOAD = 8  # requests in flight per replica on average, spread by chance
CHOICES = [(Random(i).getrandbits(64), Random(-i).getrandbits(64)) for i in range(1, 101)]


@click.command(context_settings={"show_default": True})
@click.option("--rounds", default=20, help="Runs, of which the best counts.", type=click.IntRange(min=1))
def main(rounds: int) -> None:
    """What a placement costs, by policy and fleet, and an affinity key, by request."""
    fleets = [fleet_of(count) for count in REPLICAS]
    rows = [
        [name, *(choice_us(policy, fleet, rounds) for fleet in fleets)] for name, policy in POLICIES.items()
    ]
    print(table(["policy", *(f"us at {count}" for count in REPLICAS)], rows), end="\n\n")
    keys = [["a header", key_us(32, rounds, (b"x-session-id", b"8d5f2c"))]]
    keys += [[f"a chat of {size} KiB", key_us(size, rounds)] for size in (1, 32, 128)]
    print(table(["affinity key from", "us"], keys))


def fleet_of(count: int) -> Fleet:
    fleet, chance = Fleet(), Random(1)
    ids = [f"http://10.0.{i // 250}.{i % 250}:8000" for i in range(count)]
    for id in ids:
        fleet.joined(Replica(id, id, ("m",)), now=0.0)
    for id in chance.choices(ids, k=LOAD * count):
        fleet.started(id, now=0.0)
    return fleet


def choice_us(policy: Policy, fleet: Fleet, rounds: int) -> str:
    return best_us(lambda: [policy(fleet.view("m", draw, key)) for draw, key in CHOICES], rounds)


def key_us(size: int, rounds: int, *headers: tuple[bytes, bytes]) -> str:
    """A chat of 1 KiB messages, with as many headers as a client of OpenAI's sends."""
    said = [{"role": role, "content": "x" * 990} for role in ("system", "user", *["assistant"] * (size - 2))]
    call = parse(
        FAMILIES["/v1/chat/completions"], msgspec.json.encode({"model": "m", "messages": said[:size]})
    )
    sent = [(b"header-%d" % i, b"value") for i in range(12)] + list(headers)
    return best_us(lambda: [affinity_key(call, sent) for _ in CHOICES], rounds)


def best_us(run: Callable[[], object], rounds: int) -> str:
    return f"{1e6 * min(repeat(run, number=1, repeat=rounds)) / len(CHOICES):.1f}"


if __name__ == "__main__":
    main()
