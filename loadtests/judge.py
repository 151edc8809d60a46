"""Locust, beside locustfile.py: thresholds, a line now and then, and a table at the end.

    locust -f loadtests/locustfile.py,loadtests/judge.py --host ... --headless -t 60s --max-ttft-p99-ms 500

`herd loadtest` runs it so. The exit code is 1 where a threshold was broken, and 0 else.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections import Counter

import gevent
import msgspec
from locust import events, stats
from locust.argument_parser import LocustArgumentParser
from locust.env import Environment
from locust.runners import WorkerRunner
from locust.stats import RequestStats, StatsEntry
from rich.console import Console

from loadtests.answer import Usage
from loadtests.figures import ALL, Check, Figures, Times, checks, table
from loadtests.scenarios.session import Slo

# Between two lines while the test runs.
LINE_S = 5.0
# Of what failed the most frequent kinds.
ERRORS = 5
# Sessions that begin later than this are the load generator's fault.
LATE_MS = 100.0
LATE = "This process was late to ask: it is the bottleneck, at least in part. Lower the rate, or run several."
# Nothing is folded where no terminal has to be fitted.
WIDE = 1000


def three_digits(milliseconds: float) -> float:
    """What Locust keeps of a time: its own whole milliseconds and two digits are too coarse for tokens."""
    return float(f"{milliseconds:.3g}")


stats.bucket_response_time = three_digits


@events.init_command_line_parser.add_listener
def add_arguments(parser: LocustArgumentParser) -> None:
    """Thresholds, and how they are told."""
    group = parser.add_argument_group("Herd's thresholds")
    for name, type_, default, text in (
        ("max_ttft_p99_ms", float, None, "Longest time to first token, of 99 %% of requests"),
        ("max_tpot_p99_ms", float, None, "Longest time per token after it, of 99 %% of requests"),
        ("max_failures", float, 0.0, "Share of requests that may fail, 0 to 1"),
        ("judged_tenant", str, "", "Whose requests the thresholds are about"),
        ("summary", str, "text", "text, or json for programs"),
    ):
        flag, variable = f"--{name.replace('_', '-')}", f"HERD_LOAD_{name.upper()}"
        group.add_argument(flag, type=type_, default=default, env_var=variable, help=text)


@events.init.add_listener
def watch(environment: Environment, **_: object) -> None:
    """From here on the run has a judge; of several processes only the one that hears of all requests."""
    if isinstance(environment.runner, WorkerRunner):
        return
    judge = Judge(environment)
    environment.events.test_start.add_listener(judge.begin)
    environment.events.request.add_listener(judge.count)
    environment.events.test_stop.add_listener(judge.end)
    environment.events.quitting.add_listener(judge.give_verdict)


class Judge:
    """Counts tokens of prompts, for which Locust has no place; all else stands in its own rows."""

    def __init__(self, environment: Environment) -> None:
        self._environment = environment
        self._began = time.time()
        self._prompt, self._cached = Counter[str](), Counter[str]()
        self._lines = gevent.Greenlet()

    def begin(self, **_: object) -> None:
        """Counts from here, and says now and then how it goes."""
        self._began = time.time()
        self._prompt.clear()
        self._cached.clear()
        self._lines = gevent.spawn(self._tell)

    def end(self, **_: object) -> None:
        """No more lines."""
        self._lines.kill()

    def count(self, name: str, context: dict[str, object], **_: object) -> None:
        """Adds what a prompt was made of; `name` is that of its row."""
        usage = context.get("usage")
        if not isinstance(usage, Usage):
            return
        self._prompt[name] += usage.prompt_tokens
        if usage.cached_tokens is not None:
            self._cached[name] += usage.cached_tokens

    def _tell(self) -> None:
        while True:
            gevent.sleep(LINE_S)
            figures = self.rows()[ALL]
            told = (
                f"{time.time() - self._began:5.0f} s: {figures.requests} requests, {figures.failures} failed"
            )
            if (ttft := figures.ttft_ms).p50 is not None:
                told += f", TTFT p50 {ttft.p50:g} p99 {ttft.p99:g} ms"
            print(told, file=sys.stderr, flush=True)

    def give_verdict(self, **_: object) -> None:
        """The table, the thresholds, and the exit code."""
        options = self._environment.parsed_options
        slo = Slo(
            options.max_ttft_p99_ms, options.max_tpot_p99_ms, options.max_failures, options.judged_tenant
        )
        rows = self.rows()
        results = list(checks(rows.get(slo.tenant or ALL, Figures(0, 0, 0.0)), slo))
        show = as_json if options.summary == "json" else as_text
        show(rows, results, reasons(self._environment.stats), options.html_file)
        self._environment.process_exit_code = 0 if all(check.passed for check in results) else 1

    def rows(self) -> dict[str, Figures]:
        """The figures of each tenant by name, and those of all together last."""
        names = sorted(name for name, method in self._environment.stats.entries if method == "POST")
        tenants = {name.partition(" ")[2]: [name] for name in names if " " in name}
        return {tenant: self._figures(own) for tenant, own in {**tenants, ALL: names}.items()}

    def _figures(self, names: list[str]) -> Figures:
        """What was measured under these names, taken together."""
        asked, ttft, tpot, late = (self._together(names, row) for row in ("POST", "TTFT", "TPOT", "LATE"))
        ended = asked.last_request_timestamp
        told = [self._cached[name] for name in names if name in self._cached]
        return Figures(
            requests=asked.num_requests,
            failures=asked.num_failures,
            seconds=max(0.0, ended - self._began) if ended else 0.0,
            prompt_tokens=sum(self._prompt[name] for name in names),
            output_tokens=asked.total_content_length,
            cached_tokens=sum(told) if told else None,
            ttft_ms=times(ttft),
            tpot_ms=times(tpot),
            late_ms=times(late),
        )

    def _together(self, names: list[str], method: str) -> StatsEntry:
        made = StatsEntry(self._environment.stats, "", method)
        for (name, kind), entry in self._environment.stats.entries.items():
            if kind == method and name in names:
                made.extend(entry)
        return made


def times(entry: StatsEntry) -> Times:
    """Its percentiles."""
    if not entry.num_requests:
        return Times()
    return Times(*(entry.get_response_time_percentile(share) for share in (0.5, 0.9, 0.99)))


def reasons(measured: RequestStats) -> list[tuple[int, str]]:
    """Why requests failed, the most frequent reasons first, each with how often it was one."""
    counts = Counter({str(error.error): error.occurrences for error in measured.errors.values()})
    return [(count, reason) for reason, count in counts.most_common(ERRORS)]


def as_text(
    rows: dict[str, Figures], results: list[Check], failed: list[tuple[int, str]], report: str | None
) -> None:
    """For people, on stdout."""
    out = Console(highlight=False, width=None if sys.stdout.isatty() else WIDE)
    out.print(table(rows))
    for count, reason in failed:
        out.print(f"{count} x {reason}", markup=False, soft_wrap=True)
    if (rows[ALL].late_ms.p99 or 0) > LATE_MS:
        out.print(LATE, style="bold yellow")
    out.print()
    for check in results:
        out.print(str(check), style=None if check.passed else "bold red", markup=False)
    if report:
        out.print(f"Report: {report}", markup=False, soft_wrap=True)


def as_json(
    rows: dict[str, Figures], results: list[Check], failed: list[tuple[int, str]], report: str | None
) -> None:
    """For programs, on stdout."""
    told = {
        "passed": all(check.passed for check in results),
        "checks": [{**dataclasses.asdict(check), "passed": check.passed} for check in results],
        "figures": {name: as_object(figures) for name, figures in rows.items()},
        "failures": [{"times": count, "reason": reason} for count, reason in failed],
        "report": report,
    }
    print(msgspec.json.format(msgspec.json.encode(told)).decode(), flush=True)


def as_object(figures: Figures) -> dict[str, object]:
    """All fields, and what is reckoned from them."""
    reckoned = ("requests_per_second", "output_tokens_per_second", "cached_share")
    return {**dataclasses.asdict(figures), **{name: getattr(figures, name) for name in reckoned}}
