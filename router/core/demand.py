"""What is asked of a model's replicas: each router counts it, and what all counted is seen here as rates."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import msgspec

from router.core.fleet import Fleet

# Rates are told of at most this long (seconds): longer ago is another time of day. So long are the lengths
# of requests averaged: those of a minute's requests differ by a seventh by chance alone.
LOOK_BACK_S = 300.0
# Until an answer ended it is taken to be so long (tokens): between those of the traces, 149 and 343.
UNTOLD_OUTPUT = 256.0


class Counts(NamedTuple):
    """What a router counted for a model since it began.

    `came`: requests; `tokens`: of their prompts, those that no replica had cached. `went`: the same tokens of
    the requests that were placed, `prefill_s`: seconds of prefill that were promised for those. `ended`,
    `output`: answers that came to an end, and their tokens. `placed`: requests at replicas, those too that
    never were in line, and each again when it was tried again.
    """

    came: int = 0
    tokens: int = 0
    went: int = 0
    prefill_s: float = 0.0
    ended: int = 0
    output: int = 0
    placed: int = 0

    def plus(self, other: Counts) -> Counts:
        """Both together."""
        return Counts._make(a + b for a, b in zip(self, other, strict=True))

    def minus(self, other: Counts) -> Counts:
        """What was counted since the other; nothing where that was more, of a router that began anew."""
        return Counts._make(max(0, a - b) for a, b in zip(self, other, strict=True))


class Work(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """A router's counts, and what it has now: `waiting` requests in line, `waiting_tokens` of which are to be
    computed, and `in_flight` at replicas, of which `decoding` with `context` tokens behind them."""

    counts: Counts = Counts()
    waiting: int = 0
    waiting_tokens: int = 0
    in_flight: int = 0
    decoding: int = 0
    context: int = 0


class Scaled(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """What a router tells the others of a model: what it counted, and how many replicas there are to be, None
    from one that leaves. `version`: how many decisions led there; the last one counts, whoever made it, for
    this `reason`."""

    work: Work
    target: int | None
    version: int
    reason: str = ""


class Queue(Protocol):
    """What is read of a waiting line (core/admission.Line)."""

    came: int
    came_tokens: int
    went_tokens: int
    tokens: int

    def __len__(self) -> int:
        """How many wait."""


def work(fleet: Fleet, model: str, lines: Iterable[Queue]) -> Work:
    """What this router counted for a model; `lines`: that of the model, and those of its adapters."""
    lines, tally = list(lines), fleet.tally(model)
    counts = Counts(
        came=sum(line.came for line in lines),
        tokens=sum(line.came_tokens for line in lines),
        went=sum(line.went_tokens for line in lines),
        prefill_s=tally.prefill_s,
        ended=tally.ended,
        output=tally.output,
        placed=tally.placed,
    )
    standings = fleet.of_model(model)
    return Work(
        counts,
        waiting=sum(len(line) for line in lines),
        waiting_tokens=sum(line.tokens for line in lines),
        in_flight=sum(standing.in_flight for standing in standings),
        decoding=sum(standing.decoding for standing in standings),
        context=sum(standing.context for standing in standings),
    )


@dataclass(frozen=True, slots=True)
class Demand:
    """What is asked in each second: `requests`, `prefill_s` seconds of uncached prefill, `output` tokens; the
    latter two as much for each request as over all of LOOK_BACK_S. And how many requests are `placed`,
    whether or not they came through the line.

    And now: `waiting` requests that take `waiting_s` seconds of prefill, `in_flight` at replicas, and how
    many tokens of `context` a stream has behind it on average.
    """

    requests: float = 0.0
    prefill_s: float = 0.0
    output: float = 0.0
    waiting: int = 0
    waiting_s: float = 0.0
    in_flight: int = 0
    context: float = 0.0
    placed: float = 0.0

    @property
    def idle(self) -> bool:
        """Nobody asks for anything, waits or is being answered."""
        return not (self.requests or self.placed or self.waiting or self.in_flight)


class Meter:
    """Adds up what all routers counted, and remembers the sums of LOOK_BACK_S."""

    def __init__(self, now: float) -> None:
        self._last: dict[str, Work] = {}
        self._times = [now]
        self._sums = [Counts()]

    def observe(self, now: float, works: Mapping[str, Work]) -> None:
        """The work of every router, by its name. What one counted before it was first heard of is not known:
        it may be older than this meter."""
        came = [work.counts.minus(self._last.get(name, work).counts) for name, work in works.items()]
        self._times.append(now)
        self._sums.append(_sum([self._sums[-1], *came]))
        self._last = dict(works)
        old = max(0, bisect_right(self._times, now - LOOK_BACK_S) - 1)
        del self._times[:old], self._sums[:old]

    def remembers_s(self) -> float:
        """Of how many seconds it can tell."""
        return self._times[-1] - self._times[0]

    def demand(self, window_s: float, before_s: float = 0.0, s_per_token: float = 0.0) -> Demand:
        """Rates over so many seconds, which ended so long ago. `s_per_token`: what a prompt's token takes, as
        long as none were placed to tell by."""
        until = self._times[-1] - before_s
        begins = max(self._times[0], until - window_s)
        counted = self._at(until).minus(self._at(begins))
        passed_s = max(1e-9, until - begins)
        s_per_token, output = self._per_token_s(s_per_token), self._per_answer()
        works = self._last.values()
        decoding = sum(work.decoding for work in works)
        return Demand(
            requests=counted.came / passed_s,
            prefill_s=counted.came * self._tokens_each() * s_per_token / passed_s,
            output=counted.came * output / passed_s,
            waiting=sum(work.waiting for work in works),
            waiting_s=sum(work.waiting_tokens for work in works) * s_per_token,
            in_flight=sum(work.in_flight for work in works),
            context=sum(work.context for work in works) / decoding if decoding else 0.0,
            placed=counted.placed / passed_s,
        )

    def _at(self, time: float) -> Counts:
        return self._sums[max(0, bisect_right(self._times, time) - 1)]

    def _per_token_s(self, untold: float) -> float:
        """What is promised for a request where it goes is more than its tokens say if it goes where little of
        it is cached, and if it has to be placed twice."""
        known = self._sums[-1].minus(self._sums[0])
        return known.prefill_s / known.went if known.went else untold

    def _tokens_each(self) -> float:
        known = self._sums[-1].minus(self._sums[0])
        return known.tokens / known.came if known.came else 0.0

    def _per_answer(self) -> float:
        known = self._sums[-1].minus(self._sums[0])
        return known.output / known.ended if known.ended else UNTOLD_OUTPUT


def _sum(counts: Iterable[Counts]) -> Counts:
    total = Counts()
    for each in counts:
        total = total.plus(each)
    return total
