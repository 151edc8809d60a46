"""`herd simulate`: a trace against a fleet file in the twin, policies side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from random import Random
from time import process_time

import msgspec
from rich.table import Table

from loadtests.baselines import PAPERS, SHIPPED
from loadtests.outcomes import STRICT_ALL, STRICT_LONGEST, Summary, summarize
from loadtests.trace import BLOCK_TOKENS, Arrival, compress, read, spread
from loadtests.twin import Lined, PolicyFactory, Setting, core_policy, simulate
from router.config import ModelConfig, application_of, load, parse
from router.core.placement import POLICIES as CORE
from router.errors import ConfigError
from workers.command import flags
from workers.simulated import options
from workers.simulated_engine import arguments

# Herd's own, behind its waiting line as the router has it, and what others do.
POLICIES: Mapping[str, PolicyFactory] = {
    **{name: Lined(core_policy(policy)) for name, policy in CORE.items()},
    **SHIPPED,
    **PAPERS,
}


@dataclass(frozen=True, slots=True)
class Fleet:
    """The model that a fleet file describes, as the twin simulates it, and the file's own policy."""

    model: ModelConfig
    engine: options.Options
    setting: Setting
    policy: str


def fleet_of(path: Path, replicas: int | None = None, routers: int | None = None) -> Fleet:
    """Reads a fleet file; numbers given here stand in for the file's. ConfigError names file and key."""
    config = parse(application_of(load(path)).get("args") or {})
    model = config.models[0]
    if len(config.models) > 1:
        raise ConfigError(f"{path}: models: a trace is of one model, here are {len(config.models)}")
    if model.engine != "simulated":
        raise ConfigError(f"{path}: models.0.engine: only a simulated one can be simulated")
    try:
        engine = options.read(flags(arguments(model)))
        setting = Setting(
            engine.engine_config(),
            replicas or model.replicas.max,
            routers or config.router.replicas,
            slo=config.slos.get(model.name),
        )
    except ValueError as error:
        raise ConfigError(f"{path}: models.0.engine_args: {error}") from None
    return Fleet(model, engine, setting, config.router.policy)


def arrivals_of(path: Path, speed: float, seed: int) -> list[Arrival]:
    """The requests of a trace so many times as fast, spread within the grain of its timestamps."""
    return compress(spread(read(path), Random(seed)), speed)


def check(policies: Sequence[str]) -> None:
    """ConfigError if one of them is unknown."""
    for name in policies:
        if name not in POLICIES:
            raise ConfigError(f"policy: {name!r} is not a policy; known are {', '.join(POLICIES)}")


@dataclass(frozen=True, slots=True)
class Result:
    """What a policy made of a trace, and the seconds of CPU time that it took to find out."""

    policy: str
    summary: Summary
    cpu_s: float

    @classmethod
    def of(cls, policy: str, arrivals: Sequence[Arrival], fleet: Fleet, seed: int) -> Result:
        """Simulates it."""
        began = process_time()
        run = simulate(arrivals, fleet.setting, POLICIES[policy], seed)
        return cls(policy, summarize(run.outcomes, fleet.model.slo, run.refused), process_time() - began)


# -- for people


def title(trace: str, speed: float, arrivals: Sequence[Arrival], fleet: Fleet) -> str:
    """What is asked, and of what."""
    setting, slo, last = fleet.setting, fleet.model.slo, arrivals[-1].at
    requests, tokens = len(arrivals), sum(arrival.input_length for arrival in arrivals)
    cache = f"{(setting.engine.num_gpu_blocks - 1) * BLOCK_TOKENS:,} tokens of KV cache"
    if on_cpu := setting.engine.num_cpu_blocks * BLOCK_TOKENS:
        cache += f", {on_cpu:,} on the CPU"
    return (
        f"{trace} x {speed:g}: {requests:,} requests in {last / 60:.1f} min, "
        f"{requests / last:.2f} and {tokens / last:,.0f} prompt tokens a second\n"
        f"{setting.replicas} x {fleet.model.name} ({fleet.engine.preset}, {cache}), "
        f"routers: {setting.routers}\n"
        f"SLO: first token in {slo.ttft_s:g} s or {slo.ttft_times:g} x an idle engine's time, "
        f"then one each {1e3 * slo.tpot_s:g} ms"
    )


Show = Callable[[Summary], str]


def _percent(of: Callable[[Summary], float]) -> Show:
    return lambda summary: f"{100 * of(summary):.1f} %"


def _seconds(of: Callable[[Summary], float]) -> Show:
    return lambda summary: f"{of(summary):.3f} s" if of(summary) < 10 else f"{of(summary):.1f} s"


def _milliseconds(of: Callable[[Summary], float]) -> Show:
    return lambda summary: f"{1e3 * of(summary):.1f} ms"


# Each figure: its name, how it reads, and by what the best policy is told (the highest), if it is.
FIGURES: Sequence[tuple[str, Show, Callable[[Summary], float] | None]] = (
    ("within SLO", _percent(lambda s: s.attainment), lambda s: s.attainment),
    ("  the longest tenth", _percent(lambda s: s.attainment_longest), lambda s: s.attainment_longest),
    ("first token   p50", _seconds(lambda s: s.ttft_p50), lambda s: -s.ttft_p50),
    ("              p90", _seconds(lambda s: s.ttft_p90), lambda s: -s.ttft_p90),
    ("              p99", _seconds(lambda s: s.ttft_p99), lambda s: -s.ttft_p99),
    ("each token    p50", _milliseconds(lambda s: s.tpot_p50), lambda s: -s.tpot_p50),
    ("              p99", _milliseconds(lambda s: s.tpot_p99), lambda s: -s.tpot_p99),
    ("prompt tokens cached", _percent(lambda s: s.hit), lambda s: s.hit),
    ("  foreseen exactly", _percent(lambda s: s.predicted_right), None),
    ("busiest / mean replica", lambda s: f"{s.balance:.2f}", None),
    ("refused, too long", lambda s: f"{s.refused:,}", None),
    ("  by the line", _percent(lambda s: s.turned_away), None),
    ("load sustained", lambda s: "yes" if s.strict else "no", None),
)


def report(results: Sequence[Result]) -> Table:
    """A column per policy, the best of each figure in bold."""
    table = Table("", box=None, padding=(0, 2, 0, 0))
    for result in results:
        table.add_column(result.policy, justify="right")
    for name, show, rank in FIGURES:
        best = max(rank(result.summary) for result in results) if rank and len(results) > 1 else None
        cells = [
            f"[bold]{show(r.summary)}[/]" if rank and rank(r.summary) == best else show(r.summary)
            for r in results
        ]
        table.add_row(name, *cells)
    table.add_row("[dim]simulated in[/]", *(f"[dim]{result.cpu_s:.1f} s[/]" for result in results))
    return table


NOTE = (
    f"Sustained: at least {STRICT_ALL:.0%} within SLO, and {STRICT_LONGEST:.0%} of the longest tenth.\n"
    "The first tenth of all requests is left out, since caches are empty then.\n"
    "Step times are modelled, not measured."
)


# -- for programs


def as_json(trace: str, speed: float, seed: int, fleet: Fleet, results: Sequence[Result]) -> bytes:
    """The scenario, and the figures of each policy; times in seconds, shares 0 to 1."""
    about = {
        "trace": trace,
        "speed": speed,
        "seed": seed,
        "model": fleet.model.name,
        "replicas": fleet.setting.replicas,
        "routers": fleet.setting.routers,
        "slo": fleet.model.slo.model_dump(),
    }
    policies = [
        {"policy": r.policy, **asdict(r.summary), "strict": r.summary.strict, "cpu_s": round(r.cpu_s, 2)}
        for r in results
    ]
    return msgspec.json.format(msgspec.json.encode({**about, "policies": policies}))
