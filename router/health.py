"""Looking at replicas: what an engine says of itself, and whether it still answers.

An engine is known only by its wire (vLLM's HTTP API), so one that Herd started and one that was there before
are learnt in the same way. Requests that fail tell more, and sooner, than any probe: the relay reports them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import httpx
from prometheus_client.parser import text_string_to_metric_families

from router.core.fleet import Fleet, Replica, State
from router.errors import EngineUnreachable
from router.metrics import Metrics

log = logging.getLogger(__name__)

# A replica that is down is asked often, so that it serves again within a second of answering.
PROBE_DOWN_S = 0.25
# One that serves is asked seldom: its own requests show at once when it dies.
PROBE_READY_S = 5.0
# An engine on a busy machine may take seconds to answer while it is healthy.
PROBE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What membership announces of a replica; all else the engine tells. `id` is new with every start."""

    id: str
    url: str
    engine: str = "unknown"


async def learn(client: httpx.AsyncClient, endpoint: Endpoint) -> Replica:
    """Asks an engine for its models, block size and KV-event sockets. Raises EngineUnreachable."""
    try:
        listing = await client.get(f"{endpoint.url}/v1/models")
        listing.raise_for_status()
        models = listing.json()["data"]
        metrics = await client.get(f"{endpoint.url}/metrics")
        events = await client.get(f"{endpoint.url}/kv_event_sources")
        source = events.json().get("0", {}) if events.status_code == 200 else {}
        return Replica(
            id=endpoint.id,
            url=endpoint.url,
            models=tuple(model["id"] for model in models),
            engine=endpoint.engine,
            block_size=block_size_of(metrics.text) if metrics.status_code == 200 else None,
            max_model_len=next((m["max_model_len"] for m in models if m.get("max_model_len")), None),
            kv_events=reachable(source.get("endpoint"), endpoint.url),
            kv_replay=reachable(source.get("replay_endpoint"), endpoint.url),
        )
    except (httpx.HTTPError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise EngineUnreachable(
            f"{endpoint.url} does not answer as vLLM: {error or type(error).__name__}"
        ) from error


def block_size_of(metrics: str) -> int | None:
    """The KV block size from vLLM's metrics (tokens), None where it is not told."""
    for family in text_string_to_metric_families(metrics):
        if family.name.startswith("vllm:cache_config"):
            for sample in family.samples:
                size = sample.labels.get("block_size", "")
                return int(size) if size.isdigit() else None
    return None


def reachable(bound: Any, url: str) -> str | None:
    """A ZMQ endpoint as others reach it: an engine names what it bound, often `tcp://*:5557`."""
    if not isinstance(bound, str):
        return None
    host = urlsplit(url).hostname or "127.0.0.1"
    return bound.replace("//*:", f"//{host}:").replace("//0.0.0.0:", f"//{host}:")


class Watch:
    """Follows every announced replica: brings it into the fleet, marks it down and up again."""

    def __init__(self, fleet: Fleet, metrics: Metrics) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._followers: dict[str, asyncio.Task[None]] = {}
        self._looks: dict[str, asyncio.Event] = {}

    async def start(self) -> None:
        """Opens the client that probes go through."""
        self._client = httpx.AsyncClient(timeout=PROBE_TIMEOUT_S, trust_env=False)

    async def stop(self) -> None:
        """Follows nothing any more."""
        followers = list(self._followers.values())
        for follower in followers:
            follower.cancel()
        await asyncio.gather(*followers, return_exceptions=True)
        await self._client.aclose()

    def follow(self, endpoint: Endpoint) -> None:
        """A replica was announced."""
        self._looks[endpoint.id] = asyncio.Event()
        self._followers[endpoint.id] = asyncio.get_running_loop().create_task(self._follow(endpoint))

    def drop(self, replica_id: str) -> None:
        """A replica was withdrawn: it gets nothing more."""
        self._followers.pop(replica_id).cancel()
        del self._looks[replica_id]
        self._fleet.left(replica_id)

    def suspect(self, replica_id: str) -> None:
        """A request failed there: look at once."""
        if (look := self._looks.get(replica_id)) is not None:
            look.set()

    def failed(self, replica_id: str) -> None:
        """The replica cannot be reached: it gets nothing more until it answers."""
        if self._fleet.failed(replica_id, self._now()):
            standing = self._fleet.get(replica_id)
            assert standing is not None
            self._metrics.replica_failures.labels(standing.replica.models[0]).inc()
            log.warning("replica %s does not answer at %s", replica_id, standing.replica.url)
        self.suspect(replica_id)

    @property
    def followed(self) -> frozenset[str]:
        return frozenset(self._followers)

    async def _follow(self, endpoint: Endpoint) -> None:
        await self._admit(endpoint)
        while True:
            await self._pause(endpoint.id)
            down = self._down(endpoint.id)
            if not await self._answers(endpoint.url):
                self.failed(endpoint.id)
            elif down:
                await self._admit(endpoint)  # what answers there may be another engine than before

    async def _admit(self, endpoint: Endpoint) -> None:
        """Learns what the engine is, for as long as that takes, and lets it serve."""
        complained = False
        while True:
            try:
                replica = await learn(self._client, endpoint)
                break
            except EngineUnreachable as error:
                if not complained:
                    log.warning("waiting for replica %s: %s", endpoint.id, error)
                complained = True
                await asyncio.sleep(PROBE_DOWN_S)
        self._fleet.joined(replica, self._now())
        self._fleet.recovered(replica.id, self._now())
        log.info("replica %s serves %s at %s", replica.id, ", ".join(replica.models), replica.url)

    async def _pause(self, replica_id: str) -> None:
        period = PROBE_DOWN_S if self._down(replica_id) else PROBE_READY_S
        look = self._looks[replica_id]
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(look.wait(), period)
        look.clear()

    async def _answers(self, url: str) -> bool:
        try:
            return (await self._client.get(f"{url}/health")).status_code < 500
        except httpx.HTTPError:
            return False

    def _down(self, replica_id: str) -> bool:
        standing = self._fleet.get(replica_id)
        return standing is not None and standing.state is State.DOWN

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
