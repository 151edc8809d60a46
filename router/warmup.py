"""What caches lose when replicas come and go is made good: the hottest prefixes are computed again in time.

A replica that comes computes what the fleet's prompts have in common before it is given requests. What only a
leaving one holds is computed by others while its streams finish. Both by requests for one token.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from array import array
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Annotated, NamedTuple, cast

import httpx
from pydantic import BaseModel, ConfigDict, Field

from router.core.blocks import Prompt
from router.core.fleet import Fleet, Flight, Replica, Standing, State
from router.core.hot_prefixes import DEFAULT_BYTES, HotPrefixes, Prefix
from router.metrics import Metrics
from router.openai_api import SALT

log = logging.getLogger(__name__)

# One is computed while the next is on its way.
AT_ONCE = 2
# What is computed for nobody must have been asked for more than once.
LEAST_USES = 1.5


# Whether a block, by its key, is to be computed.
Wanted = Callable[[int], bool]
# Where it may be computed, as it is when that is asked.
Places = Callable[[], list[Standing]]


class WarmupConfig(BaseModel):
    """`arrival_s`, `departure_s`: how many seconds are spent on a replica that comes, and on one that leaves;
    0 for none. `max_bytes`: what is kept of prompts for it, of each model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    arrival_s: Annotated[float, Field(ge=0)] = 10.0
    departure_s: Annotated[float, Field(ge=0)] = 10.0
    max_bytes: Annotated[int, Field(ge=0)] = DEFAULT_BYTES


class Origin(NamedTuple):
    """Whose prompt it is: the model or adapter asked, and the cache's salt."""

    model: str
    salt: str | None


class Warmup:
    """`routers`: how many there are; each sees its share of the prompts, and computes its share."""

    def __init__(
        self, config: WarmupConfig, fleet: Fleet, metrics: Metrics, routers: Callable[[], int]
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._metrics = metrics
        self._routers = routers
        self._hot: dict[str, HotPrefixes] = defaultdict(partial(HotPrefixes, config.max_bytes))

    async def start(self) -> None:
        """Opens the client that requests go through."""
        self._client = httpx.AsyncClient(timeout=None, trust_env=False)

    async def stop(self) -> None:
        """Computes nothing any more."""
        await self._client.aclose()

    def saw(self, flight: Flight, prompt: Prompt, model: str, salt: str | None) -> None:
        """A prompt was placed."""
        standing = flight.standing
        size = standing.key_blocks
        hot = self._hot[standing.replica.models[0]]
        hot.saw(prompt.keys(size), prompt.token_ids, size, flight.started_at, Origin(model, salt))

    async def arrival(self, replica: Replica) -> None:
        """Has a new replica compute what is hot, unless it is the only one."""
        standing, seconds = self._fleet.get(replica.id), self._config.arrival_s
        if standing is None or not seconds or not self._serving(standing):
            return
        index, bit = self._fleet.index, standing.bit
        prefixes = await self._hottest(standing, seconds, lambda key: not index.holds(key, bit))
        await self._replay(prefixes, lambda: [standing], seconds)

    async def departure(self, standing: Standing) -> None:
        """Has others compute what is hot and only this replica holds."""
        seconds, index, bit = self._config.departure_s, self._fleet.index, standing.bit
        if seconds:
            prefixes = await self._hottest(standing, seconds, lambda key: index.is_alone(key, bit))
            await self._replay(prefixes, lambda: self._serving(standing), seconds)

    async def _hottest(self, standing: Standing, seconds: float, wanted: Wanted) -> list[Prefix]:
        """What so many seconds of prefill bring, of what this router is to see to."""
        hot = self._hot.get(standing.replica.models[0])
        if hot is None:
            return []
        tokens = seconds / standing.steps.prefill_s(1) / self._routers()
        now = asyncio.get_running_loop().time()
        return await asyncio.to_thread(hot.hottest, now, tokens, wanted, LEAST_USES)

    async def _replay(self, prefixes: Sequence[Prefix], at: Places, seconds: float) -> None:
        """Each at the one of these replicas that has least to do, until the time is out."""
        waiting = iter(prefixes)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*[self._compute(waiting, at) for _ in range(AT_ONCE)])

    async def _compute(self, prefixes: Iterator[Prefix], at: Places) -> None:
        for prefix in prefixes:
            now = asyncio.get_running_loop().time()
            there = at()
            if not there:
                return
            standing = min(there, key=lambda each: (each.backlog_s(now), each.requests))
            if not await self._ask(standing.replica, prefix):
                return
            metrics = self._metrics.of(standing.replica.models[0])
            metrics.replayed_prefixes.inc()
            metrics.replayed_tokens.inc(prefix.new_tokens)

    async def _ask(self, replica: Replica, prefix: Prefix) -> bool:
        """Whether the engine computed it."""
        origin = cast(Origin, prefix.origin)
        asked = {"model": origin.model, "prompt": array("I", prefix.token_ids).tolist(), "max_tokens": 1}
        if origin.salt is not None:
            asked[SALT] = origin.salt
        try:
            reply = await self._client.post(f"{replica.url}/v1/completions", json=asked)
            reply.raise_for_status()
        except httpx.HTTPError as error:
            log.warning("replica %s does not compute a prefix: %r", replica.id, error)
            return False
        return True

    def _serving(self, like: Standing) -> list[Standing]:
        """Replicas with the same model that are given requests."""
        return [s for s in self._fleet.of_model(like.replica.models[0]) if s.state is State.READY]
