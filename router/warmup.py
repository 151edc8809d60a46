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
import msgspec
from pydantic import BaseModel, ConfigDict, Field

from router.core.blocks import Prompt
from router.core.fleet import Fleet, Flight, Replica, Standing, State
from router.core.hot_prefixes import DEFAULT_BYTES, HotPrefixes, Prefix
from router.metrics import Metrics
from router.openai_api import SALT

log = logging.getLogger(__name__)

# At a new replica one is computed while the next is on its way. At others one at a time and behind all that
# users ask, that is where less than so much is to be done (seconds): in the twin a fleet that lost half of
# its replicas met its SLO for 65 % of requests in the next minute where replays were placed as others are,
# for 91 % where they were not.
AT_ONCE, AT_EASE_S = 2, 0.1
LOOK_S = 0.05
# What is computed for nobody must have been asked for more than once.
LEAST_USES = 1.5


# Whether a block, by its key, is to be computed.
Wanted = Callable[[int], bool]
# Where something may be computed now; None: nowhere any more.
Places = Callable[[], list[Standing] | None]


class WarmupConfig(BaseModel):
    """`arrival_s`, `departure_s`: how many seconds are spent on a replica that comes, and on one that leaves;
    0 for none. `max_bytes`: what is kept of prompts for it, of each model."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    arrival_s: Annotated[float, Field(ge=0)] = 10.0
    departure_s: Annotated[float, Field(ge=0)] = 3.0
    max_bytes: Annotated[int, Field(ge=0)] = DEFAULT_BYTES


class Origin(NamedTuple):
    """Whose prompt it is: the model or adapter asked, and the cache's salt."""

    model: str
    salt: str | None


class Warmup:
    """`routers`: how many there are; each sees its share of the prompts, and computes its share. `pressed`:
    whether requests of a model wait in line."""

    def __init__(
        self,
        config: WarmupConfig,
        fleet: Fleet,
        metrics: Metrics,
        routers: Callable[[], int],
        pressed: Callable[[str], bool],
    ) -> None:
        self._config = config
        self._fleet = fleet
        self._metrics = metrics
        self._routers = routers
        self._pressed = pressed
        self._busy: set[str] = set()  # replicas of others that compute one now
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

    async def arrival(self, replica: Replica) -> bool:
        """Has a new replica compute what is hot, unless it is the only one, or users wait for it. Whether it
        had anything to compute.

        Whatever goes wrong here is told and no more: a replica serves without it.
        """
        standing, seconds = self._fleet.get(replica.id), self._config.arrival_s
        if standing is None or not seconds or not self._fleet.knows(replica.id) or not replica.kv_events:
            return False
        index, bit = self._fleet.index, standing.bit
        going_on = partial(self._is_not_awaited, standing)
        try:
            if not going_on():
                return False
            prefixes = await self._hottest(standing, seconds, lambda key: not index.holds(key, bit))
            await self._replay(prefixes, lambda: [standing] if going_on() else None, seconds, AT_ONCE)
        except Exception:
            log.exception("replica %s is not warmed", replica.id)
            return True
        return bool(prefixes)

    async def departure(self, standing: Standing) -> None:
        """Has others compute what is hot and only this replica holds, as far as they have nothing to do."""
        seconds, index, bit = self._config.departure_s, self._fleet.index, standing.bit
        if not seconds or not self._fleet.knows(standing.id):
            return
        try:
            prefixes = await self._hottest(standing, seconds, lambda key: index.is_alone(key, bit))
            await self._replay(prefixes, lambda: self._at_ease(standing), seconds, 1)
        except Exception:
            log.exception("what replica %s had is not computed elsewhere", standing.id)

    async def _hottest(self, standing: Standing, seconds: float, wanted: Wanted) -> list[Prefix]:
        """What so many seconds of prefill bring, of what this router is to see to."""
        hot = self._hot.get(standing.replica.models[0])
        if hot is None:
            return []
        tokens = seconds / standing.steps.prefill_s(1) / self._routers()
        now = asyncio.get_running_loop().time()
        return await asyncio.to_thread(hot.hottest, now, tokens, wanted, LEAST_USES)

    async def _replay(self, prefixes: Sequence[Prefix], places: Places, seconds: float, at_once: int) -> None:
        """So many at once, each where least is to be done, until the time is out."""
        waiting = iter(prefixes)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*[self._compute(waiting, places) for _ in range(at_once)])

    async def _compute(self, prefixes: Iterator[Prefix], places: Places) -> None:
        """One after the other; no more where a replica fails, or is not to be held up any longer."""
        for prefix in prefixes:
            while (there := places()) == []:
                await asyncio.sleep(LOOK_S)
            if there is None:
                return
            now = asyncio.get_running_loop().time()
            standing = min(there, key=lambda each: (each.backlog_s(now), each.requests))
            self._busy.add(standing.id)
            try:
                await self._ask(standing.replica, prefix)
            except httpx.HTTPError as error:
                log.warning("replica %s does not compute a prefix: %r", standing.id, error)
                return
            finally:
                self._busy.discard(standing.id)

    async def _ask(self, replica: Replica, prefix: Prefix) -> None:
        """Has the engine compute it, unless the engine refuses it: it may have done so before. Raises
        httpx.HTTPError."""
        body = await asyncio.to_thread(_request, prefix)  # takes tens of milliseconds for long ones
        headers = {"content-type": "application/json"}
        reply = await self._client.post(f"{replica.url}/v1/completions", content=body, headers=headers)
        if reply.is_client_error:
            return
        reply.raise_for_status()
        metrics = self._metrics.of(replica.models[0])
        metrics.replayed_prefixes.inc()
        metrics.replayed_tokens.inc(prefix.new_tokens)

    def _is_not_awaited(self, new: Standing) -> bool:
        """Others serve while a new replica warms up, and no request of its model is in line."""
        return bool(self._serving(new)) and not self._pressed(new.replica.models[0])

    def _at_ease(self, like: Standing) -> list[Standing]:
        """Those of the others that have nothing to prefill, while nobody waits."""
        if self._pressed(like.replica.models[0]):
            return []
        now = asyncio.get_running_loop().time()
        serving = [each for each in self._serving(like) if each.id not in self._busy]
        return [each for each in serving if each.backlog_s(now) < AT_EASE_S]

    def _serving(self, like: Standing) -> list[Standing]:
        """Replicas with the same model that are given requests."""
        return [s for s in self._fleet.of_model(like.replica.models[0]) if s.state is State.READY]


def _request(prefix: Prefix) -> bytes:
    """What an engine is asked that is to compute it."""
    origin = cast(Origin, prefix.origin)
    asked = {"model": origin.model, "prompt": array("I", prefix.token_ids).tolist(), "max_tokens": 1}
    return msgspec.json.encode(asked | ({SALT: origin.salt} if origin.salt is not None else {}))
