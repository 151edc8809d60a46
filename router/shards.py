"""The fleet divided among router processes: each knows the caches of its share of the replicas only.

A request goes to the router that owns it, by what it belongs to (router/affinity.py), over one more
connection; on that side it arrives on a port where nothing is passed on again. Where its owner does not
answer it is served here.
"""

from __future__ import annotations

import asyncio
import logging

from router import openai_api
from router.affinity import affinity_key
from router.core.fleet import Fleet
from router.core.shards import knowing, owner
from router.errors import ApiError, UpstreamError
from router.gossip import ROUND_S, Gossip
from router.health import Observer
from router.http import headers
from router.http.server import Handler, Reply, Request
from router.http.upstream import Upstreams
from router.metrics import Metrics
from router.port import Contact
from router.relay import message, request_id_of

log = logging.getLogger(__name__)


class Shards:
    """Handles a request by `relay`, or has its owner do so. `caches` follows the replicas of the share."""

    def __init__(
        self,
        relay: Handler,
        fleet: Fleet,
        caches: Observer,
        gossip: Gossip,
        metrics: Metrics,
        shards: int,
        aliases: openai_api.Aliases,
    ) -> None:
        self._relay = relay
        self._fleet = fleet
        self._caches = caches
        self._gossip = gossip
        self._outcomes = metrics.relayed_to_owner
        self._shards = shards
        self._aliases = aliases
        self._upstreams = Upstreams()
        self._others: dict[str, Contact] = {}
        self._replicas: dict[str, tuple[str, ...]] = {}
        self._shares: dict[str, dict[str, int]] = {}
        self._watching: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Divides the fleet from now on, whenever a router or a replica comes or goes."""
        self._watching = asyncio.get_running_loop().create_task(self._watch())

    def stop(self) -> None:
        """Ends connections to other routers."""
        if self._watching is not None:
            self._watching.cancel()
        self._upstreams.close()

    async def __call__(self, request: Request, reply: Reply) -> None:
        """Answers one request."""
        owner = self._owner(request)
        if owner is None or not await self._passed_on(request, reply, owner):
            await self._relay(request, reply)

    # -- who has what

    async def _watch(self) -> None:
        while True:
            others = {other.name: other for other in self._gossip.others}
            replicas = {standing.id: standing.replica.models for standing in self._fleet}
            if (others, replicas) != (self._others, self._replicas):
                self._divide(others, replicas)
            await asyncio.sleep(ROUND_S)

    def _divide(self, others: dict[str, Contact], replicas: dict[str, tuple[str, ...]]) -> None:
        self._others, self._replicas = others, replicas
        own, routers = self._gossip.name, [self._gossip.name, *others]
        known = {replica_id: knowing(replica_id, routers, self._shards) for replica_id in replicas}
        self._shares = {model: {} for models in replicas.values() for model in models}
        for replica_id, names in known.items():
            for shares in (self._shares[model] for model in replicas[replica_id]):
                shares.update({name: shares.get(name, 0) + 1 for name in names})
        self._take(frozenset(replica_id for replica_id, names in known.items() if own in names))

    def _take(self, share: frozenset[str]) -> None:
        """This router knows these replicas from now on."""
        before = frozenset(standing.id for standing in self._fleet if self._fleet.knows(standing.id))
        self._fleet.divided(share)
        for standing in self._fleet:
            if standing.id in share - before:
                self._caches.joined(standing.replica)
            elif standing.id in before - share:
                self._caches.left(standing.id)

    def _owner(self, request: Request) -> Contact | None:
        """The other router that owns a request; None if it is this one, or none."""
        call = self._read(request) if self._others else None
        shares = self._shares.get(call.model) if call is not None else None
        if call is None or shares is None or (key := affinity_key(call, request.headers)) is None:
            return None
        return self._others.get(owner(key, shares))

    def _read(self, request: Request) -> openai_api.Call | None:
        """What a request asks, where its prompt is what tells who owns it."""
        family = openai_api.FAMILIES.get(request.path)
        if family is None or request.method != "POST":
            return None
        try:
            call = openai_api.parse(family, request.body, self._aliases)
        except ApiError:  # the relay will say so
            return None
        # What goes on from a stored response goes where that is kept, from every router.
        return None if call.kept is not None and call.kept.about is not None else call

    # -- to another router

    async def _passed_on(self, request: Request, reply: Reply, owner: Contact) -> bool:
        """Whether the owner answered, or began to."""
        upstream = self._upstreams.at(owner.url)
        request_id = request_id_of(request)
        passed = headers.to_router(request.headers)
        sent = message(request, request.body, request_id, upstream.authority, passed)
        try:
            with await upstream.exchange(sent) as exchange:
                head = exchange.head
                reply.attach(exchange.connection)
                reply.start(head.status, [*head.passed, (b"x-request-id", request_id)], head.length)
                try:
                    await exchange.body(reply.write)
                    reply.end()
                finally:
                    reply.detach()
        except UpstreamError as error:
            log.warning("router at %s: %s", owner.url, error)
            self._outcomes["failed"].inc()
            self._upstreams.drop(owner.url)
            if reply.started:
                reply.abort()
            return reply.started
        self._outcomes["passed"].inc()
        return True
