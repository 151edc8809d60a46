"""Looking at replicas: what an engine says of itself, and whether it still answers.

An engine is known only by its wire (vLLM's HTTP API), so one that Herd started and one that was there before
are learnt in the same way. Requests that fail tell more, and sooner, than any probe: the relay reports them.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Annotated, Protocol
from urllib.parse import urlsplit

import httpx
import msgspec

from router.core.fleet import NOTHING_CACHED, Fleet, Replica, Standing, State
from router.errors import EngineUnreachable
from router.metrics import Metrics

log = logging.getLogger(__name__)

# A replica that is down is asked often, so that it serves again within a second of answering.
PROBE_DOWN_S = 0.25
# One that serves is asked seldom: its own requests show at once when it dies.
PROBE_READY_S = 5.0
# One that fell silent, or fails what it is asked, has to answer sooner.
PROBE_SUSPECT_S = 2.0
# A token may take as long as predicted so many times, and at least so many seconds.
TOKEN_TIMES, TOKEN_S = 5.0, 2.0
# So many requests in a row that a replica fails itself are no chance, nor one bad request.
FAILURES = 3
# How long a client is asked to wait for a replica that cannot be reached now.
RETRY_AFTER_S = 1
# An engine on a busy machine may take seconds to answer while it is healthy.
PROBE_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """What membership announces of a replica; all else the engine tells. `id` is new with every start."""

    id: str
    url: str
    engine: str = "unknown"


class _Model(msgspec.Struct):
    id: str
    max_model_len: int | None = None
    root: str | None = None
    parent: str | None = None


class _Listing(msgspec.Struct):
    """`/v1/models`: the model, then its adapters."""

    data: Annotated[list[_Model], msgspec.Meta(min_length=1)]


class _EventSource(msgspec.Struct):
    """One data-parallel rank in vLLM's `/kv_event_sources`."""

    endpoint: str | None = None
    replay_endpoint: str | None = None


_decode_sources = msgspec.json.Decoder(dict[str, _EventSource]).decode


async def learn(client: httpx.AsyncClient, endpoint: Endpoint) -> Replica:
    """Asks an engine for its models, block size and KV-event sockets. Raises EngineUnreachable."""
    try:
        listing = await client.get(f"{endpoint.url}/v1/models")
        listing.raise_for_status()
        models = msgspec.json.decode(listing.content, type=_Listing).data
        metrics = await client.get(f"{endpoint.url}/metrics")
        told = await client.get(f"{endpoint.url}/kv_event_sources")
        sources = _decode_sources(told.content) if told.is_success else {}
    except (httpx.HTTPError, msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise EngineUnreachable(
            f"{endpoint.url} does not answer as vLLM: {error or type(error).__name__}"
        ) from error
    cache = metrics.text if metrics.is_success else ""
    source = sources.get("0", _EventSource())
    return Replica(
        id=endpoint.id,
        url=endpoint.url,
        models=tuple(model.id for model in models),
        engine=endpoint.engine,
        block_size=cache_config(cache, "block_size"),
        num_blocks=cache_config(cache, "num_gpu_blocks"),
        max_model_len=next((m.max_model_len for m in models if m.max_model_len), None),
        kv_events=reachable(source.endpoint, endpoint.url),
        kv_replay=reachable(source.replay_endpoint, endpoint.url),
        prefix_caching='enable_prefix_caching="False"' not in cache,
        ranks=max(1, len(sources), cache.count("\nvllm:cache_config_info{")),
        root=next((model.root for model in models if model.parent is None), None),
        adapters=frozenset(model.id for model in models if model.parent is not None),
    )


def cache_config(metrics: str, name: str) -> int | None:
    """A size of the KV cache from vLLM's metrics, None where it is not told."""
    found = re.search(rf'^vllm:cache_config_info\{{[^}}\n]*\b{name}="(\d{{1,9}})"', metrics, re.MULTILINE)
    return int(found[1]) if found else None


def reachable(bound: str | None, url: str) -> str | None:
    """A ZMQ endpoint as others reach it: an engine names what it bound, often `tcp://*:5557`."""
    if bound is None:
        return None
    host = urlsplit(url).hostname or "127.0.0.1"
    return bound.replace("//*:", f"//{host}:").replace("//0.0.0.0:", f"//{host}:")


class Observer(Protocol):
    """Who is told of replicas as they come and go, after the fleet."""

    def joined(self, replica: Replica) -> None:
        """It can be given requests; said again when it is back, since another engine may answer there."""

    def left(self, replica_id: str) -> None:
        """It was withdrawn."""


async def _as_it_is(replica: Replica) -> bool:
    """Its cache is filled by the requests that it gets."""
    return False


class Watch:
    """Follows every announced replica: brings it into the fleet, marks it down and up again.

    `cut`: ends all connections to the engine at a URL, which is given up for others. `warm`: makes a replica
    fit that was never there before, and says whether that took any time.
    """

    def __init__(
        self,
        fleet: Fleet,
        metrics: Metrics,
        observer: Observer | None = None,
        cut: Callable[[str], None] = lambda url: None,
        warm: Callable[[Replica], Awaitable[bool]] = _as_it_is,
    ) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._observer = observer
        self._cut = cut
        self._warm = warm
        self._failures = Counter[str]()
        self._silent: set[str] = set()
        self._news = asyncio.Event()
        self._followers: dict[str, asyncio.Task[None]] = {}
        self._looks: dict[str, asyncio.Event] = {}
        self._untried: set[str] = set()

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
        self._untried.add(endpoint.id)
        self._followers[endpoint.id] = asyncio.get_running_loop().create_task(self._follow(endpoint))

    def leave(self, replica_id: str) -> Standing | None:
        """A replica was withdrawn: it gets nothing more. Its standing, if it ever served."""
        self._followers.pop(replica_id).cancel()
        del self._looks[replica_id]
        self._failures.pop(replica_id, None)
        self._silent.discard(replica_id)
        self._untried.discard(replica_id)
        if self._observer is not None:
            self._observer.left(replica_id)
        return self._fleet.leaving(replica_id, self._now())

    def suspect(self, replica_id: str) -> None:
        """A request broke there: look at once."""
        if (look := self._looks.get(replica_id)) is not None:
            look.set()

    def silent(self, replica_id: str) -> None:
        """Nothing is heard of its streams, longer than load explains: it has to show that it lives."""
        if self._fleet.suspected(replica_id, self._now()):
            log.warning("replica %s is silent", replica_id)
            self._silent.add(replica_id)
            self.suspect(replica_id)

    def failing(self, replica_id: str) -> None:
        """It answered a request with a failure. After some in a row others come first, until it generates;
        the fault may be the requests'."""
        if replica_id not in self._followers:
            return
        self._failures[replica_id] += 1
        if self._failures[replica_id] >= FAILURES:
            self._fleet.suspected(replica_id, self._now())
        self.suspect(replica_id)

    def answered(self, replica_id: str) -> None:
        """It answered a request."""
        if self._failures and self._failures[replica_id] < FAILURES:
            del self._failures[replica_id]

    async def comes(self, model: str, within_s: float) -> bool:
        """Whether a replica of the model comes, or shows that it is well, in so many seconds."""
        if not self._followers:
            return False
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within_s):
                await self._news.wait()
                while not self._fleet.view(model).replicas:
                    await self._news.wait()
                return True
        return False

    def unreachable(self, replica_id: str, cut: bool = False) -> None:
        """The replica cannot be reached: it gets nothing more until it answers. `cut`: nor is it heard."""
        if not self._fleet.failed(replica_id, self._now()):
            return
        standing = self._fleet.get(replica_id)
        assert standing is not None
        self._metrics.of(standing.replica.models[0]).replica_failures.inc()
        log.warning("replica %s does not answer at %s", replica_id, standing.replica.url)
        if cut and self._fleet.view(standing.replica.models[0]).replicas:
            self._cut(standing.replica.url)  # what goes on elsewhere; else it may still come to itself
        self.suspect(replica_id)

    @property
    def followed(self) -> frozenset[str]:
        return frozenset(self._followers)

    @property
    def expecting(self) -> bool:
        """A replica was announced and is asked for the first time what it is."""
        return bool(self._untried)

    @property
    def settled(self) -> bool:
        """Every replica was asked once what it is."""
        return not self.expecting

    async def _follow(self, endpoint: Endpoint) -> None:
        await self._admit(endpoint, new=True)
        while True:
            await self._pause(endpoint.id)
            down = self._down(endpoint.id)
            if not await self._well(endpoint):
                self.unreachable(endpoint.id, cut=True)
            elif down:
                await self._admit(endpoint)  # what answers there may be another engine than before
            else:
                self._fleet.recovered(endpoint.id, self._now())
                self._tell()

    async def _admit(self, endpoint: Endpoint, new: bool = False) -> None:
        """Learns what the engine is, for as long as that takes, and lets it serve; a new one when warm."""
        complained = False
        while True:
            try:
                replica = await learn(self._client, endpoint)
                break
            except EngineUnreachable as error:
                if not complained:
                    log.warning("waiting for replica %s: %s", endpoint.id, error)
                complained = True
                self._untried.discard(endpoint.id)
                await asyncio.sleep(PROBE_DOWN_S)
        self._fleet.joined(replica, self._now(), State.WARMING)
        if self._observer is not None:
            self._observer.joined(replica)
        self._untried.discard(endpoint.id)
        self._tell()
        if new and await self._warm(replica) and not await self._well(endpoint):
            self.unreachable(endpoint.id, cut=True)
            return
        self._fleet.recovered(replica.id, self._now())
        self._tell()
        log.info("replica %s serves %s at %s", replica.id, ", ".join(replica.models), replica.url)

    async def _pause(self, replica_id: str) -> None:
        period = PROBE_DOWN_S if self._down(replica_id) else PROBE_READY_S
        look = self._looks[replica_id]
        # Not wait_for: in Python 3.11 it loses a cancellation that comes as the event is set.
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(period):
                await look.wait()
        look.clear()

    async def _well(self, endpoint: Endpoint) -> bool:
        """Whether it answers; where it failed requests or fell silent, whether it generates as well."""
        odd = endpoint.id in self._silent or self._failures[endpoint.id] >= FAILURES
        timeout = PROBE_SUSPECT_S if odd else PROBE_TIMEOUT_S
        if not await self._answers("GET", f"{endpoint.url}/health", timeout):
            return False
        if odd and not await self._generates(endpoint):
            return False
        if odd:
            self._silent.discard(endpoint.id)
            del self._failures[endpoint.id]
        return True

    async def _generates(self, endpoint: Endpoint) -> bool:
        """Whether it says a token, unless it is of a kind that says none."""
        standing = self._fleet.get(endpoint.id)
        if standing is None:
            return True
        asked = {"model": standing.replica.models[0], "prompt": "Hello", "max_tokens": 1}
        timeout = max(TOKEN_S, TOKEN_TIMES * standing.forecast(1, NOTHING_CACHED, self._now()).ttft_s)
        return await self._answers("POST", f"{endpoint.url}/v1/completions", timeout, json=asked)

    async def _answers(self, method: str, url: str, timeout: float, **asked: object) -> bool:
        try:
            reply = await self._client.request(method, url, timeout=timeout, **asked)  # type: ignore[arg-type]
        except httpx.HTTPError:
            return False
        return reply.status_code < 500

    def _tell(self) -> None:
        """Those who wait for a replica look again."""
        news, self._news = self._news, asyncio.Event()
        news.set()

    def _down(self, replica_id: str) -> bool:
        standing = self._fleet.get(replica_id)
        return standing is not None and standing.state is State.DOWN

    def _now(self) -> float:
        return asyncio.get_running_loop().time()
