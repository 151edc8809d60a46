"""The life of one request: read, placed, sent, its reply passed on.

Here, and only here, an ApiError becomes an HTTP reply. A request that failed before anything was sent to the
client goes to another replica. After that its stream goes on elsewhere where that can be done exactly; else
the client is told, in the stream.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from math import inf
from random import getrandbits
from typing import Any
from urllib.parse import unquote

import msgspec

from router import multipart, openai_api
from router.affinity import affinity_key, session
from router.arrivals import Arrivals
from router.caches import Caches
from router.config import RouterConfig
from router.continuation import Continuation, Leg, NotContinuable
from router.core.fleet import Fleet, Flight, Replica, View
from router.core.placement import KEYED, POLICIES, PROMPTED, Placement
from router.core.retry_budget import RetryBudget
from router.decisions import Decision, Decisions
from router.errors import (
    ApiError,
    ConnectFailed,
    Diverged,
    MethodNotAllowed,
    NoCapacity,
    ReplyCut,
    ReplyFailed,
    UnknownModel,
    UnknownRoute,
    UpstreamBroken,
    UpstreamError,
)
from router.health import RETRY_AFTER_S, Watch
from router.http import headers
from router.http.server import Reply, Request
from router.http.sse import Usage
from router.http.upstream import Exchange, Upstreams
from router.keepers import Keepers
from router.line import Lines
from router.metrics import Metrics, ModelMetrics
from router.overdue import Overdue
from router.passage import Passage
from router.tenants import Tenant, Tenants
from router.warmup import Warmup

log = logging.getLogger(__name__)

# The fleet as it was seen, and the policy's choice.
Sight = tuple[View, Placement | None]
JSON = (b"content-type", b"application/json")
MODEL_PATH = "/v1/models/"
MAX_REQUEST_ID = 128  # longer ones are not identifiers; they would end up in logs and engine ids
# A request that had a replica, and lost it with all others, waits so long for one (seconds); a new one only
# while a replica is being learnt, as when all are rolled.
PATIENCE_S, NEWCOMER_S = 30.0, 5.0


@dataclass(slots=True)
class Journey:
    """One request between its arrival and its end: what it asks, where it is, when what happened.

    `keeper`: the only replica that can answer it. `asked`, `leg`: what the client asked, and what the replica
    that is tried now is asked.
    """

    call: openai_api.Call
    request: Request
    request_id: bytes
    reply: Reply
    metrics: ModelMetrics
    tenant: Tenant
    keeper: str | None = None
    asked: Leg = field(init=False)
    leg: Leg = field(init=False)
    tries: int = 0
    waited_s: float = 0.0  # in line
    cached_tokens: int = 0  # of the prompt, where the reply began
    decision: Decision | None = None
    flight: Flight | None = None
    passage: Passage | None = None

    def __post_init__(self) -> None:
        self.asked = self.leg = Leg(self.call)


class Relay:
    """Answers client requests from a fleet.

    What goes wrong at a replica is told to `watch`. `placed` hears at which replica each request is. `peers`:
    how many other routers fill the same replicas.
    """

    def __init__(
        self,
        config: RouterConfig,
        fleet: Fleet,
        metrics: Metrics,
        watch: Watch,
        caches: Caches,
        upstreams: Upstreams,
        tenants: Tenants,
        warmup: Warmup,
        placed: Callable[[str], None],
        promised: tuple[str, ...] = (),
        peers: Callable[[], int] = int,
    ) -> None:
        self._policy = POLICIES[config.policy]
        self._keyed = self._policy in KEYED
        # Scaling goes by what prompts take, whatever the policy goes by.
        self._prompted = self._policy in PROMPTED or bool(config.scaling)
        self._may_be_gone = {model for model, replicas in config.scaling.items() if replicas.may_be_gone}
        self._aliases = config.aliases
        self._allow_transfer = config.allow_kv_transfer_params
        self._fleet = fleet
        self._metrics = metrics
        self._watch = watch
        self._tokenizers = caches.tokenizers
        self._parity = caches.parity
        self._upstreams = upstreams
        self._tenants = tenants
        self._warmup = warmup
        self._placed = placed
        self._promised = promised
        self._keepers = Keepers(fleet, watch)
        self._continuation = Continuation(config.continuation, caches.tokenizers)
        self._budget = RetryBudget()
        self._overdue = Overdue(fleet, self._budget)
        self.lines = Lines(
            config.admission, config.slos, tenants.weights, fleet, metrics, peers, scaled=self._may_be_gone
        )
        self.decisions = Decisions(config.policy, config.decisions, metrics.decisions)
        self.arrivals = Arrivals()
        self._started = int(time.time())

    async def __call__(self, request: Request, reply: Reply) -> None:
        """Answers one request, whatever happens."""
        request_id = request_id_of(request)
        code = 499  # nginx's status for a client that left; seen in metrics only
        family = openai_api.family_of(request.method, request.path)
        model, tenant = "", None
        try:
            tenant = self._tenants.of(request)
            if family is None or tenant is None:
                self._answer_own(request, reply, request_id)
            else:
                with tenant.admit(request.received_at):
                    call = self._read(family, request, tenant)
                    keeper = self._keepers.of(call) if call.kept else None
                    model = call.model
                    metrics = self._metrics.of(model)
                    await self._carry(Journey(call, request, request_id, reply, metrics, tenant, keeper))
            code = reply.status
        except ApiError as error:
            code = error.status
            self._tell(error, family, reply, request_id)
        except asyncio.CancelledError:
            self._metrics.of(model).disconnects.inc()
            raise
        except Exception:
            code = 500
            log.exception("request %s failed", request_id.decode("latin-1"))
            self._tell(ApiError("The router failed on this request"), family, reply, request_id)
        finally:
            self._metrics.requests(model, family.path if family else "other", str(code)).inc()
            if tenant is not None:
                tenant.requests(str(code)).inc()

    # -- what the router answers itself

    def _answer_own(self, request: Request, reply: Reply, request_id: bytes) -> None:
        path = request.path
        if path not in ("/v1/models", "/health", "/ready") and not path.startswith(MODEL_PATH):
            raise UnknownRoute(f"Nothing is served at {request.method} {path}")
        if request.method not in ("GET", "HEAD"):
            raise MethodNotAllowed(path, "GET", "HEAD")
        reply.send(200, [JSON, (b"x-request-id", request_id)], self._own_body(path))

    def _own_body(self, path: str) -> bytes:
        if path == "/v1/models":
            return openai_api.models_body(self._cards())
        if path.startswith(MODEL_PATH):
            return self._card(unquote(path.removeprefix(MODEL_PATH)))
        if path == "/ready" and not self.ready:
            raise NoCapacity("Not every model has a ready replica", retry_after=RETRY_AFTER_S)
        return b'{"status":"ok"}'

    def _cards(self) -> dict[str, dict[str, Any]]:
        return openai_api.model_cards(self._promised, self._fleet, self._started, self._aliases)

    def _card(self, model: str) -> bytes:
        cards = self._cards()
        if model not in cards:
            raise self._unknown(model)
        return msgspec.json.encode(cards[model])

    def _unknown(self, model: str) -> UnknownModel:
        served = ", ".join(self._cards())
        return UnknownModel(f"The model {model!r} does not exist; this fleet serves {served}", param="model")

    @property
    def ready(self) -> bool:
        """Every model that is promised or known has a replica that takes requests, or gets one when asked."""
        models = {*self._promised, *map(self._fleet.base, self._fleet.models())}
        missing = {model for model in models if not self._fleet.view(model).replicas}
        return bool(models) and missing <= self._may_be_gone

    # -- what replicas answer

    def _read(self, family: openai_api.Family, request: Request, tenant: Tenant) -> openai_api.Call:
        if family is openai_api.STORED:
            response_id = openai_api.stored_id(request.path)
            tenant.check_response(response_id, "response_id")
            kept = openai_api.Kept(about=response_id)
            return openai_api.Call(family, self._keepers.model_of(response_id), kept=kept)
        if request.method != "POST":
            raise MethodNotAllowed(request.path, "POST")
        call = self._parse(family, request, tenant)
        if call.kept is not None and call.kept.about is not None:
            tenant.check_response(call.kept.about, "previous_response_id")
        if self._fleet.view(call.model).replicas:
            return call
        known = {*self._promised, *self._fleet.models()}
        if not known:
            raise NoCapacity("No replica has joined the fleet yet", retry_after=RETRY_AFTER_S)
        if self._fleet.base(call.model) not in known:
            raise self._unknown(call.model)
        return call

    def _parse(self, family: openai_api.Family, request: Request, tenant: Tenant) -> openai_api.Call:
        content_type = request.header(b"content-type") if family.forms else None
        if content_type is not None and multipart.is_form(content_type):
            return openai_api.parse_form(family, content_type, request.body, self._aliases)
        allow_transfer = self._allow_transfer or tenant.allow_transfer
        return openai_api.parse(
            family, request.body, self._aliases, allow_transfer=allow_transfer, salt=tenant.salt
        )

    async def _carry(self, journey: Journey) -> None:
        """Has a request answered, and its tenant charged for what it took."""
        try:
            await self._have_answered(journey)
        finally:
            journey.tenant.used(_usage(journey), asyncio.get_running_loop().time())

    async def _have_answered(self, journey: Journey) -> None:
        """Tries replicas until one has answered."""
        key = affinity_key(journey.call, journey.request.headers) if self._keyed else None
        if self._prompted or self.arrivals.wanted(journey.request.received_at):
            journey.asked = journey.leg = Leg(journey.call, await self._tokenizers.read(journey.call))
        tried: frozenset[str] = frozenset()
        failure: UpstreamError | None = None
        until = inf
        loop = asyncio.get_running_loop()
        seen = await self._turn(journey, key) if journey.keeper is None else None
        while True:
            decision = self._place(journey, *(seen or self._look(journey, key, tried, loop.time())))
            seen = None
            if decision is None:
                until = min(until, loop.time() + (NEWCOMER_S if failure is None else PATIENCE_S))
                answered = isinstance(failure, ReplyFailed) and not journey.reply.started
                if answered or not await self._comes(journey.call.model, failure, until - loop.time()):
                    self._give_up(journey, failure)
                    return
                tried = frozenset()
                continue
            until = inf
            try:
                await self._try(journey, decision)
                self._watch.answered(decision.standing.id)
                return
            except UpstreamError as error:
                failure = error
            self._budget.lost(decision.standing.in_flight + 1, loop.time())
            self._blame(decision.standing.id, failure, journey.metrics)
            if not self._goes_on(journey, failure):
                return
            tried |= {decision.standing.id}

    async def _comes(self, model: str, failure: UpstreamError | None, within_s: float) -> bool:
        """Whether a replica comes in time for a request that has none."""
        if within_s <= 0 or (failure is None and not self._watch.expecting):
            return False
        return await self._watch.comes(model, within_s)

    async def _turn(self, journey: Journey, key: int | None) -> Sight:
        """Waits until there is room for the request. What was seen then is to be acted on at once."""
        look = partial(self._look, journey, key, frozenset())
        seen = await self.lines.turn(journey.call, journey.request, look, journey.tenant)
        journey.waited_s = seen.waited_s
        return seen.view, seen.placement

    def _look(self, journey: Journey, key: int | None, tried: frozenset[str], now: float) -> Sight:
        """The fleet as it is, and the policy's choice among those that were not tried."""
        model = journey.call.model
        if journey.keeper is not None:
            placement = self._keepers.place(journey.keeper, model)
            return View((placement.standing,), now=now), placement
        view = self._fleet.view(model, getrandbits(64), key, now, journey.leg.reading.prompt)
        if journey.leg.rest is not None:
            tried |= {standing.id for standing in view.replicas if not standing.takes_ids}
        view = view.without(tried)
        return view, self._policy(view)

    def _place(self, journey: Journey, view: View, placement: Placement | None) -> Decision | None:
        """Takes the replica that was chosen; None if there is none."""
        if placement is None:
            return None
        if not journey.tries:
            self._budget.placed(placement.standing.in_flight + 1, view.now)
        journey.tries += 1
        journey.decision = self.decisions.placed(
            journey.request_id, journey.call.model, view, placement, journey.decision
        )
        return journey.decision

    def _goes_on(self, journey: Journey, failure: UpstreamError) -> bool:
        """After a failure: whether another replica is to be tried. If not, the client has been told."""
        refused = isinstance(failure, ReplyFailed) and failure.status < 500
        refused = refused or isinstance(failure, Diverged)
        if journey.keeper is not None and not journey.reply.started:
            self._keepers.place(journey.keeper, journey.call.model)  # raises if it is down by now
        if refused or journey.keeper is not None:
            self._give_up(journey, failure)
            return False
        if journey.reply.started and not self._continues(journey, failure):
            return False
        if not self._budget.take(asyncio.get_running_loop().time()):
            journey.metrics.retries["refused"].inc()
            self._give_up(journey, failure)
            return False
        return True

    def _continues(self, journey: Journey, failure: UpstreamError) -> bool:
        """Whether a stream that broke goes on at another replica. If not, the client has its end."""
        passage = journey.passage
        assert passage is not None
        try:
            onward = self._continuation.onward(journey.asked, passage.stream, journey.cached_tokens)
        except NotContinuable as why:
            log.warning("request %s cannot go on elsewhere: %s", journey.request_id.decode("latin-1"), why)
            journey.metrics.continuations["impossible"].inc()
            self._give_up(journey, failure)
            return False
        if isinstance(onward, bytes):
            passage.finish(onward)
            journey.metrics.continuations["finished"].inc()
            return False
        journey.leg = onward
        journey.metrics.continuations["continued"].inc()
        return True

    def _give_up(self, journey: Journey, failure: UpstreamError | None) -> None:
        """No replica answers: the client gets what the last one said, or an error of ours."""
        model = journey.call.model
        if failure is None:
            raise NoCapacity(f"No replica of {model!r} can take requests now", retry_after=RETRY_AFTER_S)
        if journey.reply.started or (isinstance(failure, ReplyFailed) and failure.event is not None):
            assert journey.passage is not None
            journey.passage.break_off(failure)
        elif isinstance(failure, ReplyFailed) and failure.answer is not None:
            journey.reply.send(failure.status, *failure.answer)
        else:
            tries = f"{journey.tries} tries" if journey.tries > 1 else "one try"
            raise UpstreamBroken(f"No replica of {model!r} answered, in {tries}; the last: {failure}")

    async def _try(self, journey: Journey, decision: Decision) -> None:
        """One attempt on one replica, counted for as long as it lasts."""
        replica = decision.standing.replica
        loop = asyncio.get_running_loop()
        upstream = self._upstreams.at(replica.url)
        prompt_ids = self._prompt_ids(journey, decision)
        message = upstream_message(journey, replica, upstream.authority, prompt_ids)
        if journey.tries == 1:
            self._metrics.overhead.observe(loop.time() - journey.request.received_at - journey.waited_s)
        prompt, silent = journey.leg.reading.prompt, not journey.call.stream
        journey.flight = self._fleet.started(replica.id, loop.time(), prompt, decision.cached, silent=silent)
        if journey.leg.rest is None:
            journey.cached_tokens = decision.cached.known
            if prompt is not None and journey.leg.reading.exact:
                self._warmup.saw(journey.flight, prompt, journey.call.model, journey.leg.reading.salt)
        self._placed(replica.id)
        decision.ttft_s = journey.flight.forecast.ttft_s
        try:
            async with asyncio.timeout(None) as patience:
                if journey.keeper is None and not silent:
                    self._overdue.wait(journey.flight, patience)
                with await upstream.exchange(message) as exchange:
                    await self._pass_on(journey, decision, exchange)
        except TimeoutError:
            failure = ReplyCut("nothing came of it for longer than the replica's load explains")
            decision.failed(failure)
            raise failure from None
        except BaseException as error:
            decision.failed(error)
            raise
        finally:
            self._overdue.over(journey.flight)
            decision.ended(loop.time(), journey.reply.status)
            self._fleet.finished(journey.flight, loop.time(), _stream_tokens(journey))
            self.lines.freed(journey.call.model)

    def _prompt_ids(self, journey: Journey, decision: Decision) -> bytes | None:
        """The prompt's token ids if the replica is to get them in place of the text; some are checked."""
        leg, standing = journey.leg, decision.standing
        reading = leg.reading
        if reading.prompt is None or not reading.sendable or not standing.takes_ids:
            decision.token_ids = reading.reason or standing.trust_reason
            return None
        decision.token_ids = "sent"
        prompt_ids = reading.prompt.token_ids
        assert prompt_ids is not None
        if leg.rest is None:
            self._parity.sampled(journey.request_id, leg.call, standing.id, prompt_ids)
        return prompt_ids

    async def _pass_on(self, journey: Journey, decision: Decision, exchange: Exchange) -> None:
        call, flight = journey.call, journey.flight
        assert flight is not None
        passage = journey.passage = Passage(
            call,
            journey.request_id,
            journey.reply,
            exchange,
            journey.metrics,
            partial(self._first_output, journey),
            [*self.decisions.headers(decision), *journey.tenant.headers(journey.request.received_at)],
            journey.leg.rest,
            self._continuation.notes(journey.leg),
        )
        try:
            await passage.run()
        finally:
            decision.answered(passage.usage, passage.error)
            if passage.usage is not None:
                self._parity.reported(flight, journey.leg.reading.prompt, passage.usage)
            if call.family.keeps:
                self._keepers.learn(passage.response_id, flight.standing.id)
        came_at, now = journey.request.received_at, asyncio.get_running_loop().time()
        journey.metrics.duration.observe(now - came_at)
        if passage.usage is not None and self.arrivals.wanted(now):
            named = session(journey.request.headers)
            self.arrivals.note(came_at, _usage(journey), journey.asked.reading.prompt, named)

    # -- what is noted

    def _first_output(self, journey: Journey) -> None:
        assert journey.flight is not None and journey.decision is not None
        now = asyncio.get_running_loop().time()
        if (ratio := journey.decision.first_output(now)) is not None:
            journey.metrics.ttft_ratio.observe(ratio)
        self._fleet.first_token(journey.flight, now)
        self._overdue.over(journey.flight)
        self.lines.freed(journey.call.model)
        if journey.leg.rest is None:
            journey.metrics.ttft.observe(now - journey.request.received_at)

    # -- what goes wrong

    def _blame(self, replica_id: str, failure: UpstreamError, metrics: ModelMetrics) -> None:
        log.warning("replica %s: %s", replica_id, failure)
        match failure:
            case ConnectFailed():
                metrics.retries["connect"].inc()
                self._watch.unreachable(replica_id)
            case Diverged():
                metrics.retries["failed"].inc()
            case ReplyFailed() if failure.status == 503 or failure.status < 500:
                metrics.retries["failed"].inc()  # full, or right: no fault of the replica
            case ReplyFailed():
                metrics.retries["failed"].inc()
                self._watch.failing(replica_id)
            case _:
                metrics.retries["cut"].inc()
                self._watch.suspect(replica_id)

    def _tell(
        self, error: ApiError, family: openai_api.Family | None, reply: Reply, request_id: bytes
    ) -> None:
        if reply.started:
            reply.abort()
            return
        said = [JSON, (b"x-request-id", request_id), *error.headers]
        family = family or openai_api.OTHER
        reply.send(error.status, said, family.error_body(error, request_id.decode("ascii")))


def request_id_of(request: Request) -> bytes:
    """The client's x-request-id if it is usable, else a new one."""
    given = request.header(b"x-request-id")
    if given and len(given) <= MAX_REQUEST_ID and given.isascii() and given.decode("ascii").isprintable():
        return given
    return os.urandom(16).hex().encode("ascii")


def _stream_tokens(journey: Journey) -> int:
    """How many tokens came one after the other, if that can be told: choices of one request share a count."""
    usage = journey.passage.usage if journey.passage is not None else None
    if usage is None or "n" in journey.call.fields:
        return 0
    return usage.completion_tokens or 0


def _usage(journey: Journey) -> Usage:
    """What engines reported of all of it; of a stream that was given up, what is known to have come."""
    passage, prompt = journey.passage, journey.asked.reading.prompt
    if passage is None:
        return Usage()
    if passage.usage is not None:
        return passage.usage if journey.leg.rest is None else journey.leg.rest.whole(passage.usage)
    kept = journey.leg.rest.seam.kept if journey.leg.rest is not None else 0
    events = passage.events + kept if journey.call.stream else 0
    return Usage(prompt.num_tokens if prompt and events else 0, events)


def upstream_message(journey: Journey, replica: Replica, authority: bytes, prompt_ids: bytes | None) -> bytes:
    """The request as the engine gets it."""
    call, request_id = journey.leg.call, journey.request_id
    nameless = call.kept is not None and call.kept.nameless
    body = call.upstream_body(journey.tenant.new_response_id(replica.id) if nameless else None, prompt_ids)
    if journey.tries > 1:
        request_id += b"-%d" % journey.tries  # an engine that was given up may still know the first
    passed = headers.to_engine(journey.request.headers)
    return message(journey.request, body, request_id, authority, passed)


def message(
    request: Request, body: bytes, request_id: bytes, authority: bytes, passed: headers.Headers
) -> bytes:
    """A client's request with this body and these of its headers, to an engine or another router."""
    lines = [
        b"%b %b HTTP/1.1" % (request.method.encode("ascii"), request.target.encode("latin-1")),
        b"host: " + authority,
        b"content-length: %d" % len(body),
        b"x-request-id: " + request_id,
    ]
    lines += [b"%b: %b" % header for header in passed]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body
