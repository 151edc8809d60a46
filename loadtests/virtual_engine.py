"""A simulated engine in virtual time, run as workers.simulated.live runs one in real time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from loadtests.timeline import Timeline
from workers.simulated.core import Content, Engine, EngineConfig, Quiet, Sequence, Step


@dataclass(frozen=True, slots=True)
class Report:
    """An engine's own words, as a scrape of its /metrics finds them: requests in line, in the batch, and the
    share of KV blocks in use (0 to 1)."""

    waiting: int = 0
    running: int = 0
    kv_usage: float = 0.0


class VirtualEngine:
    """One engine. `deliver` is given each step when it is over, but for those that only decode.

    These are skipped: a stretch of them is planned to its end, and cut short when a request comes. They
    change nothing that a `Report` or a KV event tells. `scrape_period`: seconds between reports.
    """

    def __init__(
        self, config: EngineConfig, timeline: Timeline, scrape_period: float, deliver: Callable[[Step], None]
    ) -> None:
        self._core = Engine(config)
        self._timeline = timeline
        self._deliver = deliver
        self._busy = False
        self._quiet_since: float | None = None
        self._quiet: Quiet | None = None
        self._scrape_period = scrape_period
        self._scraped_at = 0.0
        self._report = Report()

    def add(self, id: str, content: Content, max_tokens: int) -> Sequence:
        """A request arrives. ValueError if it could never fit."""
        now = self._timeline.now
        self.report()
        if self._quiet_since is not None:
            self._skip_later(self._core.quiet(self._quiet_since, until=now))
            self._quiet_since = None
        sequence = self._core.add(id, content, max_tokens, now)
        if not self._busy:
            self._begin()
        return sequence

    def report(self) -> Report:
        """What the last scrape saw.

        It is made up when somebody asks, and before something changes: what is there then was there at the
        time of the scrape.
        """
        scraped_at = self._timeline.now // self._scrape_period * self._scrape_period
        if scraped_at > self._scraped_at:
            self._scraped_at = scraped_at
            self._report = Report(self._core.num_waiting, self._core.num_running, self._core.kv_usage)
        return self._report

    def _begin(self) -> None:
        """The next step, or all quiet ones that come next."""
        now = self._timeline.now
        self.report()
        quiet = self._core.quiet(now)
        if quiet.steps:
            self._quiet_since = now
            self._skip_later(quiet)
        elif step := self._core.step(now):
            self._busy = True
            self._timeline.at(now + step.duration, self._end, step)
        else:
            self._busy = False

    def _end(self, step: Step) -> None:
        self._deliver(step)
        self._begin()

    def _skip_later(self, quiet: Quiet) -> None:
        self._quiet = quiet
        self._timeline.at(quiet.ends, self._skip, quiet)

    def _skip(self, quiet: Quiet) -> None:
        if quiet is self._quiet:  # and was not cut short
            self._quiet_since = None
            self._core.skip(quiet.steps)
            self._begin()
