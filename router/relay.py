"""The life of one request: read, placed, sent, its reply passed on.

Here, and only here, an ApiError becomes an HTTP reply. A request that failed before anything was sent to the
client goes to another replica; after that the client is told, in the stream.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from random import getrandbits
from typing import Any
from urllib.parse import unquote

import msgspec

from router import multipart, openai_api, responses_api
from router.affinity import affinity_key, session
from router.arrivals import Arrivals
from router.caches import Caches
from router.config import RouterConfig
from router.core.fleet import Fleet, Flight, Replica, View
from router.core.placement import KEYED, POLICIES, PROMPTED, Placement
from router.decisions import Decision, Decisions
from router.errors import (
    ApiError,
    ConnectFailed,
    MethodNotAllowed,
    NoCapacity,
    UnknownModel,
    UnknownRoute,
    UpstreamBroken,
    UpstreamError,
)
from router.health import RETRY_AFTER_S, Watch
from router.http import headers
from router.http.server import Reply, Request
from router.http.upstream import Exchange, Upstreams
from router.keepers import Keepers
from router.line import Lines, Seen
from router.metrics import Metrics, ModelMetrics
from router.passage import Passage
from router.prompts import UNREAD, Reading

log = logging.getLogger(__name__)

JSON = (b"content-type", b"application/json")
MODEL_PATH = "/v1/models/"
MAX_REQUEST_ID = 128  # longer ones are not identifiers; they would end up in logs and engine ids


@dataclass(slots=True)
class Journey:
    """One request between its arrival and its end: what it asks, where it is, when what happened."""

    call: openai_api.Call
    request: Request
    request_id: bytes
    reply: Reply
    metrics: ModelMetrics
    reading: Reading = UNREAD
    waited_s: float = 0.0  # in line
    decision: Decision | None = None
    flight: Flight | None = None
    passage: Passage | None = None


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
        placed: Callable[[str], None],
        promised: tuple[str, ...] = (),
        peers: Callable[[], int] = int,
    ) -> None:
        self._policy = POLICIES[config.policy]
        self._keyed = self._policy in KEYED
        self._prompted = self._policy in PROMPTED
        self._aliases = config.aliases
        self._allow_transfer = config.allow_kv_transfer_params
        self._fleet = fleet
        self._metrics = metrics
        self._watch = watch
        self._tokenizers = caches.tokenizers
        self._parity = caches.parity
        self._upstreams = upstreams
        self._placed = placed
        self._promised = promised
        self._keepers = Keepers(fleet, watch)
        self._lines = Lines(config.admission, config.slos, fleet, metrics, peers)
        self.decisions = Decisions(config.policy, config.decisions, metrics.decisions)
        self.arrivals = Arrivals()
        self._started = int(time.time())

    async def __call__(self, request: Request, reply: Reply) -> None:
        """Answers one request, whatever happens."""
        request_id = request_id_of(request)
        code = 499  # nginx's status for a client that left; seen in metrics only
        family = openai_api.family_of(request.method, request.path)
        model = ""
        try:
            if family is None:
                self._answer_own(request, reply, request_id)
            else:
                call = self._read(family, request)
                keeper = self._keepers.of(call) if call.kept else None
                model = call.model
                await self._carry(Journey(call, request, request_id, reply, self._metrics.of(model)), keeper)
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
        """Every model that is promised or known has a replica that takes requests."""
        models = {*self._promised, *self._fleet.models()}
        return bool(models) and all(self._fleet.view(model).replicas for model in models)

    # -- what replicas answer

    def _read(self, family: openai_api.Family, request: Request) -> openai_api.Call:
        if family is openai_api.STORED:
            response_id = openai_api.stored_id(request.path)
            kept = openai_api.Kept(about=response_id)
            return openai_api.Call(family, self._keepers.model_of(response_id), kept=kept)
        if request.method != "POST":
            raise MethodNotAllowed(request.path, "POST")
        call = self._parse(family, request)
        if self._fleet.view(call.model).replicas:
            return call
        known = {*self._promised, *self._fleet.models()}
        if not known:
            raise NoCapacity("No replica has joined the fleet yet", retry_after=RETRY_AFTER_S)
        if call.model not in known:
            raise self._unknown(call.model)
        return call

    def _parse(self, family: openai_api.Family, request: Request) -> openai_api.Call:
        content_type = request.header(b"content-type") if family.forms else None
        if content_type is not None and multipart.is_form(content_type):
            return openai_api.parse_form(family, content_type, request.body, self._aliases)
        return openai_api.parse(family, request.body, self._aliases, allow_transfer=self._allow_transfer)

    async def _carry(self, journey: Journey, keeper: str | None) -> None:
        """Tries replicas until one has answered; each is tried once. `keeper`: the only one that can."""
        key = affinity_key(journey.call, journey.request.headers) if self._keyed else None
        if self._prompted or self.arrivals.wanted(journey.request.received_at):
            journey.reading = await self._tokenizers.read(journey.call)
        tried: frozenset[str] = frozenset()
        seen = await self._turn(journey, key) if keeper is None else None
        while True:
            decision = journey.decision = self._place(journey, key, keeper, tried, seen)
            seen = None
            replica_id = decision.standing.id
            try:
                await self._try(journey, decision)
                return
            except UpstreamError as error:
                self._blame(replica_id, error, journey)
                if journey.reply.started:
                    assert journey.passage is not None
                    journey.metrics.truncated.inc()
                    journey.passage.break_off(error)
                    return
                tried |= {replica_id}

    async def _turn(self, journey: Journey, key: int | None) -> Seen:
        """Waits until there is room for the request."""
        seen = await self._lines.turn(journey.call, journey.request, partial(self._look, journey, key))
        journey.waited_s = seen.waited_s
        return seen

    def _look(
        self, journey: Journey, key: int | None, now: float, tried: frozenset[str] = frozenset()
    ) -> tuple[View, Placement | None]:
        """The fleet as it is, and the policy's choice."""
        model, prompt = journey.call.model, journey.reading.prompt
        view = self._fleet.view(model, getrandbits(64), key, now, prompt).without(tried)
        return view, self._policy(view)

    def _place(
        self,
        journey: Journey,
        key: int | None,
        keeper: str | None,
        tried: frozenset[str],
        seen: Seen | None,
    ) -> Decision:
        """Chooses a replica, unless that is done. `seen`: what its turn was decided on."""
        model, now = journey.call.model, asyncio.get_running_loop().time()
        placement: Placement | None
        if keeper is not None:
            placement = self._keepers.place(keeper, model, tried)
            view = View((placement.standing,), now=now)
        elif seen is not None:
            view, placement = seen.view, seen.placement
        else:
            view, placement = self._look(journey, key, now, tried)
        if placement is not None:
            return self.decisions.placed(journey.request_id, model, view, placement, journey.decision)
        if tried:
            raise UpstreamBroken(
                f"The request failed on all {len(tried)} replicas of {model!r} that were ready"
            )
        raise NoCapacity(f"No replica of {model!r} can take requests now", retry_after=RETRY_AFTER_S)

    async def _try(self, journey: Journey, decision: Decision) -> None:
        """One attempt on one replica, counted for as long as it lasts."""
        replica = decision.standing.replica
        loop = asyncio.get_running_loop()
        upstream = self._upstreams.at(replica.url)
        prompt_ids = self._prompt_ids(journey, decision)
        message = upstream_message(journey, replica, upstream.authority, prompt_ids)
        self._metrics.overhead.observe(loop.time() - journey.request.received_at - journey.waited_s)
        call, prompt = journey.call, journey.reading.prompt
        journey.flight = self._fleet.started(
            replica.id, loop.time(), prompt, decision.cached, silent=not call.stream
        )
        self._placed(replica.id)
        decision.ttft_s = journey.flight.forecast.ttft_s
        try:
            with await upstream.exchange(message) as exchange:
                await self._pass_on(journey, decision, exchange)
        except BaseException as error:
            decision.failed(error)
            raise
        finally:
            decision.ended(loop.time(), journey.reply.status)
            self._fleet.finished(journey.flight, loop.time(), _stream_tokens(journey))
            self._lines.freed(journey.call.model)

    def _prompt_ids(self, journey: Journey, decision: Decision) -> bytes | None:
        """The prompt's token ids if the replica is to get them in place of the text; some are checked."""
        reading, standing = journey.reading, decision.standing
        if reading.prompt is None or not reading.sendable or not standing.takes_ids:
            decision.token_ids = reading.reason or standing.trust_reason
            return None
        decision.token_ids = "sent"
        prompt_ids = reading.prompt.token_ids
        assert prompt_ids is not None
        self._parity.sampled(journey.request_id, journey.call, standing.id, prompt_ids)
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
            self.decisions.headers(decision),
        )
        try:
            await passage.run()
        finally:
            decision.answered(passage.usage, passage.error)
            if passage.usage is not None:
                self._parity.reported(flight, journey.reading.prompt, passage.usage)
            if call.family.keeps:
                self._keepers.learn(passage.response_id, flight.standing.id)
        came_at, now = journey.request.received_at, asyncio.get_running_loop().time()
        journey.metrics.duration.observe(now - came_at)
        if decision.usage is not None and self.arrivals.wanted(now):
            named = session(journey.request.headers)
            self.arrivals.note(came_at, decision.usage, journey.reading.prompt, named)

    # -- what is noted

    def _first_output(self, journey: Journey) -> None:
        assert journey.flight is not None and journey.decision is not None
        now = asyncio.get_running_loop().time()
        if (ratio := journey.decision.first_output(now)) is not None:
            journey.metrics.ttft_ratio.observe(ratio)
        self._fleet.first_token(journey.flight, now)
        self._lines.freed(journey.call.model)
        journey.metrics.ttft.observe(now - journey.request.received_at)

    # -- what goes wrong

    def _blame(self, replica_id: str, error: UpstreamError, journey: Journey) -> None:
        log.warning("replica %s: %s", replica_id, error)
        if isinstance(error, ConnectFailed):
            reason = "connect"
            self._watch.unreachable(replica_id)
        else:
            reason = "cut"
            self._watch.suspect(replica_id)
        if not journey.reply.started:
            journey.metrics.retries[reason].inc()

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


def upstream_message(journey: Journey, replica: Replica, authority: bytes, prompt_ids: bytes | None) -> bytes:
    """The request as the engine gets it."""
    call, request = journey.call, journey.request
    nameless = call.kept is not None and call.kept.nameless
    body = call.upstream_body(responses_api.new_id(replica.id) if nameless else None, prompt_ids)
    return message(request, body, journey.request_id, authority)


def message(request: Request, body: bytes, request_id: bytes, authority: bytes) -> bytes:
    """A client's request with this body, to an engine or another router."""
    lines = [
        b"%b %b HTTP/1.1" % (request.method.encode("ascii"), request.target.encode("latin-1")),
        b"host: " + authority,
        b"content-length: %d" % len(body),
        b"x-request-id: " + request_id,
    ]
    lines += [b"%b: %b" % header for header in headers.to_engine(request.headers)]
    return b"\r\n".join(lines) + b"\r\n\r\n" + body
