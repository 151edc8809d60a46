"""All that is known of every replica: a few verbs to write, one view to read.

Time comes in as `now` (seconds on any monotonic clock); nothing here waits, connects or logs.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from enum import StrEnum


@dataclass(frozen=True, slots=True)
class Replica:
    """One engine as membership announced it and as it described itself. `id` is new with every start."""

    id: str
    url: str
    models: tuple[str, ...]
    engine: str = "unknown"
    block_size: int | None = None
    max_model_len: int | None = None
    kv_events: str | None = None
    kv_replay: str | None = None


class State(StrEnum):
    """Whether a replica is given requests."""

    READY = "ready"
    DOWN = "down"


@dataclass(slots=True)
class Standing:
    """How a replica stands at this moment; policies read it, only the Fleet writes it."""

    replica: Replica
    state: State = State.READY
    since: float = 0.0
    in_flight: int = 0
    awaiting_first_token: int = 0
    finished: int = 0
    failures: int = 0

    @property
    def id(self) -> str:
        return self.replica.id


@dataclass(frozen=True, slots=True)
class View:
    """What a policy may know of the fleet and of the request.

    `replicas`: the ready replicas of the request's model, in order of their ids. `turn`: how many placements
    went before. `draw`: 64 random bits. `key`: 64 bits that are the same for requests that belong together
    (router/affinity.py); None if nothing tells, or if the policy does not ask.
    """

    replicas: tuple[Standing, ...]
    turn: int = 0
    draw: int = 0
    key: int | None = None

    def without(self, tried: frozenset[str]) -> View:
        """The same view less the replicas that this request already failed on."""
        if not tried:
            return self
        return replace(self, replicas=tuple(s for s in self.replicas if s.id not in tried))


@dataclass(slots=True)
class Flight:
    """One request at one replica, from `started` to `finished`."""

    standing: Standing
    started_at: float
    first_token_at: float | None = None


@dataclass(slots=True)
class Fleet:
    """Every replica of every model. Single-threaded: only the router's event loop writes it."""

    _standings: dict[str, Standing] = field(default_factory=dict)
    _ready: dict[str, tuple[Standing, ...]] = field(default_factory=dict)
    _turns: int = 0

    def joined(self, replica: Replica, now: float) -> None:
        """A replica can be given requests; one already known by its id keeps its standing."""
        known = self._standings.get(replica.id)
        if known is None:
            self._standings[replica.id] = Standing(replica, since=now)
        else:
            known.replica = replica
        self._ready.clear()

    def left(self, replica_id: str) -> None:
        """A replica is gone from the fleet; its requests in flight finish by themselves."""
        self._standings.pop(replica_id, None)
        self._ready.clear()

    def failed(self, replica_id: str, now: float) -> bool:
        """No connection to the replica: it gets nothing more until it recovers. True if that is news."""
        standing = self._standings.get(replica_id)
        if standing is None or not self._move(standing, State.DOWN, now):
            return False
        standing.failures += 1
        return True

    def recovered(self, replica_id: str, now: float) -> bool:
        """The replica answered a probe. True if it had been down."""
        standing = self._standings.get(replica_id)
        return standing is not None and self._move(standing, State.READY, now)

    def started(self, replica_id: str, now: float) -> Flight:
        """A request was placed on the replica. Counted at once, so that the next placement sees it."""
        standing = self._standings[replica_id]
        standing.in_flight += 1
        standing.awaiting_first_token += 1
        self._turns += 1
        return Flight(standing, now)

    def first_token(self, flight: Flight, now: float) -> None:
        """The first output of the request was seen; later calls change nothing."""
        if flight.first_token_at is None:
            flight.first_token_at = now
            flight.standing.awaiting_first_token -= 1

    def finished(self, flight: Flight) -> None:
        """The request is over at this replica, however it ended."""
        if flight.first_token_at is None:
            flight.standing.awaiting_first_token -= 1
        flight.standing.in_flight -= 1
        flight.standing.finished += 1

    def view(self, model: str, draw: int = 0, key: int | None = None) -> View:
        """What a policy may know to place a request for this model."""
        ready = self._ready.get(model)
        if ready is None:
            ready = self._ready[model] = tuple(
                s for s in self if s.state is State.READY and model in s.replica.models
            )
        return View(ready, self._turns, draw, key)

    def models(self) -> tuple[str, ...]:
        """Every model that some replica serves, ready or not."""
        return tuple(sorted({m for s in self._standings.values() for m in s.replica.models}))

    def get(self, replica_id: str) -> Standing | None:
        """The standing of one replica."""
        return self._standings.get(replica_id)

    def __iter__(self) -> Iterator[Standing]:
        return iter(sorted(self._standings.values(), key=lambda s: s.id))

    def _move(self, standing: Standing, state: State, now: float) -> bool:
        if standing.state is state:
            return False
        standing.state, standing.since = state, now
        self._ready.clear()
        return True
