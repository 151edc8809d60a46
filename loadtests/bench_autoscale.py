"""What it takes to keep an SLO while the load comes and goes, in the twin: Herd's scaler and Ray Serve's.

The load is that of a day in LASTS_S: the conversation trace with its time warped, so that between a little
and as much comes as PEAK replicas sustain, in bursts besides, and once a crowd. Both scalers command the same
replicas, behind the same router with its line. Then what warm arrivals and quiet departures are good for.
Run through `scripts/bench autoscale`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise
from math import cos, pi
from random import Random
from statistics import mean

import click
import numpy as np

from loadtests.bench_placement import HERD, Course, course
from loadtests.elastic import Changes, Elastic, Herd, Ray, Scaler, run
from loadtests.outcomes import Outcome
from loadtests.report import spread as with_spread
from loadtests.report import table
from loadtests.trace import Arrival, compress, spread
from router.scaling import Replicas

LASTS_S = 1_500.0
# Caches are empty at first; figures are of what comes later.
WARM_UP_S = 100.0
# The speed of the trace that a replica of deploy/sim-8b.yaml sustains (docs/placement.md), and how many such
# the load takes at its peak; what is left of it at its lowest.
PER_REPLICA, PEAK, LOWEST = 2.3 / 8, 12, 0.15
BURSTS, BURST_S, BURST_TIMES = 8, (15.0, 45.0), (1.3, 2.0)
# The crowd comes when the load is low: three times a high one would be beyond any fleet within bounds.
CROWD_S, CROWD_TIMES, CROWD_BELOW = 60.0, 3.0, 0.4
# A fleet begins with what the first minute's load takes at such a share of what it sustains.
AT_FIRST = 0.75
STATIC = 16

# Replicas come or go at a time in the midst of a load of so much of what those that stay sustain, and what
# comes in each minute after that is looked at. Windows are short and prompts differ, so hits are counted
# together, over so many places of the trace for each seed.
CHANGE_S, MINUTE_S, MINUTES, LOAD, PLACES = 400.0, 60.0, 3, 0.75, 3
WARM_S, HANDOVER_S = (0.0, 10.0, 30.0), (0.0, 3.0, 10.0)
NEWCOMERS, LEAVING = (6, 8), (8, 4)  # how many there are, and then


BOUNDS = Replicas(min=1, max=20)
# Ray's target_ongoing_requests, downscale_delay_s (600 unless told) and upscale_delay_s (30 unless told).
RAYS = ((6, 600, 0), (4, 600, 0), (8, 600, 0), (3, 300, 30))


# -- the load


def shape(chance: Random) -> list[float]:
    """How fast the trace goes in each second."""
    seconds, phase = round(LASTS_S), chance.random()
    base = [LOWEST + (1 - LOWEST) * (0.5 - 0.5 * cos(2 * pi * (t / LASTS_S + phase))) for t in range(seconds)]
    times = [1.0] * seconds
    for _ in range(BURSTS):
        begins, lasts = chance.uniform(0, LASTS_S), chance.uniform(*BURST_S)
        _raise(times, begins, lasts, chance.uniform(*BURST_TIMES))
    low = [t for t in range(200, seconds - 200) if base[t] < CROWD_BELOW]
    _raise(times, chance.choice(low), CROWD_S, CROWD_TIMES)
    return [PEAK * PER_REPLICA * b * t for b, t in zip(base, times, strict=True)]


def _raise(times: list[float], begins: float, lasts: float, height: float) -> None:
    for t in range(round(begins), min(len(times), round(begins + lasts))):
        times[t] = max(times[t], height)


def warped(arrivals: Sequence[Arrival], speeds: Sequence[float], chance: Random) -> list[Arrival]:
    """A part of the trace, each second at its speed. It begins anywhere, and starts over at its end."""
    passed = list(accumulate(speeds, initial=0.0))
    first = chance.uniform(0, arrivals[-1].at)
    found = []
    for arrival in over_and_over(arrivals, 2 + int(passed[-1] / arrivals[-1].at)):
        at = arrival.at - first
        if 0 <= at < passed[-1]:
            second = bisect_right(passed, at) - 1
            found.append(replace(arrival, at=second + (at - passed[second]) / speeds[second]))
    return found


def over_and_over(arrivals: Sequence[Arrival], times: int) -> list[Arrival]:
    """A trace so many times in a row, each time with blocks of its own."""
    ids, lasts = 1 + max(max(arrival.hash_ids) for arrival in arrivals), arrivals[-1].at
    return [
        replace(arrival, at=arrival.at + n * lasts, hash_ids=[id + n * ids for id in arrival.hash_ids])
        for n in range(times)
        for arrival in arrivals
    ]


# -- scalers


@dataclass(frozen=True, slots=True)
class Result:
    """What a scaler made of it. `late`: the 99th percentile of time to first token by what the SLO allows."""

    gpu_s: float
    attainment: float
    refused: float
    late: float

    @classmethod
    def of(cls, whole: Course, scaler: Scaler, first: int, seed: int) -> Result:
        """Simulates it, from a fleet of `first`."""
        twin = Elastic(replace(whole.setting, replicas=first), HERD["kv_aware"], seed, scaler, LASTS_S)
        came = [o for o in run(twin, whole.arrivals).outcomes if o.arrival.at >= WARM_UP_S]
        served = [o for o in came if not o.refused]
        return cls(
            gpu_s=sum(life.cost_s(WARM_UP_S, LASTS_S) for life in twin.lives.values()),
            attainment=mean(o.attained(whole.slo) for o in came),
            refused=1 - len(served) / len(came),
            late=float(np.quantile([o.ttft / whole.slo.first_token_s(o.unloaded) for o in served], 0.99)),
        )


def scalers(rays: Iterable[tuple[int, int, int]], tpot_s: float) -> dict[str, Callable[[], Scaler]]:
    """By name; each makes one anew, since they remember."""

    def always(now: float, works: object, supply: object) -> int:
        return STATIC

    def ray(target: int, down_s: int, up_s: int) -> Callable[[], Scaler]:
        return lambda: Ray(target, BOUNDS.min, BOUNDS.max, down_s, up_s)

    return {
        "herd": lambda: Herd(BOUNDS, tpot_s),
        f"static, {STATIC}": lambda: always,
        **{f"ray, {n} ongoing, up {up} s, down {down} s": ray(n, down, up) for n, down, up in rays},
    }


def of_day(whole: Course, seed: int) -> tuple[Course, int]:
    """The load of a seed, and how many replicas there are to begin with."""
    chance = Random(seed)
    speeds = shape(chance)
    arrivals = warped(spread(whole.arrivals, chance), speeds, chance)
    return replace(whole, arrivals=arrivals), round(mean(speeds[:60]) / PER_REPLICA / AT_FIRST)


def compare(
    seeds: Iterable[int], rays: Sequence[tuple[int, int, int]], tell: Callable[[str], None]
) -> Mapping[str, list[Result]]:
    """Every scaler on the load of every seed."""
    whole = course("conversation")
    makes = scalers(rays, whole.slo.tpot_s)
    results: dict[str, list[Result]] = {name: [] for name in makes}
    for seed in seeds:
        day, first = of_day(whole, seed)
        for name, make in makes.items():
            result = Result.of(day, make(), STATIC if name.startswith("static") else first, seed)
            results[name].append(result)
            tell(f"seed {seed}, {name}: {result}")
    return results


def report(results: Mapping[str, Sequence[Result]]) -> str:
    """All scalers, Ray's settings by what they take; and what Herd's takes less than the best of these."""
    names = sorted(results, key=lambda name: (name.startswith("ray"), mean(r.gpu_s for r in results[name])))
    best = _best_ray(results)
    rows = []
    for name in names:
        own = results[name]
        figures = [
            ([r.gpu_s for r in own], 0),
            ([r.attainment for r in own], 3),
            ([100 * r.refused for r in own], 2),
            ([r.late for r in own], 2),
        ]
        mark = " **best**" if name == best else ""
        rows.append([name + mark, *(with_spread(values, digits) for values, digits in figures)])
    head = ["scaler", "GPU-seconds", "within SLO", "% refused", "TTFT p99 by SLO"]
    return f"{table(head, rows)}\n\n{_saved(results, best)}"


def _means(own: Sequence[Result]) -> tuple[float, float]:
    return mean(r.gpu_s for r in own), mean(r.attainment for r in own)


def _best_ray(results: Mapping[str, Sequence[Result]]) -> str | None:
    """Its cheapest setting with which no fewer users get what was promised than with Herd."""
    least = _means(results["herd"])[1]
    good = [name for name in results if name.startswith("ray") and _means(results[name])[1] >= least]
    return min(good, key=lambda name: _means(results[name])[0], default=None)


def _saved(results: Mapping[str, Sequence[Result]], best: str | None) -> str:
    gpu_s, attainment = _means(results["herd"])
    if best is None:
        return f"No setting of Ray's reaches Herd's {attainment:.3f}."
    rays = [_means(own) for name, own in results.items() if name.startswith("ray")]
    fewer = [100 * (1 - gpu_s / of) for of in (_means(results[best])[0], interpolated(rays, attainment))]
    cut = f"Herd takes {fewer[0]:.1f} % fewer GPU-seconds than Ray's best"
    return f"{cut}, {fewer[1]:.1f} % fewer than Ray's settings would at {attainment:.3f}, between them."


def interpolated(points: Sequence[tuple[float, float]], attainment: float) -> float:
    """The least GPU-seconds for this, on lines between any two of Ray's settings; some must attain it."""
    above = [(gpu_s, had) for gpu_s, had in points if had >= attainment]
    below = [(gpu_s, had) for gpu_s, had in points if had < attainment]
    lines = [
        low + (high - low) * (attainment - less) / (more - less)
        for high, more in above
        for low, less in below
    ]
    return min([gpu_s for gpu_s, _ in above] + lines)


# -- newcomers and leavers


def midst(whole: Course, seed: int, replicas: int) -> list[Arrival]:
    """A steady load for so many replicas, from another place of the trace for each seed."""
    trace = spread(over_and_over(whole.arrivals, 2), Random(seed))
    begins = len(whole.arrivals) * (seed % 15) // 15
    part = compress(trace[begins:], replicas * PER_REPLICA * LOAD)
    moved = [replace(arrival, at=arrival.at - part[0].at) for arrival in part]
    return [arrival for arrival in moved if arrival.at < CHANGE_S + MINUTES * MINUTE_S + max(WARM_S)]


def changed(whole: Course, seed: int, sizes: tuple[int, int], changes: Changes, load: int) -> Elastic:
    """A fleet that becomes another at CHANGE_S. `load`: for so many replicas."""
    first, then = sizes
    arrivals = midst(whole, seed, load)

    def scaler(now: float, works: object, supply: object) -> int:
        return first if now < CHANGE_S else then

    setting = replace(whole.setting, replicas=first)
    twin = Elastic(setting, HERD["kv_aware"], seed, scaler, arrivals[-1].at, changes)
    run(twin, arrivals)
    return twin


def hit(outcomes: Sequence[Outcome]) -> float:
    """Of all prompts' tokens, those that were cached."""
    return sum(o.reported for o in outcomes) / max(1, sum(o.arrival.input_length for o in outcomes))


def warm_row(whole: Course, seeds: Iterable[int], warm_s: float) -> list[str]:
    """Newcomers in their first minute, beside those that were there."""
    new: list[Outcome] = []
    others: list[Outcome] = []
    for seed in seeds:
        twin = changed(whole, seed, NEWCOMERS, Changes(startup_s=0.0, warm_s=warm_s), NEWCOMERS[0])
        fresh = {id: life.ready_at for id, life in twin.lives.items() if life.ready_at}
        ready = max(fresh.values())
        minute = [o for at, o in twin.placed if ready <= at < ready + MINUTE_S]
        new += [o for o in minute if o.replica in fresh]
        others += [o for o in minute if o.replica not in fresh]
    share = len(new) / (len(new) + len(others)) * NEWCOMERS[1] / (NEWCOMERS[1] - NEWCOMERS[0])
    good = mean(o.attained(whole.slo) for o in new + others)
    figures = (hit(new), hit(others), hit(new) / hit(others), share, good)
    return [f"{warm_s:g} s", *(f"{figure:.3f}" for figure in figures)]


def leave_row(whole: Course, seeds: Sequence[int], sizes: tuple[int, int], budget_s: float) -> list[str]:
    """The fleet's hit rate in the two minutes before, and in each minute after; attainment; how many were
    refused, and lost."""
    twins = [changed(whole, seed, sizes, Changes(handover_s=budget_s), LEAVING[1]) for seed in seeds]
    came = [outcome for twin in twins for outcome in twin.run.outcomes]
    ends = [CHANGE_S - 2 * MINUTE_S, *(CHANGE_S + MINUTE_S * n for n in range(MINUTES + 1))]
    parts = [[o for o in came if begins <= o.arrival.at < until] for begins, until in pairwise(ends)]
    attained = " ".join(f"{mean(o.attained(whole.slo) for o in part):.3f}" for part in parts)
    refused = sum(o.refused for o in came)
    lost = sum(not o.refused and not o.ttft for o in came)
    return [*(f"{hit(part):.3f}" for part in parts), attained, str(refused), str(lost)]


def warm_report(seeds: Sequence[int]) -> str:
    """By for how long newcomers replay."""
    whole = course("conversation")
    head = ["warms for", "hit rate, new", "others", "new by others", "share of requests", "within SLO"]
    return table(head, [warm_row(whole, seeds, warm_s) for warm_s in WARM_S])


def leave_report(seeds: Sequence[int], caches: int = 1) -> str:
    """By how much is handed over; and fleets that have always been as small and as large, since hits differ
    from minute to minute. `caches`: times their size."""
    whole = course("conversation")
    engine = whole.setting.engine
    larger = replace(engine, num_gpu_blocks=caches * engine.num_gpu_blocks)
    whole = replace(whole, setting=replace(whole.setting, engine=larger))
    cases = [(f"handed over: {s:g} s each", LEAVING, s) for s in HANDOVER_S]
    cases += [(f"always {size}", (size, size), 0.0) for size in reversed(LEAVING)]
    minutes = [f"minute {n}" for n in range(1, MINUTES + 1)]
    head = ["", "hit rate before", *minutes, "within SLO", "refused", "lost"]
    return table(head, [[name, *leave_row(whole, seeds, sizes, budget_s)] for name, sizes, budget_s in cases])


# By how many seeds.
PARTS: Mapping[str, Callable[[int], str]] = {
    "scalers": lambda seeds: report(compare(range(seeds), RAYS, lambda line: click.echo(line, err=True))),
    "warm": lambda seeds: warm_report(range(PLACES * seeds)),
    "leave": lambda seeds: leave_report(range(PLACES * seeds)),
    "leave, caches of 5 times the size": lambda seeds: leave_report(range(PLACES * seeds), caches=5),
}


@click.command(context_settings={"show_default": True})
@click.option("--seeds", default=5, help="Loads, each with its own bursts.", type=click.IntRange(min=1))
@click.option("--only", help="A part of it.", type=click.Choice(["scalers", "warm", "leave"]))
def main(seeds: int, only: str | None) -> None:
    """A fleet that grows and shrinks, in the twin: some minutes for each seed."""
    for name, part in PARTS.items():
        if name.startswith(only or ""):
            click.echo(f"### {name}\n\n{part(seeds)}\n")


if __name__ == "__main__":
    main()
