"""KV events from every replica's engine into the fleet.

An engine numbers its batches from 0, publishes each once and keeps the last ones for replay. So what was
missed is asked for again; where it cannot be had any more, the replica's cache is unknown and learnt anew.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Protocol

import msgspec
import zmq
import zmq.asyncio

from router.core.fleet import Fleet, Replica
from router.core.kv_events import KVEventBatch, decode_batch, joined
from router.core.trust import Doubt
from router.metrics import Metrics

log = logging.getLogger(__name__)

# vLLM's own high-water mark: beyond, what is published is dropped, and shows as a gap.
HWM = 100_000
# While a replay comes, the next part of it is milliseconds away; vLLM 0.32 may forget to send its end.
REPLAY_QUIET_S = 1.0
# Streams wait for the loop as well: after so many seconds of events, others have their turn.
TURN_S = 0.002
# After what no engine should send, it is not asked again at once.
RETRY_S = 1.0

HYBRID = "its model has several groups of KV cache, of which one is followed"


class Listener(Protocol):
    """Who judges what events tell of their replica."""

    def restarted(self, replica_id: str) -> None: ...

    def doubted(self, replica_id: str, kind: Doubt, reason: str) -> None: ...

    def removed(self, replica_id: str, keys: list[int]) -> None: ...


@dataclass(slots=True)
class Place:
    """How far an engine's batches were taken in. `due`: the number of the next one."""

    due: int = 0
    ts: float = 0.0  # of the last batch, by the engine's clock


@dataclass(slots=True, eq=False)
class Feed:
    """The events of one replica."""

    replica: Replica
    place: Place = field(default_factory=Place)
    hybrid: bool = False


class Turns:
    """Shares the loop: whoever takes in many batches asks after each whether others have waited."""

    def __init__(self) -> None:
        self._clock = asyncio.get_running_loop().time
        self._ends = self._clock() + TURN_S

    async def share(self) -> None:
        """Lets others have a turn once this one is over."""
        if self._clock() > self._ends:
            await asyncio.sleep(0)
            self._ends = self._clock() + TURN_S


class KVFeed:
    """Follows replicas that publish their KV events. What it learns goes to the fleet and to the listener."""

    def __init__(self, fleet: Fleet, metrics: Metrics, listener: Listener) -> None:
        self._fleet = fleet
        self._metrics = metrics
        self._listener = listener
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def start(self) -> None:
        """Replicas can be followed from now on."""
        self._context = zmq.asyncio.Context()

    def follow(self, replica: Replica) -> None:
        """A replica joined, or is back; what it held before is forgotten."""
        self.drop(replica.id)
        self._fleet.forget(replica.id)
        if replica.kv_events is not None:
            self._tasks[replica.id] = asyncio.get_running_loop().create_task(self._follow(Feed(replica)))

    def drop(self, replica_id: str) -> None:
        """A replica left."""
        if (task := self._tasks.pop(replica_id, None)) is not None:
            task.cancel()

    async def stop(self) -> None:
        """Follows nothing any more."""
        tasks = list(self._tasks.values())
        for replica_id in list(self._tasks):
            self.drop(replica_id)
        await asyncio.gather(*tasks, return_exceptions=True)
        self._context.destroy(linger=0)

    async def _follow(self, feed: Feed) -> None:
        """Subscribed first, so that nothing falls between the replay and what is live."""
        assert feed.replica.kv_events is not None
        with self._context.socket(zmq.SUB) as live:
            live.set_hwm(HWM)
            live.subscribe(b"")
            live.connect(feed.replica.kv_events)
            while True:
                try:
                    await self._replay(feed)
                    await self._live(feed, live)
                except (msgspec.DecodeError, ValueError) as error:
                    self._lost(feed, f"a batch of its KV events cannot be read: {error}")
                    feed.place = Place()
                    await asyncio.sleep(RETRY_S)

    async def _live(self, feed: Feed, live: zmq.asyncio.Socket) -> None:
        """Batches as they come. Raises DecodeError, or ValueError for what is no batch."""
        turns = Turns()
        while True:
            _, number, payload = await live.recv_multipart()
            await self._heard(feed, int.from_bytes(number, "big"), decode_batch(payload))
            await turns.share()

    async def _heard(self, feed: Feed, number: int, batch: KVEventBatch) -> None:
        """A live batch: the one that is due, or one of before, or of another engine, or behind a gap."""
        place = feed.place
        if number < place.due and batch.ts > place.ts:
            self._restarted(feed)
        if number > place.due:
            if place.due:
                self._metrics.of(feed.replica.models[0]).event_gaps.inc()
            await self._replay(feed)
        if number > place.due:
            self._skip(feed, number)
        if number == place.due:
            self._take(feed, batch)

    async def _replay(self, feed: Feed) -> None:
        """Takes what the engine still has from the batch that is due on.

        It is asked again from where its answer had a hole or stopped without its end, as vLLM 0.32's may.
        """
        while True:
            asked = feed.place.due
            try:
                async with aclosing(self._replayed(feed.replica, asked)) as batches:
                    whole = await self._take_replayed(feed, batches)
            except TimeoutError:
                whole = feed.place.due == asked
            if whole:
                return

    async def _take_replayed(self, feed: Feed, batches: AsyncIterator[tuple[int, bytes]]) -> bool:
        """False at a hole. What is missing at the very beginning is lost: just that was asked for."""
        turns, asked = Turns(), feed.place.due
        async for number, payload in batches:
            if number > feed.place.due != asked:
                return False
            if number > feed.place.due:
                self._skip(feed, number)
            if number == feed.place.due:
                self._take(feed, decode_batch(payload))
            await turns.share()
        return True

    async def _replayed(self, replica: Replica, start: int) -> AsyncGenerator[tuple[int, bytes], None]:
        """Batches from number `start` on to the last one. Raises TimeoutError where nothing more comes."""
        if replica.kv_replay is None:
            return
        with self._context.socket(zmq.DEALER) as asked:
            asked.set_hwm(0)  # vLLM drops what does not fit
            asked.linger = 0
            asked.connect(replica.kv_replay)
            await asked.send_multipart([b"", start.to_bytes(8, "big")])
            while True:
                async with asyncio.timeout(REPLAY_QUIET_S):
                    *_, number, payload = await asked.recv_multipart()
                if not payload:
                    return
                yield int.from_bytes(number, "big"), payload

    def _take(self, feed: Feed, batch: KVEventBatch) -> None:
        """The batch that is due."""
        replica_id, left = feed.replica.id, list[int]()
        for event in joined(batch.events):
            left += self._fleet.apply(replica_id, event)
        feed.place.due += 1
        feed.place.ts = batch.ts
        if left:
            self._listener.removed(replica_id, left)
        if not feed.hybrid and self._fleet.is_hybrid(replica_id):
            feed.hybrid = True
            self._listener.doubted(replica_id, Doubt.HYBRID, HYBRID)

    def _skip(self, feed: Feed, number: int) -> None:
        """What lies between cannot be had any more: what is known begins with this batch."""
        first, last = feed.place.due, number - 1
        self._lost(feed, f"its KV events {first} to {last} are lost")
        feed.place.due = number

    def _restarted(self, feed: Feed) -> None:
        """Its numbers begin anew: another engine, with an empty cache."""
        feed.place.due = 0
        self._fleet.forget(feed.replica.id)
        self._listener.restarted(feed.replica.id)

    def _lost(self, feed: Feed, reason: str) -> None:
        """What its cache holds is not known any more."""
        self._metrics.of(feed.replica.models[0]).events_lost.inc()
        self._fleet.forget(feed.replica.id)
        self._listener.doubted(feed.replica.id, Doubt.EVENTS_LOST, reason)
