"""Requests taken to the router process that owns them, where each holds a share of the index only.

What belongs together (router/affinity.py) has one owner, so its blocks are known there. A request goes over
one more connection then; on that side it arrives on a port where nothing is passed on again. Where its owner
does not answer it is served here, as one of which nothing is cached.
"""

from __future__ import annotations

import logging

from router import openai_api
from router.affinity import affinity_key
from router.core.shards import owner
from router.errors import ApiError, UpstreamError
from router.gossip import Gossip
from router.http.server import Handler, Reply, Request
from router.http.upstream import Upstreams
from router.metrics import Metrics
from router.port import Contact
from router.relay import message, request_id_of

log = logging.getLogger(__name__)


class Shards:
    """Handles a request by `relay`, or has its owner do so."""

    def __init__(
        self, relay: Handler, gossip: Gossip, metrics: Metrics, shards: int, aliases: openai_api.Aliases
    ) -> None:
        self._relay = relay
        self._gossip = gossip
        self._outcomes = metrics.relayed_to_owner
        self._shards = shards
        self._aliases = aliases
        self._upstreams = Upstreams()

    async def __call__(self, request: Request, reply: Reply) -> None:
        """Answers one request."""
        owner = self._owner(request)
        if owner is None or not await self._passed_on(request, reply, owner):
            await self._relay(request, reply)

    def close(self) -> None:
        """Ends idle connections to other routers."""
        self._upstreams.close()

    def _owner(self, request: Request) -> Contact | None:
        """The other router that owns a request."""
        others = self._gossip.others
        key = self._key(request) if others else None
        if key is None:
            return None
        place = owner(key, self._gossip.name, [other.name for other in others], self._shards)
        return None if place is None else others[place]

    def _key(self, request: Request) -> int | None:
        family = openai_api.FAMILIES.get(request.path)
        if family is None or request.method != "POST":
            return None
        try:
            call = openai_api.parse(family, request.body, self._aliases)
        except ApiError:  # as the relay will say
            return None
        if call.kept is not None and call.kept.about is not None:
            return None  # only the replica that keeps it can answer, whoever asks
        return affinity_key(call, request.headers)

    async def _passed_on(self, request: Request, reply: Reply, owner: Contact) -> bool:
        """Whether the owner answered, or began to."""
        upstream = self._upstreams.at(owner.url)
        request_id = request_id_of(request)
        sent = message(request, request.body, request_id, upstream.authority)
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
