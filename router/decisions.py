"""Why each request went where it did, and what came of it: the newest decisions, in memory.

On a request's path numbers are packed and references kept, no more; what people read is made when they ask.
The garbage collector does not look at decisions, however many stay: no cycle comes of one.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Iterator
from itertools import islice, repeat
from math import isnan, nan
from struct import Struct, pack
from typing import Annotated, Any

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from router.core.fleet import NOTHING_CACHED, Cached, Forecast, Standing, Trust, View
from router.core.placement import Placement
from router.errors import DecisionNotFound
from router.http.headers import Headers
from router.http.sse import Usage
from router.series import Counters

# What a decision comes to, seen from the caches: a label of a metric, so there are few.
BLIND = "blind"  # nothing was known of the prompt
COLD = "cold"  # no replica was known to have any of it
CACHED = "cached"  # no replica had more of it than the chosen one
AWAY = "away"  # another one had more
BRANCHES = (BLIND, COLD, CACHED, AWAY)

# What is kept of a candidate: requests in flight, sequences decoding; where the policy goes by more also
# tokens cached at hand, on slower tiers, what was FORECAST, and its cost.
LOAD = Struct("2i")
CANDIDATE = Struct("4i7f")
FORECAST = ("backlog_s", "prefill_s", "step_s", "ttft_s", "busy", "loading_s")
UNTOLD = Forecast(nan, nan, nan, nan, nan, 0, nan)
UNKNOWN = (0, 0, *[nan] * 7)
# Of the error that ended a stream as much is kept; vLLM's sentences are shorter.
ERROR_BYTES = 300
# What a header's value does not hold (RFC 9110, section 5.5, less what is not ASCII).
_UNSAID = re.compile(r"[^\x20-\x7e]+")


class DecisionsConfig(BaseModel):
    """What is told of decisions.

    `keep`: the newest so many, in each router process; one takes about 0.7 KiB, and 44 bytes more for each
    replica of its model. `headers`: replies tell theirs, in x-route-decision and x-herd-replica.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    keep: Annotated[int, Field(ge=0, le=1_000_000)] = 10_000
    headers: bool = False


AS_USUAL = DecisionsConfig()


class Decision(msgspec.Struct, gc=False, eq=False):
    """One placement of one request, and what came of it. Times are those of the event loop's clock.

    `replicas`, `trusts`, `figures` (of each a CANDIDATE, or of each its LOAD): what there was to choose from.
    `num_tokens`: the prompt's, 0 if it was not known. `cached`: what the chosen replica was known to have of
    it. `earlier`: the placement that failed before this one, which has `moved`.

    `ttft_s`: until the first token, as predicted when the fleet counted the request. `token_ids`: whether the
    engine got those of the prompt, or why not. `usage`: tokens of the prompt, of these cached, of the output,
    as the engine reported them.
    """

    request_id: bytes
    model: str
    standing: Standing
    reason: str
    branch: str
    replicas: tuple[Standing, ...]
    trusts: tuple[Trust, ...]
    figures: bytes | bytearray
    num_tokens: int
    cached: Cached
    placed_at: float
    earlier: Decision | None
    moved: bool = False
    ttft_s: float | None = None
    token_ids: str = "not sent"
    first_output_at: float | None = None
    usage: tuple[int, int, int] | None = None
    status: int | None = None
    trouble: str | None = None
    ended_at: float | None = None

    def first_output(self, now: float) -> float | None:
        """The first output was seen; how long it took for each second predicted, if that can be told."""
        self.first_output_at = now
        if not self.num_tokens or not self.ttft_s:
            return None
        return (now - self.placed_at) / self.ttft_s

    def answered(self, usage: Usage | None, error: bytes | None) -> None:
        """What the engine reported, and the error with which it ended its stream."""
        if usage is not None:
            self.usage = (usage.prompt_tokens, usage.cached_tokens, usage.completion_tokens or 0)
        if error is not None:
            self.trouble = f"the engine's error: {error[:ERROR_BYTES].decode(errors='replace')}"

    def failed(self, error: BaseException) -> None:
        """What ended the exchange; only its sentence is kept, since it holds on to all that it passed."""
        left = isinstance(error, asyncio.CancelledError)
        self.trouble = "the client left" if left else str(error) or type(error).__name__

    def ended(self, now: float, status: int) -> None:
        """The exchange is over. `status`: what the client was told by then, 0 for nothing."""
        self.ended_at, self.status = now, status


class Decisions:
    """The newest decisions of one router process."""

    def __init__(self, policy: str, config: DecisionsConfig, counters: Counters) -> None:
        self._policy = policy
        self._told = config.headers
        self._kept: deque[Decision] = deque(maxlen=config.keep)
        self._counts = {branch: counters.labels(policy, branch) for branch in BRANCHES}
        self._trusts: tuple[Trust, ...] = ()

    def placed(
        self, request_id: bytes, model: str, view: View, placement: Placement, earlier: Decision | None
    ) -> Decision:
        """Notes a placement, before the fleet counts it. `earlier`: the one that the request failed on."""
        replicas = view.replicas
        had = view.cached.get(placement.standing.replica.id, NOTHING_CACHED)
        branch = _branch(view, had)
        decision = Decision(
            request_id,
            model,
            placement.standing,
            placement.reason,
            branch,
            replicas,
            self._shared(tuple([s.trust for s in replicas])),
            _packed(view, placement) if placement.forecasts or view.cached else _loads(replicas),
            view.num_tokens,
            had,
            view.now,
            earlier,
        )
        if earlier is not None:
            earlier.moved = True
        self._counts[branch].inc()
        self._kept.append(decision)
        return decision

    def headers(self, decision: Decision) -> Headers:
        """What its reply says of a decision."""
        if not self._told:
            return []
        why = f"{self._policy}; {decision.reason}"
        return [(b"x-route-decision", _value(why)), (b"x-herd-replica", _value(decision.standing.id))]

    def on(self, request_id: str) -> Decision:
        """The newest on this request. Raises DecisionNotFound."""
        wanted = request_id.encode()
        for decision in reversed(self._kept):
            if decision.request_id == wanted:
                return decision
        told = f"No decision on request {request_id!r} is kept here; this process keeps its last"
        raise DecisionNotFound(f"{told} {self._kept.maxlen}")

    def newest(self, count: int) -> list[Decision]:
        """The last one on each of so many requests, the newest first."""
        return list(islice((d for d in reversed(self._kept) if not d.moved), count))

    def _shared(self, trusts: tuple[Trust, ...]) -> tuple[Trust, ...]:
        """The last one again if it is equal, as it is unless trust was won or lost."""
        if trusts != self._trusts:
            self._trusts = trusts
        return self._trusts

    def described(self, decision: Decision, epoch: float) -> dict[str, Any]:
        """A request's decisions for JSON. `epoch`: the loop's clock 0 as a Unix time."""
        attempts = [_described(each, epoch) for each in _attempts(decision)]
        return {
            "request_id": decision.request_id.decode("ascii"),
            "model": decision.model,
            "policy": self._policy,
            "attempts": attempts,
        }


def _value(said: str) -> bytes:
    """As a header can hold it."""
    return _UNSAID.sub("?", said).encode("ascii")


def _branch(view: View, had: Cached) -> str:
    if not view.num_tokens:
        return BLIND
    if not view.cached:
        return COLD
    return CACHED if had >= max(view.cached.values()) else AWAY


def _loads(replicas: tuple[Standing, ...]) -> bytes:
    """The LOAD of each."""
    numbers: list[int] = []
    for standing in replicas:
        others = standing.elsewhere
        numbers += (standing.in_flight + others.in_flight, standing.decoding + others.decoding)
    return pack(f"{len(numbers)}i", *numbers)


def _packed(view: View, placement: Placement) -> bytearray:
    """A CANDIDATE for each replica of the view."""
    had, pack_into = view.cached.get, CANDIDATE.pack_into
    forecasts, costs = placement.forecasts or repeat(UNTOLD), placement.costs or repeat(nan)
    packed, place = bytearray(CANDIDATE.size * len(view.replicas)), 0
    for standing, forecast, cost in zip(view.replicas, forecasts, costs, strict=False):
        cached, others = had(standing.replica.id, NOTHING_CACHED), standing.elsewhere
        pack_into(
            packed,
            place,
            standing.in_flight + others.in_flight,
            standing.decoding + others.decoding,
            cached[0],  # by place, which costs half as much as by name
            cached[1],
            forecast[0],
            forecast[1],
            forecast[2],
            forecast[3],
            forecast[4],
            forecast[6],
            cost,
        )
        place += CANDIDATE.size
    return packed


# -- as people read it


def _attempts(decision: Decision) -> list[Decision]:
    """The request's placements up to this one, the first one first."""
    found = [decision]
    while (earlier := found[-1].earlier) is not None:
        found.append(earlier)
    return found[::-1]


def _described(decision: Decision, epoch: float) -> dict[str, Any]:
    return {
        "placed_at": round(epoch + decision.placed_at, 3),  # uvloop's clock counts milliseconds
        "replica": decision.standing.id,
        "reason": decision.reason,
        "branch": decision.branch,
        "token_ids": decision.token_ids,
        "candidates": list(_candidates(decision)),
        "predicted": _predicted(decision),
        "observed": _observed(decision),
        "outcome": _outcome(decision),
    }


def _candidates(decision: Decision) -> Iterator[dict[str, Any]]:
    rows = zip(decision.replicas, decision.trusts, _unpacked(decision), strict=True)
    for standing, trust, (in_flight, decoding, cached, slower, *forecast, cost_s) in rows:
        yield {
            "replica": standing.id,
            "chosen": standing is decision.standing,
            "trust": trust,
            "cached_tokens": cached,
            "slower_tokens": slower,
            **{name: _known(number) for name, number in zip(FORECAST, forecast, strict=True)},
            "cost_s": _known(cost_s),
            "decoding": decoding,
            "in_flight": in_flight,
        }


def _unpacked(decision: Decision) -> Iterator[tuple[Any, ...]]:
    figures = decision.figures
    if len(figures) == CANDIDATE.size * len(decision.replicas):
        return CANDIDATE.iter_unpack(figures)
    return (load + UNKNOWN for load in LOAD.iter_unpack(figures))


def _known(number: float) -> float | None:
    return None if isnan(number) else float(f"{number:.6g}")  # single precision has seven digits


def _predicted(decision: Decision) -> dict[str, Any]:
    """What the placement went by; nothing where the prompt was not known."""
    known = decision.num_tokens > 0
    return {
        "prompt_tokens": decision.num_tokens if known else None,
        "cached_tokens": decision.cached.known if known else None,
        "ttft_s": decision.ttft_s if known else None,
    }


def _observed(decision: Decision) -> dict[str, Any]:
    """What the engine reported, and what was seen of it here."""
    prompt, cached, output = decision.usage or (None, None, None)
    return {
        "prompt_tokens": prompt,
        "cached_tokens": cached,
        "output_tokens": output,
        "ttft_s": _since(decision.placed_at, decision.first_output_at),
        "duration_s": _since(decision.placed_at, decision.ended_at),
    }


def _since(start: float, end: float | None) -> float | None:
    return None if end is None else end - start


def _outcome(decision: Decision) -> str:
    if decision.ended_at is None:
        return "running"
    if decision.trouble is None:
        return f"answered {decision.status}"
    return f"{decision.trouble}; tried elsewhere" if decision.moved else decision.trouble
