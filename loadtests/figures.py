"""What a load test measured, and whether that was good enough."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from rich.table import Table

from loadtests.scenarios.session import Slo

# Where the scenario is one of several tenants, the row of all of them together.
ALL = "all"


@dataclass(frozen=True, slots=True)
class Times:
    """Percentiles in milliseconds; None where nothing was measured."""

    p50: float | None = None
    p90: float | None = None
    p99: float | None = None


@dataclass(frozen=True, slots=True)
class Figures:
    """The requests of everybody, or of one tenant. `seconds`: from the beginning to the last answer.

    `cached_tokens` is None where engines do not tell; `late` is about sessions, in an open loop.
    """

    requests: int
    failures: int
    seconds: float
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int | None = None
    ttft_ms: Times = field(default_factory=Times)
    tpot_ms: Times = field(default_factory=Times)
    late_ms: Times = field(default_factory=Times)

    @property
    def requests_per_second(self) -> float:
        return self.requests / self.seconds if self.seconds else 0.0

    @property
    def output_tokens_per_second(self) -> float:
        return self.output_tokens / self.seconds if self.seconds else 0.0

    @property
    def cached_share(self) -> float | None:
        """Of the prompts' tokens, those that were in cache."""
        if self.cached_tokens is None or not self.prompt_tokens:
            return None
        return self.cached_tokens / self.prompt_tokens


@dataclass(frozen=True, slots=True)
class Check:
    """One threshold: what was measured and what was allowed, both in the same unit."""

    name: str
    value: float | None
    limit: float

    @property
    def passed(self) -> bool:
        """What was not measured does not pass."""
        return self.value is not None and self.value <= self.limit

    def __str__(self) -> str:
        value = "nothing" if self.value is None else f"{self.value:g}"
        return f"{'pass' if self.passed else 'FAIL'}  {self.name}: {value}, at most {self.limit:g}"


def checks(figures: Figures, slo: Slo) -> Iterator[Check]:
    """Each threshold that is set, against the figures of those whom it is promised."""
    yield Check(
        "share of requests that failed",
        figures.failures / figures.requests if figures.requests else None,
        slo.failures,
    )
    if slo.ttft_p99_ms is not None:
        yield Check("TTFT p99, ms", figures.ttft_ms.p99, slo.ttft_p99_ms)
    if slo.tpot_p99_ms is not None:
        yield Check("TPOT p99, ms", figures.tpot_ms.p99, slo.tpot_p99_ms)


def table(rows: dict[str, Figures]) -> Table:
    """A row for each tenant, or one for all."""
    made = Table(box=None, pad_edge=False)
    named = len(rows) > 1
    for head in (*(["tenant"] if named else []), "requests", "failed", "req/s", "output tok/s",
                 "TTFT p50", "p90", "p99 ms", "TPOT p50", "p99 ms", "cached", "late p99 ms"):  # fmt: skip
        made.add_column(head, justify="left" if head == "tenant" else "right")
    for name, figures in rows.items():
        made.add_row(*([name] if named else []), *_cells(figures))
    return made


def _cells(figures: Figures) -> Sequence[str]:
    ttft, tpot = figures.ttft_ms, figures.tpot_ms
    return (
        str(figures.requests),
        str(figures.failures),
        f"{figures.requests_per_second:.1f}",
        f"{figures.output_tokens_per_second:.0f}",
        *map(_ms, (ttft.p50, ttft.p90, ttft.p99, tpot.p50, tpot.p99)),
        "-" if figures.cached_share is None else f"{figures.cached_share:.0%}",
        _ms(figures.late_ms.p99),
    )


def _ms(value: float | None) -> str:
    return "-" if value is None else f"{value:.3g}" if value < 100 else f"{value:.0f}"
