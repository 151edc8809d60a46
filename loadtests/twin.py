"""The twin: the router's decisions and the simulated engine, run together in virtual time.

The same Fleet, index, step model and policies as in a live router place the requests of a trace on the same
engine core that the simulated server steps. One heap of events and no clock, socket or chance but a seed's:
the same seed gives the same run.

A trace tells of prompts only which blocks they share. So one id stands for the tokens of its block, in the
keys of prompts as in KV events.
"""

from __future__ import annotations

from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from itertools import count
from random import Random

from loadtests.outcomes import Outcome
from loadtests.trace import BLOCK_TOKENS, MAX_ID, Arrival
from router.core import placement
from router.core.blocks import Keys, Prompt, block_keys
from router.core.fleet import NOTHING_CACHED, Fleet, Flight, Load, Replica, Standing, Trust, View
from router.core.kv_events import AllBlocksCleared, BlockRemoved, BlockStored, KVEvent
from router.core.placement import Placement
from workers.simulated.core import Engine, EngineConfig, Step
from workers.simulated.core import Sequence as Running
from workers.simulated.kv_cache import CacheEvent, Removed, Stored
from workers.simulated.step_time import StepTime, StepWork

MODEL = "model"


@dataclass(frozen=True, slots=True)
class Report:
    """An engine's own words, as a scrape of its /metrics finds them: requests in line, in the batch, and the
    share of KV blocks in use (0 to 1)."""

    waiting: int = 0
    running: int = 0
    kv_usage: float = 0.0


# A policy that may also read what engines last reported, by replica id. One that keeps state is made anew for
# each router, by its factory.
Policy = Callable[[View, Prompt, Mapping[str, Report]], Placement | None]
PolicyFactory = Callable[[], Policy]


def core_policy(policy: placement.Policy) -> PolicyFactory:
    """A policy of router.core, as the twin takes them."""
    return lambda: lambda view, prompt, reports: policy(view)


@dataclass(frozen=True, slots=True)
class Setting:
    """What is simulated. Delays and periods in seconds.

    `kv_event_delay`: from the end of a step to the routers' knowledge. `gossip_delay`: from a change of a
    router's load to the others' knowledge. `scrape_period`: how old `Report`s can be.
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


@dataclass(slots=True, eq=False)
class Request:
    """One request in the twin: the content of an engine's sequence and a flight of a router's fleet."""

    arrival: Arrival
    ids: list[int]
    keys: Keys
    prompt: Prompt
    num_prompt_tokens: int
    fresh: Iterable[int]
    outcome: Outcome | None = None
    router: Router | None = None
    flight: Flight | None = None
    sequence: Running | None = None
    first_token_at: float | None = None

    @classmethod
    def of(cls, arrival: Arrival, fresh: Iterable[int]) -> Request:
        """As it comes; `fresh` gives ids for the blocks that outputs fill."""
        ids = list(arrival.hash_ids[: arrival.input_length // BLOCK_TOKENS])
        keys = block_keys(array("I", ids).tobytes(), 1)
        reusable = keys[: (arrival.input_length - 1) // BLOCK_TOKENS]
        prompt = Prompt.of_keys(arrival.input_length, reusable, BLOCK_TOKENS)
        return cls(arrival, ids, keys, prompt, arrival.input_length, fresh)

    def key(self, block: int) -> int:
        """The key of a full block; one that has output in it is nobody else's."""
        while block >= len(self.keys):
            self.ids.append(next(self.fresh))
            parent = self.keys[-1] if self.keys else 0
            self.keys += block_keys(array("I", self.ids[-1:]).tobytes(), 1, parent)
        return self.keys[block]

    def extend(self) -> bool:
        """Outputs end by their length alone."""
        return False


class Heap:
    """What is going to happen, in order of time; of what happens at once, what was planned first."""

    def __init__(self) -> None:
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[..., None], tuple[object, ...]]] = []
        self._numbers = count()

    def at(self, time: float, act: Callable[..., None], *args: object) -> None:
        """Plan a call."""
        heappush(self._events, (time, next(self._numbers), act, args))

    def run(self) -> None:
        """Until nothing is planned any more."""
        while self._events:
            self.now, _, act, args = heappop(self._events)
            act(*args)


class Server:
    """One simulated engine in virtual time, as workers.simulated.live runs it in real time.

    Steps that only decode are skipped in one go: a stretch of them is planned to its end, and cut short when
    a request comes.
    """

    def __init__(self, id: str, twin: Twin) -> None:
        self.id = id
        self.core = Engine(twin.setting.engine)
        self._twin = twin
        self._heap = twin.heap
        self._busy = False
        self._stretch: float | None = None  # when the quiet steps began, while some are under way
        self._plan = 0
        self._period = twin.setting.scrape_period
        self._scraped_at = 0.0
        self._report = Report()

    def add(self, request: Request) -> None:
        """A request arrives."""
        now = self._heap.now
        self.report()
        if self._stretch is not None:
            quiet = self.core.quiet(self._stretch, until=now)
            self._plan_skip(quiet.steps, quiet.ends)
            self._stretch = None
        request.sequence = self.core.add(str(id(request)), request, request.arrival.output_length, now)
        if not self._busy:
            self._begin()

    def report(self) -> Report:
        """What the last scrape saw. The engine calls it before it changes, so that is what is there now."""
        scraped_at = self._heap.now // self._period * self._period
        if scraped_at > self._scraped_at:
            self._scraped_at = scraped_at
            core = self.core
            self._report = Report(core.num_waiting, core.num_running, core.kv_usage)
        return self._report

    def _begin(self) -> None:
        """The next step, or all quiet ones that come next."""
        now = self._heap.now
        quiet = self.core.quiet(now)
        if quiet.steps:
            self._stretch = now
            self._plan_skip(quiet.steps, quiet.ends)
            return
        self.report()
        step = self.core.step(now)
        self._busy = step is not None
        if step is not None:
            self._heap.at(now + step.duration, self._end, step)

    def _plan_skip(self, steps: int, ends: float) -> None:
        self._plan += 1
        self._heap.at(ends, self._skip, steps, self._plan)

    def _skip(self, steps: int, plan: int) -> None:
        if plan == self._plan:
            self._stretch = None
            self.core.skip(steps)
            self._begin()

    def _end(self, step: Step) -> None:
        now = self._heap.now
        for sequence, finish in step.outputs:
            request: Request = sequence.content  # type: ignore[assignment]
            if request.first_token_at is None:
                request.first_token_at = now
                self._twin.first_token(request)
            if finish is not None:
                self._twin.finished(request)
        if step.events:
            self._twin.publish(self.id, step.events)
        self._begin()


class Router:
    """One router process: its fleet and its policy."""

    def __init__(self, twin: Twin, policy: Policy) -> None:
        self.fleet = Fleet()
        self.policy = policy
        # What each of the other routers last told of its load here, by replica.
        self.told: dict[str, dict[Router, Load]] = {}
        setting = twin.setting
        for id in twin.servers:
            self.fleet.joined(
                Replica(
                    id,
                    f"sim://{id}",
                    (MODEL,),
                    engine="simulated",
                    block_size=BLOCK_TOKENS,
                    num_blocks=setting.engine.num_gpu_blocks,
                ),
                now=0.0,
            )
            self.fleet.trusted(id, Trust.EXACT, "events of the twin", BLOCK_TOKENS)
            self.told[id] = {}

    def load(self, id: str, now: float) -> Load:
        """Its own work at a replica."""
        standing = self.standing(id)
        own = standing.backlog_s(now) - standing.elsewhere.prefill_s
        return Load(standing.in_flight, own, standing.decoding, standing.context)

    def hear(self, of: Router, id: str, load: Load) -> None:
        """What another router has at a replica."""
        self.told[id][of] = load
        self.standing(id).elsewhere = sum(self.told[id].values(), Load())

    def standing(self, id: str) -> Standing:
        standing = self.fleet.get(id)
        assert standing is not None
        return standing


@dataclass(slots=True)
class Run:
    """What came of a simulation: outcomes in order of arrival, and how many requests fitted no engine."""

    outcomes: list[Outcome] = field(default_factory=list)
    refused: int = 0


class Twin:
    """One run over a trace."""

    def __init__(self, setting: Setting, policy: PolicyFactory, seed: int) -> None:
        self.setting = setting
        self.heap = Heap()
        self.run = Run()
        self.servers = {id: Server(id, self) for id in (f"replica-{n}" for n in range(setting.replicas))}
        self.routers = [Router(self, policy()) for _ in range(setting.routers)]
        self._reports = Reports(self.servers)
        self._chance = Random(seed)
        self._fresh = count(MAX_ID)
        self._in_flight = dict.fromkeys(self.servers, 0)

    def arrive(self, arrival: Arrival) -> None:
        """A request comes to one of the routers, which places it."""
        engine = self.setting.engine
        blocks = -(-(arrival.input_length + arrival.output_length - 1) // BLOCK_TOKENS)
        if blocks > engine.num_gpu_blocks - 1:
            self.run.refused += 1
            return
        now = self.heap.now
        request = Request.of(arrival, self._fresh)
        router = request.router = self._chance.choice(self.routers)
        prompt = request.prompt
        view = router.fleet.view(MODEL, self._chance.getrandbits(64), _affinity(request.keys), now, prompt)
        placed = router.policy(view, prompt, self._reports)
        assert placed is not None, "every replica of the twin is ready"
        id = placed.standing.id
        cached = view.cached.get(id, NOTHING_CACHED)
        request.flight = router.fleet.started(id, now, prompt, cached)
        self._in_flight[id] += 1
        crowding = max(self._in_flight.values()) * len(self.servers) / sum(self._in_flight.values())
        unloaded = unloaded_s(engine, arrival.input_length)
        request.outcome = Outcome(arrival, unloaded, id, cached.tokens, crowding)
        self.run.outcomes.append(request.outcome)
        self.servers[id].add(request)
        self._gossip(router, id)

    def first_token(self, request: Request) -> None:
        """A request's first token reaches its router."""
        router, flight, outcome, sequence = request.router, request.flight, request.outcome, request.sequence
        assert router and flight and outcome and sequence
        router.fleet.first_token(flight, self.heap.now)
        outcome.ttft = self.heap.now - outcome.arrival.at
        outcome.reported = sequence.cached_tokens or 0
        self._gossip(router, outcome.replica)

    def finished(self, request: Request) -> None:
        """A request's last token reaches its router."""
        router, flight, outcome = request.router, request.flight, request.outcome
        assert router and flight and outcome and request.first_token_at is not None
        router.fleet.finished(flight, self.heap.now, outcome.arrival.output_length)
        self._in_flight[outcome.replica] -= 1
        outcome.tpot = (self.heap.now - request.first_token_at) / max(1, outcome.arrival.output_length - 1)
        self._gossip(router, outcome.replica)

    def publish(self, id: str, events: list[CacheEvent]) -> None:
        """KV events of a step set out for the routers."""
        self.heap.at(self.heap.now + self.setting.kv_event_delay, self._apply, id, list(_typed(events)))

    def _apply(self, id: str, events: list[KVEvent]) -> None:
        for router in self.routers:
            for event in events:
                router.fleet.apply(id, event)

    def _gossip(self, router: Router, id: str) -> None:
        if len(self.routers) > 1:
            load = router.load(id, self.heap.now)
            self.heap.at(self.heap.now + self.setting.gossip_delay, self._hear, router, id, load)

    def _hear(self, of: Router, id: str, load: Load) -> None:
        for router in self.routers:
            if router is not of:
                router.hear(of, id, load)


class Reports(Mapping[str, Report]):
    """What each engine last reported, by replica id; nothing is scraped before somebody reads it."""

    def __init__(self, servers: Mapping[str, Server]) -> None:
        self._servers = servers

    def __getitem__(self, id: str) -> Report:
        return self._servers[id].report()

    def __iter__(self):
        return iter(self._servers)

    def __len__(self) -> int:
        return len(self._servers)


def simulate(arrivals: Iterable[Arrival], setting: Setting, policy: PolicyFactory, seed: int = 0) -> Run:
    """Places a trace's requests, to the last token of the last one."""
    twin = Twin(setting, policy, seed)
    for arrival in arrivals:
        twin.heap.at(arrival.at, twin.arrive, arrival)
    twin.heap.run()
    return twin.run


def unloaded_s(engine: EngineConfig, num_tokens: int) -> float:
    """What the prefill of so many tokens takes on an idle engine that has none of them."""
    steps = -(-num_tokens // engine.max_num_batched_tokens)
    work = StepWork(prefill_tokens=num_tokens, attention=num_tokens * num_tokens / 2)
    return engine.step_time.seconds(work) + (steps - 1) * engine.step_time.step


def at_speed(time: StepTime, speed: float) -> StepTime:
    """Step times of an engine whose clock runs `speed` times as fast."""
    return StepTime(*(getattr(time, name) / speed for name in StepTime.__slots__))


def _affinity(keys: Keys) -> int | None:
    """What belongs together: a first block can be a system prompt of many, the second tells them apart."""
    return keys[min(1, len(keys) - 1)] if keys else None


def _typed(events: Sequence[CacheEvent]) -> Iterable[KVEvent]:
    """As KV events tell it; blocks that leave one after the other share an event."""
    removed: list[int] = []
    for event in events:
        if isinstance(event, Removed):
            removed.append(event.key)
            continue
        if removed:
            yield BlockRemoved(removed)
            removed = []
        yield _stored(event) if isinstance(event, Stored) else AllBlocksCleared()
    if removed:
        yield BlockRemoved(removed)


def _stored(event: Stored) -> BlockStored:
    request: Request = event.owner
    last = event.first + event.count
    parent = request.key(event.first - 1) if event.first else None
    return BlockStored(request.keys[event.first : last], request.ids[event.first : last], 1, parent)
