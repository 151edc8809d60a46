"""What load each placement policy sustains: a trace replayed ever faster in the twin, until users notice.

A speed is sustained if the run is `strict` (outcomes.py), and so is every lower speed of the grid: nothing is
searched, since attainment is not monotonic. Each seed moves the arrivals anew, within the trace's rounding.
Run through `scripts/bench placement`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from random import Random
from statistics import mean, median

import click

from loadtests.baselines import PAPERS, SHIPPED
from loadtests.outcomes import Summary, summarize
from loadtests.report import spread as with_spread
from loadtests.report import table
from loadtests.simulate import fleet_of
from loadtests.trace import Arrival, compress, grain, read, spread
from loadtests.twin import Lined, PolicyFactory, Setting, core_policy, simulate
from router.core.placement import POLICIES as CORE
from router.errors import ConfigError
from router.slo import Slo

ROOT = Path(__file__).parent.parent
TRACES, FLEET = ROOT / "loadtests" / "traces", ROOT / "deploy" / "sim-8b.yaml"

_OWN: Mapping[str, PolicyFactory] = {name: core_policy(policy) for name, policy in CORE.items()}
HERD = {"kv_aware": Lined(_OWN["kv_aware"]), "kv_aware_unlined": _OWN["kv_aware"]}
# What nobody ships as a router, or everybody: shown beside, and not what Herd is measured by.
REFERENCES = {**PAPERS, **{name: make for name, make in _OWN.items() if name not in HERD}}
POLICIES = {**HERD, **SHIPPED, **REFERENCES}


@dataclass(frozen=True, slots=True)
class Course:
    """A trace and the speeds that it is replayed at. `common`: the one at which policies are compared."""

    arrivals: Sequence[Arrival]
    grid: Sequence[float]
    common: float
    setting: Setting
    slo: Slo

    def run(self, make: PolicyFactory, seed: int, speed: float) -> Summary:
        """One run."""
        over = grain(self.arrivals) or self.arrivals[-1].at / len(self.arrivals)
        arrivals = spread(self.arrivals, Random(seed), over)
        run = simulate(compress(arrivals, speed), self.setting, make, seed)
        return summarize(run.outcomes, self.slo, run.refused)

    def sustained(self, make: PolicyFactory, seed: int) -> float:
        """The highest speed with every lower one of the grid passing; 0 if the first fails."""
        passed = 0.0
        for speed in self.grid:
            if not self.run(make, seed, speed).strict:
                break
            passed = speed
        return passed


def steps(first: float, last: float, step: float = 0.05) -> list[float]:
    """Speeds from first to last."""
    return [round(first + n * step, 4) for n in range(round((last - first) / step) + 1)]


COURSES = {"conversation": (steps(1.0, 5.0), 2.0), "synthetic": (steps(0.3, 5.0), 1.5)}


def course(name: str, fleet: Path = FLEET, quick: bool = False) -> Course:
    """A shipped trace on its grid; quick: its first quarter at every fourth speed."""
    arrivals, (grid, common) = read(TRACES / f"{name}.jsonl.gz"), COURSES[name]
    if quick:
        arrivals, grid = arrivals[: len(arrivals) // 4], grid[::4]
    model = fleet_of(fleet)
    return Course(arrivals, grid, common, model.setting, model.model.slo)


def sustainable(
    make: PolicyFactory, course: Course, seeds: Iterable[int], processes: int | None = None
) -> list[float]:
    """What a policy sustains, for each seed; `make` and what it makes must be picklable."""
    with ProcessPoolExecutor(processes) as pool:
        return list(pool.map(partial(course.sustained, make), seeds))


@dataclass(frozen=True, slots=True)
class Result:
    """One policy with one seed: the speed that it sustains, and its run at the common one."""

    policy: str
    sustained: float
    common: Summary

    @classmethod
    def of(cls, course: Course, task: tuple[str, int]) -> Result:
        """Climbs until the first failure."""
        policy, seed = task
        make = POLICIES[policy]
        return cls(policy, course.sustained(make, seed), course.run(make, seed, course.common))


def measure(policies: Sequence[str], course: Course, seeds: int) -> Iterator[Result]:
    """All policies with all seeds, as they are done, on as many processes as there are cores."""
    tasks = [(policy, seed) for policy in policies for seed in range(seeds)]
    with ProcessPoolExecutor(os.cpu_count()) as pool:
        yield from pool.map(partial(Result.of, course), tasks)


def report(results: Sequence[Result], course: Course) -> str:
    """A table each for Herd, the peers that ship, and references; the best first."""
    of_policy: dict[str, list[Result]] = {}
    for result in results:
        of_policy.setdefault(result.policy, []).append(result)
    order = sorted(of_policy, key=lambda name: -mean(result.sustained for result in of_policy[name]))
    best = next((name for name in order if name in SHIPPED), None)
    head = ["policy", "speed sustained", f"by that of {best or 'a peer'}", f"at {course.common}: within SLO"]
    head += ["of the longest", "TTFT p50 s", "TTFT p99 s", "hit rate"]
    parts = []
    for title, group in (("Herd", HERD), ("Peers that ship", SHIPPED), ("References", REFERENCES)):
        rows = [_row(of_policy[name], of_policy[best] if best else []) for name in order if name in group]
        parts += [f"### {title}", table(head, rows)] if rows else []
    return "\n\n".join(parts)


def _row(own: Sequence[Result], best: Sequence[Result]) -> list[str]:
    def middle(of: Callable[[Summary], float], digits: int) -> str:
        return f"{median(of(result.common) for result in own):.{digits}f}"

    return [
        own[0].policy,
        with_spread([result.sustained for result in own], 2),
        with_spread(_ratios(own, best) if best else [], 2),
        middle(lambda common: common.attainment, 3),
        middle(lambda common: common.attainment_longest, 3),
        middle(lambda common: common.ttft_p50, 2),
        middle(lambda common: common.ttft_p99, 1),
        middle(lambda common: common.hit, 3),
    ]


def _ratios(own: Sequence[Result], best: Sequence[Result]) -> list[float]:
    """Seed by seed, so that what makes a seed hard is taken out."""
    return [a.sustained / b.sustained for a, b in zip(own, best, strict=True) if b.sustained]


@click.command(context_settings={"show_default": True})
@click.option("--trace", "name", type=click.Choice(list(COURSES)), default="conversation")
@click.option("--fleet", type=click.Path(path_type=Path), default=FLEET, help="What is simulated.")
@click.option("--policies", help="Some of them, separated by commas.  [default: all]", metavar="NAME,...")
@click.option("--seeds", default=5, help="Runs with arrivals moved anew.", type=click.IntRange(min=1))
@click.option("--quick", is_flag=True, help="A quarter of the trace, every fourth speed, one seed.")
def main(name: str, fleet: Path, policies: str | None, seeds: int, quick: bool) -> None:
    """What load each placement policy sustains, in the twin; every policy takes some minutes."""
    names = policies.split(",") if policies else list(POLICIES)
    if unknown := [policy for policy in names if policy not in POLICIES]:
        raise click.BadParameter(f"no such policy: {unknown[0]}; there are {', '.join(POLICIES)}")
    try:
        measured = course(name, fleet, quick)
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    results = []
    for result in measure(names, measured, 1 if quick else seeds):
        results.append(result)
        click.echo(f"{result.policy}: {result.sustained}", err=True)
    click.echo(report(results, measured))


if __name__ == "__main__":
    main()
