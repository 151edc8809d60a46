"""What a router process knows of its replicas' caches: tokens, events, and whether they can be trusted.

Only a policy that goes by caches needs any of it; with the others no engine is asked.
"""

from __future__ import annotations

from router.config import RouterConfig
from router.core.fleet import Fleet, Replica
from router.core.placement import POLICIES, PROMPTED
from router.kv_feed import KVFeed
from router.metrics import Metrics
from router.parity import Parity
from router.tokenizer import Tokenizers


class Caches:
    """Follows the replicas that the watch lets serve."""

    def __init__(self, config: RouterConfig, fleet: Fleet, metrics: Metrics) -> None:
        self._fleet = fleet
        self._wanted = POLICIES[config.policy] in PROMPTED
        self.tokenizers = Tokenizers(config.tokenizers if self._wanted else {})
        self.parity = Parity(fleet, metrics, self.tokenizers, self.joined)
        self._feed = KVFeed(fleet, metrics, self.parity)

    async def start(self) -> None:
        """Begins to load tokenizers."""
        self.tokenizers.start()
        await self.parity.start()
        self._feed.start()

    async def stop(self) -> None:
        """Follows nothing any more."""
        await self._feed.stop()
        await self.parity.stop()
        await self.tokenizers.stop()

    def joined(self, replica: Replica) -> None:
        """A replica can be given requests: what it holds is to be learnt, if it is this router's to know."""
        if self._wanted and self._fleet.knows(replica.id):
            self.tokenizers.follow(replica)
            self.parity.joined(replica)
            self._feed.follow(replica)

    def left(self, replica_id: str) -> None:
        """A replica was withdrawn."""
        self._feed.drop(replica_id)
        self.parity.left(replica_id)
