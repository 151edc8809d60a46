"""The router as a Serve deployment: Serve starts, checks and ends it; its traffic never touches Serve."""

from __future__ import annotations

import asyncio
from typing import Any

from ray.serve.handle import DeploymentHandle

from router.config import RouterConfig
from router.front import FrontDoor
from router.roster import ROSTER

# Streams of a leaving router end by themselves within this, else they are cut. As long as a long answer.
DRAIN_S = 600.0


class Router:
    """One router process: a FrontDoor on the loop that Serve gives to user code (uvloop)."""

    async def __init__(
        self, config: dict[str, Any], models: list[str], *pools: DeploymentHandle[Any]
    ) -> None:
        self._config = RouterConfig.model_validate(config)
        self._front = FrontDoor(self._config, promised=tuple(models))
        await self._front.start()
        ROSTER.follow(self._front.membership)
        # A handle hears of its replicas once it is in use; `options` is the public way to put it to use.
        self._pools = [pool.options() for pool in pools]

    async def check_health(self) -> None:
        """On the router's own loop, so that one that hangs fails too; raises when its port is closed."""
        _, writer = await asyncio.open_connection(self._config.admin_host, self._front.admin_port)
        writer.close()

    async def __del__(self) -> None:
        """Serve awaits this before it ends the process: no new requests, running streams finish."""
        ROSTER.unfollow()
        await self._front.stop(DRAIN_S)
