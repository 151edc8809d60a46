"""What a CPU tier of the KV cache is worth: what load kv_aware sustains with it and without, in the twin.

Speeds are climbed as in bench_placement.py. Run through `scripts/bench tiers`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace

import click

from loadtests.bench_placement import FLEET, HERD, Course, course, steps
from loadtests.outcomes import Summary
from loadtests.report import spread, table

POLICY = "kv_aware"
FLEETS = {"none": FLEET, "5x": FLEET.with_name("sim-8b-offload.yaml")}
# Of each trace, the speeds without a tier and with it. They begin where one seed passed with room to spare:
# the lower ones would take hours, and bench_placement.py climbs them.
GRIDS = {
    "conversation": {"none": steps(2.2, 5.0), "5x": steps(2.5, 5.0)},
    "synthetic": {"none": steps(2.1, 5.0), "5x": steps(3.1, 5.0)},
}


@dataclass(frozen=True, slots=True)
class Result:
    """The highest speed that a fleet sustains, and the run at it; 0 if the first one fails, and that run."""

    speed: float
    summary: Summary

    @classmethod
    def of(cls, course: Course, seed: int) -> Result:
        """Climbs until the first failure."""
        best: Result | None = None
        for speed in course.grid:
            summary = course.run(HERD[POLICY], seed, speed)
            if not summary.strict:
                return best or cls(0.0, summary)
            best = cls(speed, summary)
        assert best is not None
        return best


def measure(courses: Mapping[str, Course], seeds: int) -> Iterator[tuple[str, Result]]:
    """Each fleet with all seeds, on as many processes as there are cores."""
    tiers = list(courses) * seeds
    numbers = [seed for seed in range(seeds) for _ in courses]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        results = pool.map(Result.of, [courses[tier] for tier in tiers], numbers)
        yield from zip(tiers, results, strict=True)


def report(results: Mapping[str, Sequence[Result]]) -> str:
    """A row for each fleet; the first is what the others are compared with, seed by seed."""
    base = next(iter(results.values()))
    head = [
        "CPU tier",
        "speed sustained",
        "by that of none",
        "within SLO there",
        "of the longest",
        "hit rate",
    ]
    return table(head, [_row(tier, own, base) for tier, own in results.items()])


def _row(tier: str, own: Sequence[Result], base: Sequence[Result]) -> list[str]:
    ratios = [one.speed / other.speed for one, other in zip(own, base, strict=True) if other.speed]
    return [
        tier,
        spread([result.speed for result in own], 2),
        spread(ratios, 2),
        spread([result.summary.attainment for result in own], 3),
        spread([result.summary.attainment_longest for result in own], 3),
        spread([result.summary.hit for result in own], 3),
    ]


@click.command(context_settings={"show_default": True})
@click.option("--trace", "name", type=click.Choice(list(GRIDS)), default="conversation")
@click.option("--seeds", default=5, help="Runs with arrivals moved anew.", type=click.IntRange(min=1))
@click.option("--quick", is_flag=True, help="A quarter of the trace, every fourth speed, one seed.")
def main(name: str, seeds: int, quick: bool) -> None:
    """What load a fleet sustains with a CPU tier of its KV cache, in the twin."""
    courses = {
        tier: replace(course(name, fleet, quick), grid=GRIDS[name][tier][:: 4 if quick else 1])
        for tier, fleet in FLEETS.items()
    }
    results: dict[str, list[Result]] = {tier: [] for tier in courses}
    for tier, result in measure(courses, 1 if quick else seeds):
        results[tier].append(result)
        click.echo(f"{tier}: {result.speed}", err=True)
    click.echo(report(results))


if __name__ == "__main__":
    main()
