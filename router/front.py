"""The front door: everything one router process is made of, put together.

`herd route` and the Serve deployment both host one of these; they differ in where membership comes from.
"""

from __future__ import annotations

from collections.abc import Iterable

from router.admin import Admin
from router.config import RouterConfig
from router.core.fleet import Fleet
from router.core.placement import POLICIES
from router.errors import ListenError
from router.health import Endpoint, Watch
from router.http.server import Server
from router.http.upstream import Upstreams
from router.metrics import Metrics
from router.openai_api import refusal
from router.relay import Relay

__all__ = ["Endpoint", "FrontDoor"]


class FrontDoor:
    """One router process: front port, admin port, and the fleet behind them.

    `promised` names the models that the fleet is meant to serve: they are listed, and answered 503 instead
    of 404, while none of their replicas is there.
    """

    def __init__(self, config: RouterConfig, promised: tuple[str, ...] = ()) -> None:
        self._config = config
        self.port = config.port
        self.admin_port = config.admin_port
        self.fleet = Fleet()
        self.metrics = Metrics()
        self._watch = Watch(self.fleet, self.metrics)
        self._upstreams = Upstreams()
        policy = POLICIES[config.policy]
        self._relay = Relay(
            self.fleet, policy, self.metrics, self._watch, self._upstreams, promised, config.aliases
        )
        admin = Admin(self.fleet, self.metrics, config.policy, promised)
        self._front = Server(self._relay, refusal, config.limits, config.cors)
        self._admin = Server(admin, refusal, config.limits)
        self.metrics.connections.set_function(lambda: len(self._front.connections))

    async def start(self) -> None:
        """Binds both ports; raises ListenError with one sentence."""
        await self._watch.start()
        try:
            self.port = await self._front.start(self._config.host, self._config.port)
            self.admin_port = await self._admin.start(self._config.admin_host, self._config.admin_port)
        except ListenError:
            await self.stop(0)
            raise

    def membership(self, endpoints: Iterable[Endpoint]) -> None:
        """The whole fleet as it is now; what was not there before is learnt, what is missing is dropped."""
        announced = {endpoint.id: endpoint for endpoint in endpoints}
        for gone in self._watch.followed - announced.keys():
            standing = self.fleet.get(gone)
            self._watch.drop(gone)
            if standing is not None:
                self._upstreams.drop(standing.replica.url)
        for new in announced.keys() - self._watch.followed:
            self._watch.follow(announced[new])

    @property
    def ready(self) -> bool:
        """Every model has a replica that takes requests."""
        return self._relay.ready

    async def stop(self, grace_s: float) -> None:
        """Accepts nothing more, lets streams end within `grace_s` seconds, closes everything."""
        await self._front.stop(grace_s)
        await self._admin.stop(0)
        await self._watch.stop()
        self._upstreams.close()
