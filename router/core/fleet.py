"""All that is known of every replica: a few verbs to write, one view to read.

Time comes in as `now` (seconds on any monotonic clock); nothing here waits, connects or logs.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import exp
from typing import NamedTuple

import msgspec

from router.core.blocks import TEXT_BLOCK_TOKENS, Keys, Prompt
from router.core.kv_events import AllBlocksCleared, KVEvent
from router.core.kv_index import HISTORY, KVIndex, bits_of
from router.core.step_model import STEP_TOKENS, StepModel, fade

# A router with a share of the replicas leaves it while it has so many times the average to do: then a cache
# is worth less than a place. As for the bound of consistent_hash, small differences are no reason.
SPILL = 1.5
# Tokens of KV cache of an engine that does not tell: an 8B model in 16 bits on a GPU of 80 GB has 450,000.
UNTOLD_CAPACITY = 400_000
# What counts as lately (seconds): a few answers long, so that it tells what a stream will meet. In the twin
# 20 is better than 12, 30 and 60 on one trace or the other.
RECENT_S = 20.0
# Less than this is not told to other routers: it keeps no replica busy.
LEAST_RECENT_S = 0.01 * RECENT_S
# A replica that seems to do nothing but prefill still decodes now and then.
MOST_BUSY = 0.9
# How often step models fade (seconds): often enough beside step_model.FADE_S.
FADE_EVERY_S = 1.0


@dataclass(frozen=True, slots=True)
class Replica:
    """One engine as membership announced it and as it described itself. `id` is new with every start.

    `block_size` (tokens) and `num_blocks` are those of its KV cache. `prefix_caching`: it keeps what it
    computed. `ranks`: data-parallel engines, each with a cache of its own. `root`: where its model came from,
    as it says. `adapters`: those of its models that are LoRA adapters.
    """

    id: str
    url: str
    models: tuple[str, ...]
    engine: str = "unknown"
    block_size: int | None = None
    max_model_len: int | None = None
    num_blocks: int | None = None
    kv_events: str | None = None
    kv_replay: str | None = None
    prefix_caching: bool = True
    ranks: int = 1
    root: str | None = None
    adapters: frozenset[str] = frozenset()


class State(StrEnum):
    """Whether a replica is given requests. Those that warm up are, where no other is ready, and those that
    are suspect where there is no other at all. One that leaves has streams to finish."""

    READY = "ready"
    SUSPECT = "suspect"
    WARMING = "warming"
    LEAVING = "leaving"
    DOWN = "down"


# Who is given requests, as long as there are none of a state before.
OFFERED = (State.READY, State.WARMING, State.SUSPECT)


class Trust(StrEnum):
    """How well the router knows a replica's cache.

    EXACT: its KV events, in blocks of the tokens that its engine computes. APPROXIMATE: what was sent there
    before. LOAD: nothing.
    """

    EXACT = "exact"
    APPROXIMATE = "approximate"
    LOAD = "load"


class Load(msgspec.Struct, frozen=True, array_like=True, gc=False):
    """Work at a replica: requests, seconds of prefill promised, sequences decoding, tokens behind those.

    `recent_s`: seconds of prefill that were promised lately (RECENT_S), done or not.
    """

    in_flight: int = 0
    prefill_s: float = 0.0
    decoding: int = 0
    context: int = 0
    recent_s: float = 0.0

    def __add__(self, other: Load) -> Load:
        return Load(
            self.in_flight + other.in_flight,
            self.prefill_s + other.prefill_s,
            self.decoding + other.decoding,
            self.context + other.context,
            self.recent_s + other.recent_s,
        )


NO_LOAD = Load()


@dataclass(slots=True)
class Tally:
    """What was counted of a model's replicas, whichever they were: requests that were placed, seconds of
    prefill that were promised, answers that ended, and their tokens."""

    placed: int = 0
    prefill_s: float = 0.0
    ended: int = 0
    output: int = 0


@dataclass(slots=True)
class Standing:
    """How a replica stands at this moment; policies read it, only the Fleet writes it.

    `bit`: its place in the KV index. `key_blocks`: how many tokens one of its keys covers; 0 for text keys.
    `judged`: its trust was looked into, which a router does only for those whose caches it is to know.
    `takes_ids`: its engine renders and tokenises as the router does, so the router's token ids may be sent.
    `streams`: those in flight that are heard of before their end. `elsewhere`: what the other routers have
    there. `tally`: of all that serve its model.
    """

    replica: Replica
    steps: StepModel = field(default_factory=StepModel.of)
    tally: Tally = field(default_factory=Tally)
    bit: int = 0
    state: State = State.READY
    since: float = 0.0
    in_flight: int = 0
    streams: int = 0
    awaiting_first_token: int = 0
    finished: int = 0
    failures: int = 0
    trust: Trust = Trust.LOAD
    trust_reason: str = "nothing is known of its cache yet"
    key_blocks: int = 0
    takes_ids: bool = False
    judged: bool = False
    elsewhere: Load = NO_LOAD
    prefills: dict[int, Flight] = field(default_factory=dict)  # in order of their start
    prefill_s: float = 0.0  # of all of them
    prefilled_s: float = 0.0  # of all that were before
    recent_s: float = 0.0  # of all that were promised, the older the less, as of `recent_at`
    recent_at: float = 0.0
    head_since: float = 0.0
    decoding: int = 0
    context: int = 0

    @property
    def id(self) -> str:
        return self.replica.id

    @property
    def capacity(self) -> int:
        """How many of its keys its cache holds."""
        tokens = (self.replica.num_blocks or 0) * (self.replica.block_size or 0) or UNTOLD_CAPACITY
        return tokens // (self.key_blocks or TEXT_BLOCK_TOKENS)

    @property
    def known_by(self) -> int:
        """Its bit in the KV index: of what its events told, or of what was sent there."""
        return self.bit if self.trust is Trust.EXACT else self.bit << HISTORY

    @property
    def requests(self) -> int:
        """Requests in flight here, of all routers."""
        return self.in_flight + self.elsewhere.in_flight

    def own_load(self, now: float) -> Load:
        """What this router has here."""
        backlog, recent = self.own_backlog_s(now), self._own_recent_s(now)
        return Load(self.in_flight, backlog, self.decoding, self.context, recent)

    def backlog_s(self, now: float) -> float:
        """Seconds of prefill that were promised here, by all routers, and are not done yet."""
        return self.own_backlog_s(now) + self.elsewhere.prefill_s

    def own_backlog_s(self, now: float) -> float:
        """Of these, what this router promised."""
        if not self.prefills:
            return 0.0
        head = next(iter(self.prefills.values()))
        done = min(max(0.0, now - self.head_since), head.forecast.prefill_s)
        return self.prefill_s - done

    def _own_recent_s(self, now: float) -> float:
        return self.recent_s * exp((self.recent_at - now) / RECENT_S)

    def busy(self, now: float) -> float:
        """The share of its time that it prefills, if what comes is as what came lately; at most MOST_BUSY."""
        return min(MOST_BUSY, (self._own_recent_s(now) + self.elsewhere.recent_s) / RECENT_S)

    def step_s(self) -> float:
        """Seconds of a step that only decodes, with all that decode here now."""
        others = self.elsewhere
        return self.steps.step_s(self.decoding + others.decoding, self.context + others.context)

    def next_output_s(self, now: float) -> float:
        """Seconds within which something is to be heard of the streams here, counted from the last time."""
        longest = self.step_s() + min(self.backlog_s(now), self.steps.prefill_s(STEP_TOKENS))
        if self.decoding or not self.prefills:
            return longest
        return min(flight.forecast.ttft_s for flight in self.prefills.values())

    def forecast(self, num_tokens: int, cached: Cached, now: float) -> Forecast:
        """What a prompt of so many tokens would meet here."""
        before = cached.known
        prefill = self.steps.prefill_s(num_tokens - before, before)
        loading = self.steps.loading_s(cached.slower)
        backlog = self.backlog_s(now)
        step = self.step_s()
        ttft = self.steps.first_token_s(backlog + prefill, step) + loading
        decoding = self.decoding + self.elsewhere.decoding
        return Forecast(backlog, prefill, step, ttft, self.busy(now), decoding, loading)


class Cached(NamedTuple):
    """Of a prompt's tokens, how many a replica has at hand, and how many more on slower tiers.

    `blocks`: how many of the prompt's keys these are, on whatever tier.
    """

    tokens: int = 0
    slower: int = 0
    blocks: int = 0

    @property
    def known(self) -> int:
        """Tokens on whatever tier: what the engine need not compute, and reports as cached."""
        return self.tokens + self.slower


NOTHING_CACHED = Cached()


class Forecast(NamedTuple):
    """Seconds: of prefill ahead of a request, of its own prefill, of a step there, until its first token.

    `busy`: the share of time that goes into prefill there, below 1. `decoding`: streams there. `loading_s`:
    seconds to load what it has on slower tiers; only the request waits for that, others go on meanwhile.
    """

    backlog_s: float
    prefill_s: float
    step_s: float
    ttft_s: float
    busy: float
    decoding: int
    loading_s: float = 0.0

    @property
    def pace_s(self) -> float:
        """Seconds between two tokens of a stream there, what is prefilled meanwhile included."""
        return self.step_s / (1 - self.busy)


@dataclass(frozen=True, slots=True)
class View:
    """What a policy may know of the fleet and of the request.

    `replicas`: the ready replicas of the request's model, in order of their ids. `turn`: how many placements
    went before. `draw`: 64 random bits. `key`: 64 bits that are the same for requests that belong together
    (router/affinity.py); None if nothing tells, or if the policy does not ask. `now`: seconds, on the clock
    of the Fleet's verbs. `num_tokens`: the prompt's, 0 where it is not known. `cached`: what each replica, by
    its id, has of the prompt; those that have nothing are left out.
    """

    replicas: tuple[Standing, ...]
    turn: int = 0
    draw: int = 0
    key: int | None = None
    now: float = 0.0
    num_tokens: int = 0
    cached: Mapping[str, Cached] = field(default_factory=dict)

    def without(self, tried: frozenset[str]) -> View:
        """The same view less the replicas that this request already failed on."""
        if not tried:
            return self
        return replace(self, replicas=tuple(s for s in self.replicas if s.id not in tried))


@dataclass(slots=True)
class Flight:
    """One request at one replica, from `started` to `finished`.

    `cached` and `forecast`: what was predicted. `expected`: keys of the blocks that it brings, until events
    confirm them; `known_by`: as in Standing when it started. `confirmed`: events had told all of `cached`,
    nothing of it was only promised. `history`: keys to remember if no events tell.
    `prefilled_s`: what the replica had prefilled when this one's first token came. `silent`: nothing is seen
    of it before its end; it counts as prefilled when it should be.
    """

    standing: Standing
    started_at: float
    num_tokens: int
    cached: Cached
    forecast: Forecast
    expected: Keys = field(default_factory=list)
    known_by: int = 0
    confirmed: bool = True
    history: Keys = field(default_factory=list)
    prefilled_s: float = 0.0
    silent: bool = False
    first_token_at: float | None = None


def _overfull(own: tuple[Standing, ...], every: tuple[Standing, ...]) -> bool:
    """Whether a replica of a share has on average over SPILL times what one of all has."""
    most = SPILL * (sum([s.requests for s in every]) + 1) / len(every)
    return sum([s.requests for s in own]) / len(own) > most


@dataclass(slots=True)
class Fleet:
    """Every replica of every model. Single-threaded: only the router's event loop writes it."""

    index: KVIndex = field(default_factory=KVIndex)
    _standings: dict[str, Standing] = field(default_factory=dict)
    _bases: dict[str, str] = field(default_factory=dict)
    _tallies: defaultdict[str, Tally] = field(default_factory=lambda: defaultdict(Tally))
    _ready: dict[str, tuple[tuple[Standing, ...], tuple[Standing, ...]]] = field(default_factory=dict)
    _share: frozenset[str] | None = None
    _turns: int = 0
    _faded_at: float = 0.0

    # -- replicas come, go, fail

    def joined(self, replica: Replica, now: float, state: State = State.READY) -> None:
        """A replica is there; one already known by its id keeps its standing."""
        self._bases.update(dict.fromkeys(replica.adapters, replica.models[0]))
        known = self._standings.get(replica.id)
        if known is None:
            steps = StepModel.of(replica.engine)
            tally = self._tallies[replica.models[0]]
            bit = self.index.join()
            self._standings[replica.id] = Standing(replica, steps, tally, bit, state, since=now)
        else:
            known.replica = replica
        self._ready.clear()

    def leaving(self, replica_id: str, now: float) -> Standing | None:
        """The replica gets nothing more, whatever comes of it. Its standing, if it ever served."""
        standing = self._standings.get(replica_id)
        if standing is not None:
            self._move(standing, State.LEAVING, now)
        return standing

    def left(self, replica_id: str) -> None:
        """A replica is gone from the fleet; its requests in flight finish by themselves."""
        standing = self._standings.pop(replica_id, None)
        if standing is not None:
            self.index.leave(standing.bit)
            standing.bit = 0
        self._ready.clear()

    def failed(self, replica_id: str, now: float) -> bool:
        """No connection to the replica: it gets nothing more until it recovers. True if that is news."""
        standing = self._standings.get(replica_id)
        if standing is None or not self._move(standing, State.DOWN, now):
            return False
        standing.failures += 1
        return True

    def suspected(self, replica_id: str, now: float) -> bool:
        """Something is odd about the replica: others come first. True if that is news."""
        standing = self._standings.get(replica_id)
        ready = standing is not None and standing.state is State.READY
        return standing is not None and ready and self._move(standing, State.SUSPECT, now)

    def recovered(self, replica_id: str, now: float) -> bool:
        """The replica answered a probe. True if it had been down or suspect."""
        standing = self._standings.get(replica_id)
        return standing is not None and self._move(standing, State.READY, now)

    # -- what replicas hold

    def trusted(
        self, replica_id: str, trust: Trust, reason: str, key_blocks: int, takes_ids: bool = False
    ) -> None:
        """How well the replica's cache is known from now on; `key_blocks` and `takes_ids` as in Standing."""
        standing = self._standings[replica_id]
        standing.trust, standing.trust_reason = trust, reason
        standing.key_blocks, standing.takes_ids = key_blocks, takes_ids
        standing.judged = True

    def apply(self, replica_id: str, event: KVEvent) -> Keys:
        """What a replica's cache gained or lost. Returns the keys of the blocks that are on no tier now."""
        standing = self._standings.get(replica_id)
        if standing is None or not self.knows(replica_id):
            return []
        if isinstance(event, AllBlocksCleared):
            standing.bit = self.index.forget(standing.bit)
            return []
        return self.index.apply(standing.bit, event)

    def forget(self, replica_id: str) -> None:
        """Events were lost: what the replica holds is to be learnt anew."""
        standing = self._standings.get(replica_id)
        if standing is not None:
            standing.bit = self.index.forget(standing.bit)

    def divided(self, share: frozenset[str]) -> None:
        """From now on this router knows the caches of these replicas only, and places requests there."""
        for replica_id in self._standings.keys() - share:
            self.forget(replica_id)
            self.trusted(replica_id, Trust.LOAD, "another router is to know its cache", 0)
        self._share = share
        self._ready.clear()

    def knows(self, replica_id: str) -> bool:
        """Whether this router is to know what the replica caches."""
        return self._share is None or replica_id in self._share

    def is_hybrid(self, replica_id: str) -> bool:
        """Whether its events tell of several groups of KV cache: a prefix needs a block of each."""
        standing = self._standings.get(replica_id)
        return standing is not None and len(self.index.source(standing.bit).groups) > 1

    def unkeyed(self, replica_id: str) -> int:
        """How many blocks of its events the index could not take in since it was last forgotten."""
        standing = self._standings.get(replica_id)
        if standing is None:
            return 0
        source = self.index.source(standing.bit)
        return source.orphans + source.unkeyed

    # -- requests

    def started(
        self,
        replica_id: str,
        now: float,
        prompt: Prompt | None = None,
        cached: Cached = NOTHING_CACHED,
        silent: bool = False,
    ) -> Flight:
        """A request was placed on the replica. Counted at once, so that the next placement sees it."""
        standing = self._standings[replica_id]
        self._settle(standing, now)
        num_tokens = prompt.num_tokens if prompt is not None else 0
        forecast = standing.forecast(num_tokens, cached, now)
        flight = Flight(standing, now, num_tokens, cached, forecast, silent=silent)
        if prompt is not None and standing.trust is not Trust.LOAD:
            keys, flight.known_by = prompt.keys(standing.key_blocks), standing.known_by
            # What is loaded will be at hand as well.
            at_hand = cached.blocks - cached.slower // (standing.key_blocks or TEXT_BLOCK_TOKENS)
            flight.expected = self.index.expect(flight.known_by, keys[at_hand:])
            last = keys[max(0, cached.blocks - 1) : cached.blocks]
            flight.confirmed = self.index.told(last, standing.bit) == len(last)
            flight.history = keys if standing.trust is Trust.APPROXIMATE else []
        if not standing.prefills:
            standing.head_since = now
        standing.prefills[id(flight)] = flight
        standing.prefill_s += flight.forecast.prefill_s
        standing.recent_s = standing._own_recent_s(now) + flight.forecast.prefill_s
        standing.recent_at = now
        standing.tally.placed += 1
        standing.tally.prefill_s += flight.forecast.prefill_s
        standing.in_flight += 1
        standing.streams += not silent
        standing.awaiting_first_token += 1
        self._turns += 1
        return flight

    def first_token(self, flight: Flight, now: float) -> None:
        """The first output of the request was seen; later calls change nothing."""
        if flight.first_token_at is not None:
            return
        if not flight.silent:
            forecast = flight.forecast
            prefill = forecast.backlog_s + forecast.prefill_s
            observed = now - flight.started_at
            steps = flight.standing.steps
            steps.observe_first_token(forecast.ttft_s, prefill, observed, forecast.loading_s)
        self._decodes(flight, now)

    def _settle(self, standing: Standing, now: float) -> None:
        """Those at the head of the line that say nothing go on when they should be prefilled."""
        while standing.prefills:
            head = next(iter(standing.prefills.values()))
            due = head.started_at + head.forecast.ttft_s
            if not head.silent or now < due:
                return
            self._decodes(head, due)

    def _decodes(self, flight: Flight, now: float) -> None:
        """The request is prefilled, and the engine generates."""
        standing, forecast = flight.standing, flight.forecast
        flight.first_token_at = now
        self._prefilled(flight, now)
        standing.prefilled_s += forecast.prefill_s
        flight.prefilled_s = standing.prefilled_s
        standing.decoding += 1
        standing.context += flight.num_tokens
        if flight.history and standing.bit:
            self.index.remember(standing.bit, flight.history, standing.capacity)

    def finished(self, flight: Flight, now: float, output_tokens: int = 0) -> None:
        """The request is over at this replica, however it ended."""
        standing = flight.standing
        if flight.first_token_at is None:
            self._prefilled(flight, now)
        else:
            # Had the replica not prefilled for others meanwhile, decoding would have taken so long. Of other
            # routers it is known how much of its time they took lately.
            elsewhere = min(MOST_BUSY, standing.elsewhere.recent_s / RECENT_S)
            decoding_s = (now - flight.first_token_at) * (1 - elsewhere)
            decoding_s -= standing.prefilled_s - flight.prefilled_s
            if not flight.silent:
                standing.steps.observe_stream(output_tokens - 1, standing.step_s(), decoding_s)
            standing.decoding -= 1
            standing.context -= flight.num_tokens
        if flight.expected:
            self.index.withdraw(flight.known_by, flight.expected)
        standing.in_flight -= 1
        standing.streams -= not flight.silent
        standing.finished += 1
        if output_tokens:
            standing.tally.ended += 1
            standing.tally.output += output_tokens

    def _prefilled(self, flight: Flight, now: float) -> None:
        """The request waits for no first token any more; the next one is at the head of the line."""
        standing = flight.standing
        standing.awaiting_first_token -= 1
        del standing.prefills[id(flight)]
        standing.prefill_s -= flight.forecast.prefill_s
        if not standing.prefills:
            standing.prefill_s = 0.0  # what is left is rounding
        standing.head_since = now

    # -- what several routers tell each other

    def loads(self, now: float) -> dict[str, Load]:
        """What this router has or had lately at each replica, by its id; the others are left out."""
        told = {id: s.own_load(now) for id, s in self._standings.items() if s.in_flight or s.recent_s}
        return {id: load for id, load in told.items() if load.in_flight or load.recent_s > LEAST_RECENT_S}

    def elsewhere(self, replica_id: str, load: Load) -> None:
        """What the other routers have at the replica, all together."""
        standing = self._standings.get(replica_id)
        if standing is not None:
            standing.elsewhere = load

    # -- what policies see

    def view(
        self,
        model: str,
        draw: int = 0,
        key: int | None = None,
        now: float = 0.0,
        prompt: Prompt | None = None,
    ) -> View:
        """What a policy may know to place a request for this model."""
        if now - self._faded_at > FADE_EVERY_S:
            self._fade(now)
        ready = self._offered(model)
        for standing in ready:
            self._settle(standing, now)
        if prompt is None:
            return View(ready, self._turns, draw, key, now)
        return View(ready, self._turns, draw, key, now, prompt.num_tokens, self._cached(ready, prompt))

    def _fade(self, now: float) -> None:
        """What was learnt of each replica's steps fades into what is common among its kin."""
        kin = defaultdict[tuple[str, tuple[str, ...]], list[StepModel]](list)
        for standing in self._standings.values():
            kin[standing.replica.engine, standing.replica.models].append(standing.steps)
        for alike in kin.values():
            fade(alike, now - self._faded_at)
        self._faded_at = now

    def _offered(self, model: str) -> tuple[Standing, ...]:
        """The model's ready replicas; of a share only those in it, unless they have too much to do."""
        found = self._ready.get(model)
        if found is None:
            every = next((some for state in OFFERED if (some := self._serving(model, state))), ())
            own = tuple(s for s in every if self.knows(s.id))
            found = self._ready[model] = (own, every)
        own, every = found
        return own if len(own) == len(every) or (own and not _overfull(own, every)) else every

    def _serving(self, model: str, state: State) -> tuple[Standing, ...]:
        return tuple(s for s in self if s.state is state and model in s.replica.models)

    def _cached(self, ready: tuple[Standing, ...], prompt: Prompt) -> dict[str, Cached]:
        found: dict[str, Cached] = {}
        known: dict[int, dict[int, str]] = {}
        for standing in ready:
            if standing.trust is not Trust.LOAD:
                known.setdefault(standing.key_blocks, {})[standing.known_by] = standing.id
        for size, ids in known.items():
            tokens = size or TEXT_BLOCK_TOKENS
            for held in self.index.match(prompt.keys(size), sum(ids)):
                cached = Cached(held.blocks * tokens, held.slower * tokens, held.blocks + held.slower)
                for bit in bits_of(held.bits):
                    found[ids[bit]] = cached
        return found

    def models(self) -> tuple[str, ...]:
        """Every model that some replica serves, ready or not."""
        return tuple(sorted({m for s in self._standings.values() for m in s.replica.models}))

    def of_model(self, model: str) -> list[Standing]:
        """Every replica that serves it, in order of their ids."""
        return [standing for standing in self if model in standing.replica.models]

    def base(self, model: str) -> str:
        """The model that an adapter belongs to, even when no replica of it is there any more; else itself."""
        return self._bases.get(model, model)

    def tally(self, model: str) -> Tally:
        """What was counted of all that ever served it as their first model."""
        return self._tallies[model]

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
