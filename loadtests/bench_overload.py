"""What a minute of twice the load that a fleet sustains does to its users: with and without the waiting line.

The conversation trace in the twin, a part of it squeezed so that the fleet has twice its capacity to do. A
tenth of the requests are of a premium class. Run through `scripts/bench overload`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from math import inf
from random import Random
from statistics import mean

import click
import numpy as np

from loadtests.bench_placement import Course, course
from loadtests.outcomes import WARM_UP
from loadtests.report import spread as with_spread
from loadtests.report import table
from loadtests.trace import Arrival, compress, spread
from loadtests.twin import Lined, PolicyFactory, core_policy, simulate
from router.core.placement import kv_aware, least_requests
from router.line import AdmissionConfig

# At these speeds the fleet of deploy/sim-8b.yaml is at ease, and has as much to do as it sustains.
EASE, CAPACITY = 1.8, 2.3
# How many times as much comes in the burst, when it begins, and how long it lasts (seconds).
TIMES, BEGINS_S, LASTS_S = 2.0, 200.0, 60.0
PREMIUM = 0.1

_AWARE = core_policy(kv_aware)
POLICIES: Mapping[str, PolicyFactory] = {
    "kv_aware": Lined(_AWARE),
    "kv_aware, late ones wait": Lined(_AWARE, AdmissionConfig(max_late_s=inf)),
    "kv_aware_unlined": _AWARE,
    "least_requests_unlined": core_policy(least_requests),
}


def burst(arrivals: Iterable[Arrival]) -> list[Arrival]:
    """The trace at ease, but for a part that comes at TIMES what the fleet sustains."""
    squeezed = TIMES * CAPACITY / EASE
    ends = BEGINS_S + LASTS_S * squeezed  # in the time of the trace at ease

    def moved(at: float) -> float:
        if at < BEGINS_S:
            return at
        return BEGINS_S + (at - BEGINS_S) / squeezed if at < ends else at - (ends - BEGINS_S) + LASTS_S

    return [replace(arrival, at=moved(arrival.at)) for arrival in compress(arrivals, EASE)]


def classed(arrivals: Iterable[Arrival], chance: Random) -> list[Arrival]:
    """A tenth of them premium."""
    return [replace(a, priority=-1 if chance.random() < PREMIUM else 0) for a in arrivals]


@dataclass(frozen=True, slots=True)
class Result:
    """What became of those that came in the burst. `goodput`: those within their SLO, by as many at capacity.

    `at_ease`: of the premium ones before it, those within their SLO. `late`: time to first token by what the
    SLO allows, at the 99th percentile of those that were let in.
    """

    goodput: float
    at_ease: float
    premium: float
    refused: float
    late: float

    @classmethod
    def of(cls, course: Course, make: PolicyFactory, seed: int, capacity: float) -> Result:
        """Simulates it. `capacity`: requests within their SLO in a second."""
        slo = course.slo
        outcomes = simulate(course.arrivals, course.setting, make, seed).outcomes
        before = [o for o in outcomes if o.arrival.at < BEGINS_S]
        came = [o for o in outcomes if BEGINS_S <= o.arrival.at < BEGINS_S + LASTS_S]
        at_ease, premium = ([o.attained(slo) for o in of if o.arrival.priority < 0] for of in (before, came))
        let_in = [o.ttft / slo.first_token_s(o.unloaded) for o in came if not o.refused]
        return cls(
            goodput=sum(o.attained(slo) for o in came) / LASTS_S / capacity,
            at_ease=mean(at_ease or [1.0]),
            premium=mean(premium),
            refused=1 - len(let_in) / len(came),
            late=float(np.quantile(let_in, 0.99)),
        )


def capacity(course: Course, seed: int) -> float:
    """Requests a second within their SLO where the fleet has as much to do as it sustains."""
    outcomes = simulate(
        compress(course.arrivals, CAPACITY), course.setting, POLICIES["kv_aware"], seed
    ).outcomes
    kept = outcomes[int(len(outcomes) * WARM_UP) :]
    return sum(o.attained(course.slo) for o in kept) / (kept[-1].arrival.at - kept[0].arrival.at)


def measure(seed: int) -> dict[str, Result]:
    """Every policy, with arrivals moved anew."""
    whole = course("conversation")
    arrivals = classed(spread(whole.arrivals, Random(seed)), Random(seed))
    most = capacity(replace(whole, arrivals=arrivals), seed)
    ends = BEGINS_S + 2 * LASTS_S
    bursting = replace(whole, arrivals=[a for a in burst(arrivals) if a.at < ends])
    return {name: Result.of(bursting, make, seed, most) for name, make in POLICIES.items()}


@click.command(context_settings={"show_default": True})
@click.option("--seeds", default=2, help="Runs with arrivals moved anew.", type=click.IntRange(min=1))
def main(seeds: int) -> None:
    """A minute of twice the load that the fleet sustains, in the twin; a minute for each seed."""
    results = [measure(seed) for seed in range(seeds)]
    head = [
        "policy",
        "goodput by capacity",
        "premium within SLO before",
        "in it",
        "refused",
        "TTFT p99 by SLO",
    ]
    rows = []
    for name in POLICIES:
        own = [result[name] for result in results]
        rows.append(
            [
                name,
                *(
                    with_spread([getattr(result, figure) for result in own], 2)
                    for figure in ("goodput", "at_ease", "premium", "refused", "late")
                ),
            ]
        )
    click.echo(table(head, rows))


if __name__ == "__main__":
    main()
