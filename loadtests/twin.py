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
from random import Random
from typing import cast

from loadtests.outcomes import Outcome
from loadtests.trace import BLOCK_TOKENS, MAX_ID, Arrival
from loadtests.virtual import Report, Server, Timeline
from router.core import placement
from router.core.blocks import Keys, Prompt, block_keys
from router.core.fleet import NOTHING_CACHED, Fleet, Flight, Load, Replica, Standing, Trust, View
from router.core.kv_events import AllBlocksCleared, BlockHash, BlockRemoved, BlockStored, KVEvent
from router.core.placement import Placement
from workers.simulated.core import EngineConfig, Step
from workers.simulated.kv_cache import CacheEvent, Removed, Stored
from workers.simulated.step_time import StepWork

MODEL = "model"

# A policy that may also read what engines last reported, by replica id. Each router has its own, made by a
# factory, since some keep state.
Policy = Callable[[View, Prompt, Mapping[str, Report]], Placement | None]
PolicyFactory = Callable[[], Policy]


def core_policy(policy: placement.Policy) -> PolicyFactory:
    """A policy of router.core, as the twin takes them."""
    return lambda: lambda view, prompt, reports: policy(view)


@dataclass(frozen=True, slots=True)
class Setting:
    """What is simulated. Delays and periods in seconds.

    `kv_event_delay`: from the end of a step to the routers' knowledge. `gossip_delay`: from a change of a
    router's load to the others' knowledge. `scrape_period`: how old a `Report` can be.
    """

    engine: EngineConfig
    replicas: int = 8
    routers: int = 1
    kv_event_delay: float = 0.05
    gossip_delay: float = 0.005
    scrape_period: float = 0.05

    def __post_init__(self) -> None:
        if self.engine.block_size != BLOCK_TOKENS:
            raise ValueError(f"traces tell of blocks of {BLOCK_TOKENS} tokens, not {self.engine.block_size}")

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
    """A request under way."""

    router: Router
    flight: Flight
    outcome: Outcome
    first_token_at: float = 0.0


class Router:
    """One router process: its fleet, its policy, and what the others told it."""

    def __init__(self, policy: Policy, setting: Setting, replicas: Iterable[str]) -> None:
        self.fleet = Fleet()
        self.policy = policy
        self._elsewhere: dict[str, dict[Router, Load]] = {}
        blocks = setting.engine.num_gpu_blocks
        for id in replicas:
            self.fleet.joined(
                Replica(id, id, (MODEL,), "simulated", BLOCK_TOKENS, num_blocks=blocks), now=0.0
            )
            self.fleet.trusted(id, Trust.EXACT, "it is simulated here", BLOCK_TOKENS)
            self._elsewhere[id] = {}

    def load(self, id: str, now: float) -> Load:
        """Its own work at a replica."""
        standing = self._standing(id)
        own = standing.backlog_s(now) - standing.elsewhere.prefill_s
        return Load(standing.in_flight, own, standing.decoding, standing.context)

    def hear(self, of: Router, id: str, load: Load) -> None:
        """What another router has at a replica."""
        told = self._elsewhere[id]
        told[of] = load
        self._standing(id).elsewhere = sum(told.values(), Load())

    def _standing(self, id: str) -> Standing:
        standing = self.fleet.get(id)
        assert standing is not None
        return standing


class Twin:
    """One run."""

    def __init__(self, setting: Setting, policy: PolicyFactory, seed: int) -> None:
        self.timeline = Timeline()
        self.run = Run()
        self._setting = setting
        self._chance = Random(seed)
        self._fresh = count(MAX_ID)
        names = [f"replica-{number}" for number in range(setting.replicas)]
        self._servers = {id: self._server(id) for id in names}
        self._reports = Reports(self._servers)
        self._routers = [Router(policy(), setting, names) for _ in range(setting.routers)]
        self._under_way: dict[str, Request] = {}
        self._in_flight = dict.fromkeys(names, 0)

    def _server(self, id: str) -> Server:
        setting = self._setting
        return Server(setting.engine, self.timeline, setting.scrape_period, partial(self._deliver, id))

    def arrive(self, arrival: Arrival) -> None:
        """A request comes to one of the routers, which places it."""
        setting, chance, now = self._setting, self._chance, self.timeline.now
        if not setting.fits(arrival):
            self.run.refused += 1
            return
        router = chance.choice(self._routers)
        content = Content(arrival, self._fresh)
        prompt = content.prompt
        view = router.fleet.view(MODEL, chance.getrandbits(64), content.affinity, now, prompt)
        placed = router.policy(view, prompt, self._reports)
        assert placed is not None, "all replicas are ready"
        replica = placed.standing.id
        cached = view.cached.get(replica, NOTHING_CACHED)
        flight = router.fleet.started(replica, now, prompt, cached)
        self._in_flight[replica] += 1
        outcome = Outcome(
            arrival, setting.unloaded_s(arrival.input_length), replica, cached.tokens, self._crowding()
        )
        id = str(len(self.run.outcomes))
        self.run.outcomes.append(outcome)
        self._under_way[id] = Request(router, flight, outcome)
        self._servers[replica].add(id, content, arrival.output_length)
        self._gossip(router, replica)

    def _crowding(self) -> float:
        counts = self._in_flight.values()
        return max(counts) * len(counts) / sum(counts)

    def _deliver(self, replica: str, step: Step) -> None:
        """What a step brought reaches the routers: tokens at once, KV events later."""
        now = self.timeline.now
        for sequence, finish in step.outputs:
            if sequence.num_outputs == 1:
                self._first_token(self._under_way[sequence.id], sequence.cached_tokens or 0, now)
            if finish is not None:
                self._finished(self._under_way.pop(sequence.id), now)
        if step.events:
            self.timeline.at(now + self._setting.kv_event_delay, self._apply, replica, typed(step.events))

    def _first_token(self, request: Request, cached_tokens: int, now: float) -> None:
        request.router.fleet.first_token(request.flight, now)
        request.first_token_at = now
        outcome = request.outcome
        outcome.ttft = now - outcome.arrival.at
        outcome.reported = cached_tokens
        self._gossip(request.router, outcome.replica)

    def _finished(self, request: Request, now: float) -> None:
        outcome = request.outcome
        tokens = outcome.arrival.output_length
        request.router.fleet.finished(request.flight, now, tokens)
        outcome.tpot = (now - request.first_token_at) / max(1, tokens - 1)
        self._in_flight[outcome.replica] -= 1
        self._gossip(request.router, outcome.replica)

    def _apply(self, replica: str, events: Sequence[KVEvent]) -> None:
        for router in self._routers:
            for event in events:
                router.fleet.apply(replica, event)

    def _gossip(self, router: Router, replica: str) -> None:
        if len(self._routers) > 1:
            now = self.timeline.now
            load = router.load(replica, now)
            self.timeline.at(now + self._setting.gossip_delay, self._hear, router, replica, load)

    def _hear(self, of: Router, replica: str, load: Load) -> None:
        for router in self._routers:
            if router is not of:
                router.hear(of, replica, load)


class Reports(Mapping[str, Report]):
    """What each engine last reported, by replica id."""

    def __init__(self, servers: Mapping[str, Server]) -> None:
        self._servers = servers

    def __getitem__(self, id: str) -> Report:
        return self._servers[id].report()

    def __iter__(self) -> Iterator[str]:
        return iter(self._servers)

    def __len__(self) -> int:
        return len(self._servers)


def typed(events: Iterable[CacheEvent]) -> list[KVEvent]:
    """As KV events tell it; blocks that leave one after the other share an event."""
    told: list[KVEvent] = []
    for kind, group in groupby(events, type):
        if kind is Removed:
            told.append(BlockRemoved([cast(BlockHash, cast(Removed, event).key) for event in group]))
        elif kind is Stored:
            told += [_stored(cast(Stored, event)) for event in group]
        else:
            told.append(AllBlocksCleared())
    return told


def _stored(event: Stored) -> BlockStored:
    content = cast(Content, event.owner)
    blocks = slice(event.first, event.first + event.count)
    parent = content.keys[event.first - 1] if event.first else None
    return BlockStored(cast(list[BlockHash], content.keys[blocks]), content.ids[blocks], 1, parent)
