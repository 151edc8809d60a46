"""The waiting line at the wire: who asks for a replica waits here until there is room, or is refused.

What is decided is decided in router/core/admission.py. A line looks who can go when a first token comes or a
request ends, and else every moment: much of what makes room is time that passes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from math import ceil, inf, isfinite, nan
from random import random
from typing import Annotated, NamedTuple

import msgspec
from pydantic import BaseModel, ConfigDict, Field

from router.core.admission import Line, Look, Ticket, start_by
from router.core.fleet import Fleet, View
from router.core.placement import Placement
from router.core.step_model import StepModel
from router.errors import ApiError, BadRequest, NoCapacity, Overloaded
from router.health import RETRY_AFTER_S
from router.http.requests import Request
from router.metrics import Metrics, ModelMetrics
from router.openai_api import Call
from router.slo import Slo
from router.tenants import Tenant
from router.tokenizer_config import ANY

# How often a line is looked at when nothing happens: short against what requests wait.
TICK_S = 0.05
# Those that are refused are told to come again so much apart, by what they are to wait.
SPREAD = 0.5
# The class of a request, by its client: the lower number goes first. Without the header it is vLLM's member.
PRIORITY = "x-herd-priority"
MEMBER = "priority"
MOST_PRIORITY = 100
# Within how many milliseconds a client wants its first token, or none; llm-d's gateways are told so too.
DEADLINE = "x-slo-ttft-ms"
# What a client is told that is refused, by the reason as metrics name it.
REFUSED = {
    "full": "Too many requests wait for {model!r} already",
    "waited": "No replica of {model!r} had room for this request in the time that requests may wait",
    "late": "No replica of {model!r} had room for this request early enough for its first token",
}
# What engines answer without computing anything.
INSTANT = frozenset({"/tokenize", "/detokenize", "/v1/messages/count_tokens"})


_decode_number = msgspec.json.Decoder(int).decode


class AdmissionConfig(BaseModel):
    """When requests wait at the router, and how long its lines get: one of each model in each process.

    `backlog_s`, `awaiting`: a replica with more seconds of prefill to do, or so many requests that wait for
    their first token, is given no more. `max_waiting`, `max_waiting_tokens`: requests in line, and what is to
    be computed of their prompts. `max_wait_s`: how long each waits at most. `max_late_s`: how long, where an
    SLO is stated, after it can no longer meet that; with 0 it is refused as soon as that is foreseen.
    `max_cold_s`: how long one waits that came while its model had no replica. `priorities`: clients may say
    which class their requests are of; those of a tenant no better one than the tenant's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    backlog_s: Annotated[float, Field(gt=0)] = 0.5
    awaiting: Annotated[int, Field(ge=1)] = 16
    max_waiting: Annotated[int, Field(ge=0)] = 10_000
    max_waiting_tokens: Annotated[int, Field(ge=0)] = 10_000_000
    max_wait_s: Annotated[float, Field(ge=0)] = 60.0
    max_late_s: Annotated[float, Field(ge=0)] = 0.0
    max_cold_s: Annotated[float, Field(ge=0)] = 600.0
    priorities: bool = True


class Wish(NamedTuple):
    """What a client says of a request's wait: its class, and how soon (seconds) it wants its first token."""

    priority: int = 0
    ttft_s: float | None = None


class Seen(NamedTuple):
    """What was seen of the fleet when a request could go, where it goes, and how long it waited.

    `placement`: None where there is no replica.
    """

    view: View
    placement: Placement | None
    waited_s: float = 0.0


@dataclass(slots=True, eq=False, kw_only=True)
class Waiter(Ticket):
    """A request in line, and what it is told in the end."""

    told: asyncio.Future[Seen]


class Lines:
    """The lines of a router process.

    `slos`: by model, or under `ANY` for all others. `weights`: of tenants by name, 1 for others; each has a
    share of its class by its weight. `peers`: how many other processes fill the same replicas. `scaled`:
    models that may have no replica and get one when they are asked for.
    """

    def __init__(
        self,
        config: AdmissionConfig,
        slos: Mapping[str, Slo],
        weights: Mapping[str, float],
        fleet: Fleet,
        metrics: Metrics,
        peers: Callable[[], int],
        scaled: Container[str] = (),
    ) -> None:
        self._config = config
        self._slos = slos
        self._weights = weights
        self._fleet = fleet
        self._metrics = metrics
        self._peers = peers
        self._scaled = scaled
        self._queues: dict[str, Queue] = {}

    async def turn(self, call: Call, request: Request, look: Look, tenant: Tenant) -> Seen:
        """Waits until the request may go. It is to go at once then: the next one counts on that.

        Raises Overloaded, NoCapacity if there was no replica for too long, BadRequest.
        """
        now = asyncio.get_running_loop().time()
        view, placement = look(now)
        scaled = self._fleet.base(call.model) in self._scaled
        if not scaled if placement is None else call.family.path in INSTANT:
            return Seen(view, placement)
        queue = self._queues.get(call.model) or self._open(call.model)
        wish = wish_of(call, request, tenant, self._config.priorities)
        waiter = queue.waiter(request.received_at, look, Seen(view, placement), wish, tenant.name)
        queue.line.routers = 1 + self._peers()
        if placement is not None and queue.line.passes(waiter, placement, now):
            return Seen(view, placement)
        return await queue.wait(waiter)

    def of(self, model: str) -> list[Line[Waiter]]:
        """The lines of a model and of its adapters, as far as there are any."""
        return [queue.line for name, queue in self._queues.items() if self._fleet.base(name) == model]

    def freed(self, model: str) -> None:
        """A replica of the model may have room: a first token came, or a request ended."""
        if (queue := self._queues.get(model)) is not None:
            queue.moved()

    def _open(self, model: str) -> Queue:
        slo = self._slos.get(model) or self._slos.get(self._fleet.base(model)) or self._slos.get(ANY)
        metrics = self._metrics.of(model)
        queue = self._queues[model] = Queue(
            model, self._config, slo, self._weights, self._fleet, metrics, self._peers
        )
        self._metrics.show_line(model, queue.line.__len__, lambda: queue.line.tokens)
        return queue


class Queue:
    """The line of one model, and who waits in it."""

    def __init__(
        self,
        model: str,
        config: AdmissionConfig,
        slo: Slo | None,
        weights: Mapping[str, float],
        fleet: Fleet,
        metrics: ModelMetrics,
        peers: Callable[[], int],
    ) -> None:
        self._loop = asyncio.get_running_loop()
        self._model = model
        self._config = config
        self._slo = slo or Slo()
        # Where nobody said when a first token is due, nobody is refused for being late.
        self._patience_s = config.max_late_s if slo else inf
        self._fleet = fleet
        self._metrics = metrics
        self._peers = peers
        # Where nobody said how often a token is due, nobody waits for slow streams.
        tpot_s = slo.tpot_s if slo else inf
        self.line: Line[Waiter] = Line(config, self._loop.time(), tpot_s, weights)
        self._timer: asyncio.TimerHandle | None = None
        self._moving = False

    def waiter(self, arrived_at: float, look: Look, seen: Seen, wish: Wish, tenant: str) -> Waiter:
        """A request as the line takes it."""
        num_tokens, cold = seen.view.num_tokens, seen.placement is None
        steps = seen.placement.standing.steps if seen.placement is not None else StepModel.of()
        unloaded_s = steps.first_token_s(steps.prefill_s(num_tokens), steps.step_s(0, 0))
        if wish.ttft_s is None:
            ttft_s, patience_s = self._slo.first_token_s(unloaded_s), self._patience_s
        else:
            ttft_s, patience_s = wish.ttft_s, 0.0
        return Waiter(
            arrived_at,
            start_by(arrived_at, ttft_s, unloaded_s, self._config.backlog_s),
            look,
            num_tokens - max((had.known for had in seen.view.cached.values()), default=0),
            patience_s=patience_s,
            cold=cold and wish.ttft_s is None,
            priority=wish.priority,
            tenant=tenant,
            told=self._loop.create_future(),
        )

    async def wait(self, waiter: Waiter) -> Seen:
        """Until it goes. Raises Overloaded or NoCapacity."""
        for refused in self.line.enter(waiter, self._loop.time()):
            self._refuse(refused, "full")
        self.moved()
        try:
            return await waiter.told
        finally:
            self.line.leave(waiter)

    def moved(self) -> None:
        """Something came to pass that may let somebody go."""
        if self.line and not self._moving:
            self._moving = True
            self._loop.call_soon(self._move)

    def _move(self) -> None:
        """Who can go goes; one in each turn of the loop, in which the fleet comes to count it."""
        self._moving = False
        now, line = self._loop.time(), self.line
        line.routers = 1 + self._peers()
        for waiter in line.expired(now):
            self._refuse(waiter, "late" if now < waiter.arrived_at + self._config.max_wait_s else "waited")
        released = line.next(self._fleet.view(self._model, now=now).replicas, now)
        if released is not None:
            waiter, waited_s = released.ticket, now - released.ticket.arrived_at
            self._metrics.waited.observe(waited_s)
            if not waiter.told.done():  # its client may have left just now
                waiter.told.set_result(Seen(released.view, released.placement, waited_s))
            self.moved()
        elif line and self._timer is None:
            self._timer = self._loop.call_later(TICK_S, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.moved()

    def _refuse(self, waiter: Waiter, reason: str) -> None:
        self._metrics.refused[reason].inc()
        if not waiter.told.done():
            waiter.told.set_exception(self._refusal(reason))

    def _refusal(self, reason: str) -> ApiError:
        now = self._loop.time()
        if not self._fleet.view(self._model, now=now).replicas:
            told = f"No replica of {self._model!r} can take requests now"
            return NoCapacity(told, retry_after=RETRY_AFTER_S)
        retry_after = ceil(self.line.retry_after_s(now) * (1 + SPREAD * random()))
        return Overloaded(REFUSED[reason].format(model=self._model), retry_after=retry_after)


def wish_of(call: Call, request: Request, tenant: Tenant, priorities: bool) -> Wish:
    """What the client says of its request's wait; raises BadRequest if it says nonsense."""
    ttft_ms = _header(request, DEADLINE)
    priority = _header(request, PRIORITY) if priorities else 0
    if priority is None:
        priority = _member(call)
    if tenant.known:
        priority = max(tenant.priority, priority)
    return Wish(
        round(max(-MOST_PRIORITY, min(MOST_PRIORITY, priority))),
        None if ttft_ms is None else max(0.0, ttft_ms / 1e3),
    )


def _header(request: Request, name: str) -> float | None:
    """A number that a client sent as a header."""
    value = request.header(name.encode())
    if value is None:
        return None
    try:
        number = float(value)
    except ValueError:
        number = nan
    if not isfinite(number):
        raise BadRequest(f"The header {name} is not a number", param=name)
    return number


def _member(call: Call) -> float:
    """vLLM's own; what is no number is for the engine to refuse."""
    try:
        return _decode_number(call.fields.get(MEMBER, b"0"))
    except msgspec.MsgspecError:
        return 0
