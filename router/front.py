"""The front door: everything one router process is made of, put together.

`herd route` and the Serve deployment both host one of these; they differ in where membership comes from.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Iterable, Mapping

from msgspec import structs

from router.admin import Admin
from router.caches import Caches
from router.config import RouterConfig
from router.core.fleet import Fleet, Standing
from router.errors import ListenError
from router.gossip import Gossip
from router.health import Endpoint, Watch
from router.http.server import Server
from router.http.upstream import Upstreams
from router.keys import Guard
from router.metrics import Metrics
from router.openai_api import refusal
from router.place import Place, Successor, nobody
from router.port import Contact
from router.relay import Relay
from router.scaling import Scaling
from router.shards import Shards
from router.silence import Silence
from router.tenants import Tenants
from router.warmup import Warmup

__all__ = ["Endpoint", "FrontDoor"]

# A process takes connections when it has asked every replica what it is: one that answers "no such model"
# would be worse than none. Replicas that do not answer must not keep it from serving with the others.
SETTLE_S = 10.0
SETTLE_LOOK_S = 0.01
# How often it is looked whether a replica that leaves has finished.
DEPART_LOOK_S = 0.1
# A client sends its next request on a connection soon after the last reply, or not at all: httpx, and so the
# OpenAI client, gives one up after 5 s. When the fleet ends there is nothing to send it to.
IDLE_S = 5.0
LAST_IDLE_S = 0.5


class FrontDoor:
    """One router process: front port, admin port, and the fleet behind them.

    `promised` names the models that the fleet is meant to serve: they are listed, and answered 503 instead
    of 404, while none of their replicas is there. Processes with the same `fleet` share the port.
    `peer_host`: the address of this machine to router processes on others.
    """

    def __init__(
        self,
        config: RouterConfig,
        promised: tuple[str, ...] = (),
        fleet: str | None = None,
        peer_host: str = "127.0.0.1",
    ) -> None:
        self._config = config
        self.port = config.port
        self.admin_port = config.admin_port
        self.fleet = Fleet()
        self.metrics = Metrics()
        self._caches = Caches(config, self.fleet, self.metrics)
        self._upstreams = Upstreams()
        self._warmup = Warmup(
            config.warmup,
            self.fleet,
            self.metrics,
            routers=lambda: 1 + self._rivals(),
            pressed=lambda model: any(map(len, self._relay.lines.of(model))),
        )
        self._watch = Watch(self.fleet, self.metrics, self._caches, self._upstreams.cut, self._warmup.arrival)
        self._departures: set[asyncio.Task[None]] = set()
        self._silence = Silence(self.fleet, self._upstreams, self._watch)
        self._tenants = Tenants(config.tenants, self.metrics)
        self._gossip = Gossip(
            self.fleet,
            self.metrics,
            self._contacts,
            lambda: self._tenants.quotas,
            lambda: self._scaling.told,
        )
        self._peer_host = peer_host
        self._met: list[Contact] | None = None
        self._relay = Relay(
            config,
            self.fleet,
            self.metrics,
            self._watch,
            self._caches,
            self._upstreams,
            self._tenants,
            self._warmup,
            self._gossip.placed,
            promised,
            self._rivals,
        )
        self._scaling = Scaling(
            config.scaling, config.slos, self.fleet, self._relay.lines, self._gossip, self.metrics
        )
        self._shards = Shards(
            self._relay,
            self.fleet,
            self._caches,
            self._gossip,
            self.metrics,
            config.shards,
            config.aliases,
        )
        handler = self._relay if config.shards == 1 else self._shards
        self._front = Server(handler, refusal, config.limits, config.cors)
        self._direct = Server(self._relay, refusal, config.limits)
        self._place = Place(config.host, config.port, fleet or f"process {os.getpid()}", self._front)
        admin = Admin(
            self.fleet,
            self.metrics,
            config.policy,
            promised,
            self._front,
            self._place,
            self._gossip,
            self._relay.decisions,
            self._relay.arrivals,
            self._scaling,
            Guard(config.admin_key),
            config.admin_unguarded,
        )
        self._admin = Server(admin, refusal, config.limits)
        self.metrics.connections.set_function(lambda: len(self._front.connections))

    async def start(self, asked_for: Mapping[str, int] | None = None) -> None:
        """Takes a place on the port, and opens the admin port; raises ListenError with one sentence.

        `asked_for`: how many replicas of models are there or on their way, where that is known.
        """
        self._tenants.start()
        await self._caches.start()
        await self._warmup.start()
        await self._watch.start()
        self._silence.start()
        try:
            rank = await self._place.claim()
            self.port, config = self._place.port, self._config
            wanted = config.admin_port + rank if config.admin_port else 0
            self.admin_port = await self._admin.start(config.admin_host, wanted)
            self.contact = await self._gossip.start(self._peer_host)
            self._place.announce(self.admin_port)
            self._place.introduce(self.contact)
            self._scaling.start(asked_for or {})
            if config.shards > 1:
                self._shards.start()
        except ListenError:
            await self.stop(0)
            raise

    async def open(self) -> None:
        """Takes connections once the replicas announced are known; raises ListenError with one sentence."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SETTLE_S):
                while not self._watch.settled:
                    await asyncio.sleep(SETTLE_LOOK_S)
                await self._caches.tokenizers.settled()
        try:
            await self._place.open()
            if self._config.shards > 1:
                direct = await self._direct.start(self._peer_host, 0)
                self.contact = structs.replace(self.contact, direct=direct)
                self._place.introduce(self.contact)
        except ListenError:
            await self.stop(0)
            raise

    def membership(self, endpoints: Iterable[Endpoint]) -> None:
        """The whole fleet as it is now; what was not there before is learnt, what is missing is dropped."""
        announced = {endpoint.id: endpoint for endpoint in endpoints}
        for gone in self._watch.followed - announced.keys():
            if (standing := self._watch.leave(gone)) is not None:
                self._upstreams.drop(standing.replica.url)
                departure = asyncio.get_running_loop().create_task(self._depart(standing))
                self._departures.add(departure)
                departure.add_done_callback(self._departures.discard)
        for new in announced.keys() - self._watch.followed:
            self._watch.follow(announced[new])

    async def _depart(self, standing: Standing) -> None:
        """What only it has is computed elsewhere, its streams end; then it is forgotten."""
        try:
            await self._warmup.departure(standing)
            while standing.in_flight:
                await asyncio.sleep(DEPART_LOOK_S)
        finally:
            if standing.id not in self._watch.followed:  # else it was announced again
                self.fleet.left(standing.id)

    def meet(self, contacts: Iterable[Contact]) -> None:
        """All router processes as they are now; until somebody tells, those on the same port are known."""
        self._met = list(contacts)
        self._gossip.look()

    def _contacts(self) -> list[Contact]:
        if self._met is not None:
            return self._met
        going_on = (member for member in self._place.members if member.rank is not None)
        return [member.contact for member in going_on if member.contact is not None]

    def _rivals(self) -> int:
        """Other processes that fill the same replicas: with shards each has its own."""
        return self._gossip.heard // self._config.shards

    @property
    def targets(self) -> dict[str, int]:
        """How many replicas of models there are to be, where this process decides."""
        return self._scaling.targets

    @property
    def ready(self) -> bool:
        """Every model has a replica that takes requests, or gets one when it is asked."""
        return self._relay.ready

    async def retire(self) -> None:
        """Leaves rank and admin port to the successor, and connections to other processes on the port."""
        self._scaling.retire()
        await self._admin.stop(0)
        await self._place.retire()

    async def stop(self, grace_s: float, successor: Successor = nobody) -> None:
        """Accepts until another process does, lets streams end within `grace_s` seconds, and closes all."""
        await self.retire()
        handed_over = await self._place.hand_over(successor)
        idle_s = IDLE_S if handed_over else LAST_IDLE_S
        await asyncio.gather(*(s.stop(grace_s, idle_s) for s in (self._front, self._direct)))
        self._gossip.stop()
        await self._place.leave()
        await self._silence.stop()
        self._tenants.stop()
        await self._watch.stop()
        for departure in self._departures:
            departure.cancel()
        await asyncio.gather(*self._departures, return_exceptions=True)
        await self._warmup.stop()
        await self._caches.stop()
        self._upstreams.close()
        self._shards.stop()
