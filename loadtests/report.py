"""Tables of what was measured, in Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

from loadtests.contenders import DIRECT, HERD
from loadtests.generator import Sample

SMALL = "small"


@dataclass(frozen=True, slots=True)
class Run:
    """One router in one round of the relay benchmark. Samples by load: `small`, `stream 64`."""

    router: str
    round: int
    rss_bytes: int
    samples: dict[str, Sample]


def cost_us(kind: str, sample: Sample) -> float:
    """CPU microseconds per request (`small`) or per event that reached a client."""
    return 1e6 * sample.cpu_s / (sample.requests if kind == SMALL else sample.events)


def spread(values: Sequence[float], digits: int = 1) -> str:
    """`median (min..max)` of one figure over the rounds."""
    if not values:
        return "-"
    if len(values) == 1:
        return f"{values[0]:.{digits}f}"
    middle, low, high = statistics.median(values), min(values), max(values)
    return f"{middle:.{digits}f} ({low:.{digits}f}..{high:.{digits}f})"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


# A figure by router and round.
Rounds = Mapping[tuple[str, int], float]


def compared(costs: Rounds, name: str) -> str:
    """What a router costs beside Herd in the same round: over 1 is dearer."""
    if name in (DIRECT, HERD):
        return "-"
    rounds = [n for router, n in costs if router == name and (HERD, n) in costs]
    return spread([costs[name, n] / costs[HERD, n] for n in rounds], 2)


def added(times: Rounds, name: str) -> str:
    """Time beyond that of the same round without a router."""
    if name == DIRECT:
        return "-"
    rounds = [n for router, n in times if router == name and (DIRECT, n) in times]
    return spread([times[name, n] - times[DIRECT, n] for n in rounds], 2)


def where(machine: dict[str, str]) -> str:
    """What the figures were measured on, in a line."""
    return f"{machine['date']}, {machine['cpu']}, Linux {machine['kernel']}, Python {machine['python']}."


def relay_report(runs: Sequence[Run], machine: dict[str, str]) -> str:
    """The relay benchmark: a table per load, a row per router."""
    names = list(dict.fromkeys(run.router for run in runs))
    kinds = list(runs[0].samples)
    parts = [where(machine)]
    for kind in sorted(kinds, key=lambda kind: kind == SMALL):
        parts += [_title(kind), _small(runs, names) if kind == SMALL else _streams(runs, names, kind)]
    parts.append(
        f"`{DIRECT}`: no router; its CPU and memory are those of the mock engines. "
        "*Of Herd's*: a router's CPU by Herd's in the same round."
    )
    return "\n\n".join(parts)


def _title(kind: str) -> str:
    return "### Small requests" if kind == SMALL else f"### {kind.removeprefix('stream ')} streams"


def _streams(runs: Sequence[Run], names: Sequence[str], kind: str) -> str:
    head = [
        "router",
        "CPU us/chunk",
        "of Herd's",
        "chunks/s",
        "TTFT p50 ms",
        "TTFT p99 ms",
        "added TTFT p50 ms",
        "RSS MB",
    ]
    return table(head, (_stream_row(runs, name, kind) for name in names))


def _stream_row(runs: Sequence[Run], name: str, kind: str) -> list[str]:
    figures = _figures(runs, name, kind)
    return [
        name,
        figures(lambda s: cost_us(kind, s)),
        _compared(runs, name, kind),
        figures(lambda s: s.events / s.seconds, 0),
        figures(lambda s: s.first_p50_ms, 2),
        figures(lambda s: s.first_p99_ms, 2),
        _added(runs, name, kind),
        _memory(runs, name),
    ]


def _small(runs: Sequence[Run], names: Sequence[str]) -> str:
    head = ["router", "CPU us/request", "of Herd's", "requests/s", "p50 ms", "p99 ms", "RSS MB"]
    return table(head, (_small_row(runs, name) for name in names))


def _small_row(runs: Sequence[Run], name: str) -> list[str]:
    figures = _figures(runs, name, SMALL)
    return [
        name,
        figures(lambda s: cost_us(SMALL, s)),
        _compared(runs, name, SMALL),
        figures(lambda s: s.requests / s.seconds, 0),
        figures(lambda s: s.first_p50_ms, 2),
        figures(lambda s: s.first_p99_ms, 2),
        _memory(runs, name),
    ]


def _figures(runs: Sequence[Run], name: str, kind: str) -> Callable[..., str]:
    samples = [run.samples[kind] for run in runs if run.router == name]

    def figures(of: Callable[[Sample], float], digits: int = 1) -> str:
        return spread([of(sample) for sample in samples], digits)

    return figures


def _compared(runs: Sequence[Run], name: str, kind: str) -> str:
    return compared({(run.router, run.round): cost_us(kind, run.samples[kind]) for run in runs}, name)


def _added(runs: Sequence[Run], name: str, kind: str) -> str:
    return added({(run.router, run.round): run.samples[kind].first_p50_ms for run in runs}, name)


def _memory(runs: Sequence[Run], name: str) -> str:
    return spread([run.rss_bytes / 1e6 for run in runs if run.router == name], 0)
