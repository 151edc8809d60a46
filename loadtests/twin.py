"""The twin: the router's decisions and the simulated engine, run together in virtual time.

The same Fleet, index, step model and policies as in a live router place the requests of a trace on the same
engine core that the simulated server steps. No clock, no socket, and no chance but a seed's: the same seed
gives the same run.

A trace tells of prompts only which blocks they share. So one id stands for the tokens of its block, in the
keys of prompts as in KV events.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import count, groupby
from math import inf
from random import Random
from typing import cast

from loadtests.outcomes import Outcome
from loadtests.timeline import Timeline
from loadtests.trace import BLOCK_TOKENS, MAX_ID, Arrival
from loadtests.virtual_engine import Report, VirtualEngine
from loadtests.virtual_gossip import VirtualGossip
from router.core import placement
from router.core.admission import Line, Ticket, start_by
from router.core.blocks import Keys, Prompt, block_keys
from router.core.fleet import NOTHING_CACHED, Fleet, Flight, Replica, Trust, View
from router.core.kv_events import AllBlocksCleared, BlockHash, BlockRemoved, BlockStored, KVEvent
from router.core.placement import Placement
from router.gossip import ROUND_S
from router.line import TICK_S, AdmissionConfig
from router.slo import Slo
from workers.simulated.core import EngineConfig, Step
from workers.simulated.kv_cache import CacheEvent, Removed, Stored
from workers.simulated.step_time import StepWork

MODEL = "model"

# A policy that may also read what engines last reported, by replica id. Each router has its own, made by a
# factory, since some keep state.
Policy = Callable[[View, Prompt, Mapping[str, Report]], Placement | None]
PolicyFactory = Callable[[], Policy]


def core_policy(policy: placement.Policy) -> PolicyFactory:
    """A policy of router.core, as the twin takes them; picklable, for runs in other processes."""
    return partial(partial, _by_view, policy)


@dataclass(frozen=True, slots=True)
class Lined:
    """A policy whose routers have requests wait in line for it."""

    make: PolicyFactory
    admission: AdmissionConfig = field(default_factory=AdmissionConfig)

    def __call__(self) -> Policy:
        return self.make()


def _by_view(
    policy: placement.Policy, view: View, prompt: Prompt, reports: Mapping[str, Report]
) -> Placement | None:
    return policy(view)


@dataclass(frozen=True, slots=True)
class Setting:
    """What is simulated. Delays and periods in seconds.

    `kv_event_delay`: from the end of a step to the routers' knowledge. `gossip_period`: between
    rounds in which routers tell each other all of their load. `gossip_delay`: from one router to another.
    `scrape_period`: how old a `Report` can be. `slo`: what routers know to be promised.
    """

    engine: EngineConfig
    replicas: int = 8
    routers: int = 1
    kv_event_delay: float = 0.05
    gossip_period: float = ROUND_S
    gossip_delay: float = 0.001
    scrape_period: float = 0.05
    slo: Slo | None = None

    def __post_init__(self) -> None:
        if self.engine.block_size != BLOCK_TOKENS:
            raise ValueError(f"traces tell of blocks of {BLOCK_TOKENS} tokens, not {self.engine.block_size}")

    @property
    def replica_ids(self) -> list[str]:
        """Names of the replicas."""
        return [f"replica-{number}" for number in range(self.replicas)]

    def fits(self, arrival: Arrival) -> bool:
        """Whether an engine has room for the request; the last token is never an input."""
        blocks = -(-(arrival.input_length + arrival.output_length - 1) // BLOCK_TOKENS)
        return blocks < self.engine.num_gpu_blocks  # one is reserved

    def unloaded_s(self, num_tokens: int) -> float:
        """Seconds for the prefill of so many tokens on an idle engine that has none of them."""
        steps = -(-num_tokens // self.engine.max_num_batched_tokens)
        work = StepWork(prefill_tokens=num_tokens, attention=num_tokens * num_tokens / 2)
        return self.engine.step_time.seconds(work) + (steps - 1) * self.engine.step_time.step


@dataclass(slots=True)
class Run:
    """What came of it: outcomes in order of arrival, and how many requests fitted no engine."""

    outcomes: list[Outcome] = field(default_factory=list)
    refused: int = 0


def simulate(arrivals: Iterable[Arrival], setting: Setting, policy: PolicyFactory, seed: int = 0) -> Run:
    """Places a trace's requests and serves them to the last token."""
    twin = Twin(setting, policy, seed)
    for arrival in arrivals:
        twin.timeline.at(arrival.at, twin.arrive, arrival)
    twin.timeline.run()
    return twin.run


class Content:
    """A prompt of a trace and its output, as an engine's sequence: blocks with ids and keys."""

    def __init__(self, arrival: Arrival, fresh: Iterator[int]) -> None:
        self.num_prompt_tokens = arrival.input_length
        self.ids = list(arrival.hash_ids[: arrival.input_length // BLOCK_TOKENS])
        self.keys = _chain(self.ids, 0)
        self._fresh = fresh
        # The engine computes the last token anyway, so the block that it fills is no hit.
        reusable = self.keys[: (arrival.input_length - 1) // BLOCK_TOKENS]
        self.prompt = Prompt.of_keys(arrival.input_length, reusable, BLOCK_TOKENS)

    @property
    def affinity(self) -> int | None:
        """What tells requests that belong together: many share a first block, the second sets them apart."""
        return self.keys[min(1, len(self.keys) - 1)] if self.keys else None

    def key(self, block: int) -> int:
        """The key of a full block. One with output in it is nobody else's: its id is fresh."""
        while block >= len(self.keys):
            self.ids.append(next(self._fresh))
            self.keys += _chain(self.ids[-1:], self.keys[-1] if self.keys else 0)
        return self.keys[block]

    def extend(self) -> bool:
        """Outputs end by their length alone."""
        return False


def _chain(ids: Sequence[int], parent: int) -> Keys:
    return block_keys(array("I", ids).tobytes(), 1, parent)


@dataclass(slots=True)
class Request:
    """A request from its arrival on; `flight` once it was placed."""

    id: str
    router: Router
    content: Content
    outcome: Outcome
    flight: Flight | None = None
    first_token_at: float = 0.0


@dataclass(slots=True, eq=False, kw_only=True)
class Waiter(Ticket):
    """A request in line."""

    request: Request


class Router:
    """One router process: its fleet, its policy, its line, and its part in the gossip with its `peers`."""

    def __init__(
        self, policy: PolicyFactory, setting: Setting, timeline: Timeline, peers: list[VirtualGossip]
    ) -> None:
        self.fleet = Fleet()
        self.gossip = VirtualGossip(self.fleet, timeline, setting.gossip_period, setting.gossip_delay, peers)
        self.admission = policy.admission if isinstance(policy, Lined) else AdmissionConfig()
        self.line: Line[Waiter] | None = None
        if isinstance(policy, Lined):
            self.line = Line(self.admission, 0.0, setting.slo.tpot_s if setting.slo else inf)
            self.line.routers = setting.routers
        self.awake = False  # its line is looked at in a moment
        self._policy = policy()
        self._engine = setting.engine
        for id in setting.replica_ids:
            self.joined(id, 0.0)

    def joined(self, id: str, now: float) -> None:
        """A replica can be given requests."""
        size, blocks = self._engine.block_size, self._engine.num_gpu_blocks
        replica = Replica(id, id, (MODEL,), "simulated", block_size=size, num_blocks=blocks)
        self.fleet.joined(replica, now)
        self.fleet.trusted(id, Trust.EXACT, "it is simulated here", size)

    def look(
        self, content: Content, reports: Mapping[str, Report], draw: int, now: float
    ) -> tuple[View, Placement | None]:
        """What it sees, and which replica it would choose; None where no replica is ready."""
        view = self.fleet.view(MODEL, draw, content.affinity, now, content.prompt)
        return view, self._policy(view, content.prompt, reports)

    def start(self, content: Content, view: View, placed: Placement, now: float) -> Flight:
        """The request is on its way to the replica that was chosen."""
        id = placed.standing.id
        flight = self.fleet.started(id, now, content.prompt, view.cached.get(id, NOTHING_CACHED))
        self.gossip.placed(id)
        return flight


class Twin:
    """One run."""

    def __init__(self, setting: Setting, policy: PolicyFactory, seed: int) -> None:
        self.timeline = Timeline()
        self.run = Run()
        self._setting = setting
        self._slo = setting.slo or Slo()
        self._chance = Random(seed)
        self._fresh = count(MAX_ID)
        self._engines = {id: self._engine(id) for id in setting.replica_ids}
        self._reports = Reports(self._engines)
        peers: list[VirtualGossip] = []
        self._routers = [Router(policy, setting, self.timeline, peers) for _ in range(setting.routers)]
        self._requests: dict[str, Request] = {}
        self._in_flight = dict.fromkeys(setting.replica_ids, 0)

    def _engine(self, id: str) -> VirtualEngine:
        setting = self._setting
        return VirtualEngine(setting.engine, self.timeline, setting.scrape_period, partial(self._deliver, id))

    def arrive(self, arrival: Arrival) -> None:
        """A request comes to one of the routers, which places it or has it wait."""
        if not self._setting.fits(arrival):
            self.run.refused += 1
            return
        router = self._chance.choice(self._routers)
        outcome = Outcome(arrival, self._setting.unloaded_s(arrival.input_length))
        request = Request(str(len(self.run.outcomes)), router, Content(arrival, self._fresh), outcome)
        self.run.outcomes.append(outcome)
        view, placed = self._look(request, self.timeline.now)
        if router.line is not None:
            self._queue(router, router.line, request, view, placed)
        else:
            assert placed is not None, "without a line there must be a replica"
            self._start(request, view, placed)

    def _look(self, request: Request, now: float) -> tuple[View, Placement | None]:
        request.router.gossip.hear()
        return request.router.look(request.content, self._reports, self._chance.getrandbits(64), now)

    def _start(self, request: Request, view: View, placed: Placement) -> None:
        outcome, replica = request.outcome, placed.standing.id
        flight = request.flight = request.router.start(request.content, view, placed, self.timeline.now)
        self._in_flight[replica] += 1
        outcome.replica, outcome.predicted = replica, flight.cached.known
        outcome.crowding = self._crowding()
        self._requests[request.id] = request
        self._engines[replica].add(request.id, request.content, outcome.arrival.output_length)

    def _crowding(self) -> float:
        counts = self._in_flight.values()
        return max(counts) * len(counts) / sum(counts)

    # -- the line

    def _queue(
        self, router: Router, line: Line[Waiter], request: Request, view: View, placed: Placement | None
    ) -> None:
        now = self.timeline.now
        waiter = self._waiter(router.admission, request, view)
        waiter.cold = placed is None
        if placed is not None and line.passes(waiter, placed, now):
            self._start(request, view, placed)
        else:
            self._refuse(line.enter(waiter, now))
            self._move(router, line)

    def _waiter(self, admission: AdmissionConfig, request: Request, view: View) -> Waiter:
        now, unloaded = self.timeline.now, request.outcome.unloaded
        due = start_by(now, self._slo.first_token_s(unloaded), unloaded, admission.backlog_s)
        tokens = view.num_tokens - max((had.known for had in view.cached.values()), default=0)
        patience = admission.max_late_s if self._setting.slo else inf
        priority = request.outcome.arrival.priority
        look = partial(self._look, request)
        return Waiter(now, due, look, tokens, patience_s=patience, priority=priority, request=request)

    def _move(self, router: Router, line: Line[Waiter]) -> None:
        """All that can go go, and those who waited too long; the others are looked at again in a moment."""
        now = self.timeline.now
        self._refuse(line.expired(now))
        while line:
            router.gossip.hear()
            released = line.next(router.fleet.view(MODEL, now=now).replicas, now)
            if released is None:
                break
            self._start(released.ticket.request, released.view, released.placement)
        if line and not router.awake:
            router.awake = True
            self.timeline.at(now + TICK_S, self._wake, router, line)

    def _wake(self, router: Router, line: Line[Waiter]) -> None:
        router.awake = False
        self._move(router, line)

    def _refuse(self, waiters: Iterable[Waiter]) -> None:
        for waiter in waiters:
            waiter.request.outcome.refused = True

    # -- what engines tell

    def _deliver(self, replica: str, step: Step) -> None:
        """What a step brought reaches the routers: tokens at once, KV events later."""
        now = self.timeline.now
        for sequence, finish in step.outputs:
            if sequence.num_outputs == 1:
                self._first_token(self._requests[sequence.id], sequence.cached_tokens or 0, now)
            if finish is not None:
                self._finished(self._requests.pop(sequence.id), now)
        if step.events:
            self.timeline.at(now + self._setting.kv_event_delay, self._apply, replica, typed(step.events))

    def _first_token(self, request: Request, cached_tokens: int, now: float) -> None:
        assert request.flight is not None
        request.router.fleet.first_token(request.flight, now)
        request.first_token_at = now
        outcome = request.outcome
        outcome.ttft = now - outcome.arrival.at
        outcome.reported = cached_tokens
        self._freed(request.router)

    def _finished(self, request: Request, now: float) -> None:
        assert request.flight is not None
        outcome = request.outcome
        tokens = outcome.arrival.output_length
        request.router.gossip.hear()
        request.router.fleet.finished(request.flight, now, tokens)
        outcome.tpot = (now - request.first_token_at) / max(1, tokens - 1)
        self._in_flight[outcome.replica] -= 1
        self._freed(request.router)

    def _freed(self, router: Router) -> None:
        if router.line:
            self._move(router, router.line)

    def _apply(self, replica: str, events: Sequence[KVEvent]) -> None:
        for router in self._routers:
            for event in events:
                router.fleet.apply(replica, event)


class Reports(Mapping[str, Report]):
    """What each engine last reported, by replica id."""

    def __init__(self, engines: Mapping[str, VirtualEngine]) -> None:
        self._engines = engines

    def __getitem__(self, id: str) -> Report:
        return self._engines[id].report()

    def __iter__(self) -> Iterator[str]:
        return iter(self._engines)

    def __len__(self) -> int:
        return len(self._engines)


def typed(events: Iterable[CacheEvent]) -> list[KVEvent]:
    """As KV events tell it; blocks that leave a tier one after the other share an event."""
    told: list[KVEvent] = []
    for (kind, tier), group in groupby(events, lambda event: (type(event), getattr(event, "tier", None))):
        if kind is Removed:
            told.append(BlockRemoved([cast(BlockHash, cast(Removed, event).key) for event in group], tier))
        elif kind is Stored:
            told += [_stored(cast(Stored, event)) for event in group]
        else:
            told.append(AllBlocksCleared())
    return told


def _stored(event: Stored) -> BlockStored:
    content = cast(Content, event.owner)
    blocks = slice(event.first, event.first + event.count)
    parent = content.keys[event.first - 1] if event.first else None
    hashes = cast(list[BlockHash], content.keys[blocks])
    return BlockStored(hashes, content.ids[blocks], 1, parent, event.tier)
