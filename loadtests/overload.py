"""Twice the load that a fleet sustains, live: what becomes of those who come, and of a premium tenth of them.

Slow simulated engines behind `herd route`, so that this machine can offer twice of what they sustain. What
that is, is measured first in the same run: the load is raised until too few requests are within their SLO.
A part of `scripts/bench faults`; `scripts/bench overload` does the same in virtual time.
"""

from __future__ import annotations

import itertools
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

import numpy as np

from loadtests.bed import Bed, Stream, bed_of, made, send
from loadtests.bench import BenchFailed, Cores
from loadtests.open_loop import arrivals
from loadtests.oracle import Oracle
from loadtests.outcomes import STRICT_ALL
from loadtests.report import table
from router.slo import Slo

NAME = "2x overload"
# A fifth of the speed that the preset 8b-h100 has: a prompt takes 0.15 s, a stream alone 30 ms a token.
ENGINE_ARGS = {"step-time": "0.03,165e-6,225e-6,0", "max-num-seqs": 256, "block-size": 16}
PROMPT_SIZE, TOKENS = 2000, 40
SLO = Slo(ttft_s=2.0, tpot_s=0.1)
FLAGS = ("--slo-ttft-ms", f"{1e3 * SLO.ttft_s:g}", "--slo-tpot-ms", f"{1e3 * SLO.tpot_s:g}")
PREMIUM, CLASS = 0.1, "x-herd-priority: -1"
# The load (requests a second) is raised by so much at a time, for so long, until it is no longer sustained.
# Routers go by what was lately (fleet.RECENT_S), so the first part of that does not count.
FIRST_RATE, RAISE, STEP_S, SETTLING_S = 10.0, 1.15, 25.0, 15.0
TIMES = 2.0
# What is to be reached: so much of what is sustained, and so many of the premium requests within their SLO.
GOODPUT, UNHARMED = 0.95, 0.95
FINE = ("whole", "refused")


@dataclass(frozen=True, slots=True)
class Part:
    """Streams that came at one rate within so many seconds, and which of them are premium."""

    name: str
    rate: float
    seconds: float
    streams: Sequence[Stream]
    premium: Sequence[bool]

    @property
    def goodput(self) -> float:
        """Requests a second within their SLO."""
        return sum(map(attained, self.streams)) / self.seconds

    @property
    def sustained(self) -> bool:
        return self.goodput * self.seconds >= STRICT_ALL * len(self.streams)

    def of_class(self, premium: bool) -> list[Stream]:
        """Those that are premium, or the others."""
        return [stream for stream, own in zip(self.streams, self.premium, strict=True) if own == premium]


def attained(stream: Stream) -> bool:
    """Whether its client got what was promised."""
    if stream.outcome != "whole" or stream.ttft > SLO.ttft_s:
        return False
    return (stream.ended - stream.began - stream.ttft) / (TOKENS - 1) <= SLO.tpot_s


def ttft_p99(streams: Sequence[Stream]) -> float:
    """Of those that were let in, in seconds."""
    return float(np.quantile([stream.ttft for stream in streams if stream.ttft] or [0.0], 0.99))


async def run(oracle: Oracle, cores: Cores, seconds: float) -> tuple[Part, Part]:
    """What the fleet sustains, and twice as much for so many seconds. Raises BenchFailed."""
    async with bed_of(cores, *FLAGS, engine_args=ENGINE_ARGS) as bed:
        capacity = None
        for rate in (FIRST_RATE * RAISE**step for step in itertools.count()):
            part = await offered("sustained", bed, oracle, rate, STEP_S, SETTLING_S)
            if not part.sustained:
                break
            capacity = part
        if capacity is None:
            raise BenchFailed(f"{FIRST_RATE:g} requests a second are more than the fleet sustains")
        return capacity, await offered(NAME, bed, oracle, TIMES * capacity.rate, seconds)


async def offered(
    name: str, bed: Bed, oracle: Oracle, rate: float, seconds: float, settling_s: float = 0.0
) -> Part:
    """So many requests a second, a tenth of them premium; those that come first do not count."""
    moments, chance = arrivals(rate, seconds, f"{name} {rate}"), Random(rate)
    premium = [chance.random() < PREMIUM for _ in moments]
    asks = [
        made(bed, oracle, f"{name}/{rate}/{number}", PROMPT_SIZE, TOKENS, *((CLASS,) if own else ()))
        for number, own in enumerate(premium)
    ]
    streams = await send(bed, moments, asks)
    first = bisect_left(moments, settling_s)
    return Part(name, rate, seconds - settling_s, streams[first:], premium[first:])


HEAD = [
    "load", "requests/s", "within SLO/s", "by what is sustained", "refused", "TTFT p99 s",
    "premium within SLO", "premium TTFT p99 s",
]  # fmt: skip


def report(capacity: Part, overload: Part) -> str:
    """A row for each."""
    return table(HEAD, [_row(part, capacity) for part in (capacity, overload)])


def _row(part: Part, capacity: Part) -> list[str]:
    premium, count = part.of_class(True), len(part.streams)
    refused = sum(stream.outcome == "refused" for stream in part.streams)
    return [
        part.name,
        f"{part.rate:.1f}",
        f"{part.goodput:.1f}",
        f"{part.goodput / capacity.goodput:.2f}",
        f"{refused / count:.0%}",
        f"{ttft_p99(part.streams):.2f}",
        f"{sum(map(attained, premium))} of {len(premium)}",
        f"{ttft_p99(premium):.2f}",
    ]


def missed(capacity: Part, overload: Part) -> list[str]:
    """What is not as it is to be."""
    found = [f"{stream.outcome} {stream.error}" for stream in overload.streams if stream.outcome not in FINE]
    premium = overload.of_class(True)
    if overload.goodput < GOODPUT * capacity.goodput:
        found.append("too few are within their SLO")
    if ttft_p99(overload.streams) > SLO.ttft_s:
        found.append("of those that were let in too many waited too long")
    if sum(map(attained, premium)) < UNHARMED * len(premium):
        found.append("premium requests were harmed")
    return found
