"""The admin port of a router process: metrics, the fleet as a page and as JSON, its decisions, and targets
for Prometheus.

Never on the front port.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Container
from dataclasses import asdict
from importlib.resources import files
from typing import Any, TypeVar
from urllib.parse import parse_qs, unquote, urlsplit

import msgspec
from msgspec import structs
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from router.arrivals import Arrivals
from router.core.fleet import Fleet, Standing, State
from router.core.step_model import PRIORS
from router.decisions import Decision, Decisions
from router.errors import ApiError, BadRequest, MethodNotAllowed, UnknownRoute
from router.gossip import Gossip
from router.http.server import Reply, Request, Server
from router.keys import Guard
from router.metrics import Metrics
from router.openai_api import error_body
from router.place import Place
from router.port import Member
from router.scaling import Scaling

T = TypeVar("T")

JSON = (b"content-type", b"application/json")
DECISIONS = "/decisions"
# What `/decisions` tells if nothing is said, and at most: that many hold the loop for 10 ms,
# with 64 replicas for 80 ms.
LAST, MOST = 20, 1000


class Admin:
    """Answers requests on the admin port. `guard`: lets people in, but for paths that are `unguarded`."""

    def __init__(
        self,
        fleet: Fleet,
        metrics: Metrics,
        policy: str,
        promised: tuple[str, ...],
        front: Server,
        place: Place,
        gossip: Gossip,
        decisions: Decisions,
        arrivals: Arrivals,
        scaling: Scaling,
        guard: Guard,
        unguarded: Container[str],
    ) -> None:
        self._guard = guard
        self._unguarded = unguarded
        self._fleet = fleet
        self._metrics = metrics
        self._policy = policy
        self._promised = promised
        self._front = front
        self._place = place
        self._gossip = gossip
        self._decisions = decisions
        self._arrivals = arrivals
        self._scaling = scaling
        self._page = files("router").joinpath("fleet.html").read_bytes()
        self._routes: dict[str, Callable[[Request, Reply], None]] = {
            "/metrics": self._prometheus,
            "/fleet": self._state,
            DECISIONS: self._newest,
            "/arrivals": self._arrived,
            "/scaling": self._scaled,
            "/targets": self._targets,
            "/routers": self._routers,
            "/health": self._alive,
        }

    async def __call__(self, request: Request, reply: Reply) -> None:
        """Answers one request."""
        try:
            if request.path not in self._unguarded:
                self._guard.check(request)
            route = self._routes.get(request.path)
            if request.path.startswith(f"{DECISIONS}/"):
                route = self._decision
            if route is None:
                raise UnknownRoute(f"The admin port serves {', '.join(self._routes)}")
            if request.method not in ("GET", "HEAD"):
                raise MethodNotAllowed(request.path, "GET", "HEAD")
            route(request, reply)
        except ApiError as error:
            reply.send(error.status, [JSON, *error.headers], error_body(error))

    def _alive(self, request: Request, reply: Reply) -> None:
        reply.send(200, [JSON], b'{"status":"ok"}')

    def _prometheus(self, request: Request, reply: Reply) -> None:
        self._metrics.observe(self._fleet, self._promised, time.monotonic())
        body = generate_latest(self._metrics.registry)
        reply.send(200, [(b"content-type", CONTENT_TYPE_LATEST.encode())], body)

    def _state(self, request: Request, reply: Reply) -> None:
        """A browser gets the page, which asks for the JSON."""
        if b"text/html" in (request.header(b"accept") or b""):
            reply.send(200, [(b"content-type", b"text/html; charset=utf-8")], self._page)
            return
        body = msgspec.json.encode(
            {
                "policy": self._policy,
                "process": self._process(),
                "processes": [_process(member) for member in self._place.members],
                "peers": self._gossip.peers,
                "models": [self._model(name) for name in sorted({*self._promised, *self._fleet.models()})],
                "replicas": [_described(standing, time.monotonic()) for standing in self._fleet],
                "scaling": self._scaling.described(_epoch()),
            }
        )
        reply.send(200, [JSON], body)

    def _scaled(self, request: Request, reply: Reply) -> None:
        """How many replicas models are to have, and the decisions that led there, the newest first."""
        reply.send(200, [JSON], msgspec.json.encode(self._scaling.described(_epoch(), history=True)))

    def _decision(self, request: Request, reply: Reply) -> None:
        """That on one request; the newest, where its id was used again."""
        request_id = unquote(request.path.removeprefix(f"{DECISIONS}/"))
        decision = self._decisions.on(request_id)
        reply.send(200, [JSON], msgspec.json.encode(self._told(decision)))

    def _newest(self, request: Request, reply: Reply) -> None:
        """The newest `last` of them."""
        count = number(request, "last", LAST)
        if not 0 < count <= MOST:
            raise BadRequest(f"last: a number from 1 to {MOST} is expected", param="last")
        told = [self._told(decision) for decision in self._decisions.newest(count)]
        reply.send(200, [JSON], msgspec.json.encode(told))

    def _told(self, decision: Decision) -> dict[str, Any]:
        return {"process": os.getpid(), **self._decisions.described(decision, _epoch())}

    def _arrived(self, request: Request, reply: Reply) -> None:
        """Requests answered since, for `herd record`."""
        batch = self._arrivals.after(number(request, "after", None), time.monotonic())
        reply.send(200, [JSON], msgspec.json.encode(batch))

    def _targets(self, request: Request, reply: Reply) -> None:
        """Every engine, for Prometheus' `http_sd_configs`: replicas come and go, its file stays as it is."""
        reply.send(200, [JSON], msgspec.json.encode([_target(standing) for standing in self._fleet]))

    def _routers(self, request: Request, reply: Reply) -> None:
        """Every router process on this port, for Prometheus, under the host name it knows this one by."""
        host = urlsplit(f"//{(request.header(b'host') or b'').decode('latin-1')}").hostname or "127.0.0.1"
        host = f"[{host}]" if ":" in host else host
        ports = [m.admin_port for m in self._place.members if m.admin_port]
        body = [{"targets": [f"{host}:{port}" for port in ports], "labels": {}}]
        reply.send(200, [JSON], msgspec.json.encode(body))

    def _process(self) -> dict[str, object]:
        """What only this process knows of itself."""
        return {
            "pid": os.getpid(),
            "connections": len(self._front.connections),
            "in_flight": sum(standing.in_flight for standing in self._fleet),
        }

    def _model(self, name: str) -> dict[str, object]:
        replicas = [s for s in self._fleet if name in s.replica.models]
        ready = sum(s.state is State.READY for s in replicas)
        return {"name": name, "replicas": len(replicas), "ready": ready}


def number(request: Request, name: str, default: T) -> int | T:
    """A number in the query of the target; raises BadRequest where it is none."""
    said = parse_qs(urlsplit(request.target).query, keep_blank_values=True).get(name)
    if said is None:
        return default
    if not said[0].isdecimal():
        raise BadRequest(f"{name}: a number is expected, not {said[0]!r}", param=name)
    return int(said[0])


def _epoch() -> float:
    """When the clock of event loops began, in the world's time."""
    return time.time() - time.monotonic()


def _process(member: Member) -> dict[str, object]:
    """What every process of the port knows of each; one without a rank only finishes what it has."""
    return {"rank": member.rank, "pid": member.process.pid, "admin_port": member.admin_port}


def _described(standing: Standing, now: float) -> dict[str, object]:
    return {
        **asdict(standing.replica),
        "state": standing.state,
        "trust": standing.trust,
        "trust_reason": standing.trust_reason,
        "takes_token_ids": standing.takes_ids,
        "in_flight": standing.in_flight,
        "awaiting_first_token": standing.awaiting_first_token,
        "finished": standing.finished,
        "failures": standing.failures,
        "elsewhere": structs.asdict(standing.elsewhere),
        "decoding": standing.decoding,
        "context_tokens": standing.context,
        "backlog_s": standing.backlog_s(now),
        "step_model": _step_model(standing),
    }


def _step_model(standing: Standing) -> dict[str, object]:
    """What it began from, what was learnt since, and what that makes of a step at this moment."""
    steps = standing.steps
    return {
        "prior": next(kind for kind, prior in PRIORS.items() if prior is steps.prior),
        "prefill": asdict(steps.prefill),
        "decode": asdict(steps.decode),
        "step_s": standing.step_s(),
    }


def _target(standing: Standing) -> dict[str, object]:
    replica = standing.replica
    # One model: the others are adapters of it. Not `engine`, which is a label of vLLM's own.
    labels = {"replica": replica.id, "model": replica.models[0]}
    return {"targets": [urlsplit(replica.url).netloc], "labels": labels}
