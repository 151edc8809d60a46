"""What a router process knows of its replicas' caches, put together: tokens, and how far they are trusted.

Only a policy that goes by caches needs any of it; with the others no engine is asked.
"""

from __future__ import annotations

import asyncio

from router.config import RouterConfig
from router.core.fleet import Fleet, Replica
from router.core.placement import POLICIES, PROMPTED
from router.metrics import Metrics
from router.parity import Parity
from router.tokenizer import Tokenizers


class Caches:
    """Follows the replicas that the watch lets serve."""

    def __init__(self, config: RouterConfig, fleet: Fleet, metrics: Metrics) -> None:
        self._wanted = POLICIES[config.policy] in PROMPTED
        self.tokenizers = Tokenizers(config.tokenizers if self._wanted else {})
        self.parity = Parity(fleet, metrics, self.tokenizers.prompt, self.tokenizers.lacking)
        self._proving: dict[str, asyncio.Task[None]] = {}

    async def start(self) -> None:
        """Begins to load tokenizers."""
        self.tokenizers.start()
        await self.parity.start()

    async def stop(self) -> None:
        """Follows nothing any more."""
        for replica_id in list(self._proving):
            self.left(replica_id)
        await self.parity.stop()
        await self.tokenizers.stop()

    def joined(self, replica: Replica) -> None:
        """A replica can be given requests: what it holds is to be learnt."""
        if not self._wanted:
            return
        self.tokenizers.follow(replica)
        self.left(replica.id)
        self._proving[replica.id] = asyncio.get_running_loop().create_task(self._prove(replica))

    def left(self, replica_id: str) -> None:
        """A replica was withdrawn."""
        if (proving := self._proving.pop(replica_id, None)) is not None:
            proving.cancel()
        self.parity.left(replica_id)

    async def _prove(self, replica: Replica) -> None:
        """Whether the router's tokens are the engine's can be asked once there are some."""
        await self.tokenizers.settled()
        self.parity.joined(replica)
