"""How far the router trusts what it knows of one replica's cache: evidence in, a verdict out.

EXACT is earned by canaries and lost by one contradiction. Every doubt stands with a reason in words until
canaries dispel it. A limit, what only another engine could change, stands until the engine is described anew.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import takewhile
from math import inf
from typing import NamedTuple

from router.core.blocks import Keys
from router.core.fleet import Replica, Trust


class Doubt(StrEnum):
    """Why a replica is not EXACT, gravest first; as metrics name the reasons."""

    NO_TEXT = "no_text_prompts"
    NO_CACHE = "no_prefix_caching"
    HISTORY_WRONG = "history_wrong"
    TOKENS_DIFFER = "tokens_differ"
    BLOCKS_DIFFER = "blocks_differ"
    MISPREDICTED = "mispredicted"
    EVENTS_LOST = "events_lost"
    NO_TOKENIZER = "no_tokenizer"
    NO_TOKENIZE = "no_tokenize"
    NO_BLOCK_SIZE = "no_block_size"
    NO_EVENTS = "no_events"
    RANKS = "data_parallel"
    HYBRID = "hybrid_cache"
    UNPROVEN = "unproven"


# With these the router knows nothing that is worth knowing; with the others, what it sent there.
TO_LOAD = frozenset({Doubt.NO_TEXT, Doubt.NO_CACHE, Doubt.HISTORY_WRONG})
# What a canary can dispel.
CURABLE = frozenset(
    {
        Doubt.HISTORY_WRONG,
        Doubt.TOKENS_DIFFER,
        Doubt.BLOCKS_DIFFER,
        Doubt.MISPREDICTED,
        Doubt.EVENTS_LOST,
        Doubt.UNPROVEN,
    }
)
# What says nothing against the router's tokens: they may be sent along in spite of it.
OF_CACHE = frozenset(
    {
        Doubt.NO_CACHE,
        Doubt.HISTORY_WRONG,
        Doubt.EVENTS_LOST,
        Doubt.NO_BLOCK_SIZE,
        Doubt.NO_EVENTS,
        Doubt.RANKS,
        Doubt.HYBRID,
    }
)

# Clean canaries in a row that bring trust back after it was lost; a newcomer needs one.
CONFIRMATIONS = 3
# Seconds until the next canary after a demotion; twice as many for each that failed and each demotion before.
RETRY_S, LONGEST_RETRY_S = 1.0, 60.0
# Right predictions in a row of which the earlier demotions are forgiven.
FORGIVEN = 1000
PROVEN = "its tokens, its events and what it reports agree with the router"
NO_CANARY = "no canary has passed yet"
UNVERIFIED = "its tokens and its events agree with the router; it does not report cached tokens"


def trust_with(gravest: Doubt | None) -> Trust:
    """How far trust goes with such a doubt."""
    if gravest is None:
        return Trust.EXACT
    return Trust.LOAD if gravest in TO_LOAD else Trust.APPROXIMATE


class Verdict(NamedTuple):
    """How well a replica's cache is known, and why not better.

    `key_blocks`: as in Standing. `takes_ids`: the router's token ids may be sent to it. `kind`: the gravest
    doubt.
    """

    trust: Trust
    reason: str
    key_blocks: int
    takes_ids: bool
    kind: Doubt | None


class Cause(StrEnum):
    """Why the engine found more or less of a prompt cached than predicted.

    EVICTED: it went between placement and admission. UNCONFIRMED: the request that was to bring it had not.
    LATE: it came in that time. UNLEARNT: it was there before the router heard the engine's events.
    HISTORY: the prediction was made of what had been sent there.
    """

    EVICTED = "evicted"
    UNCONFIRMED = "unconfirmed"
    LATE = "late"
    UNLEARNT = "unlearnt"
    HISTORY = "history"
    UNEXPLAINED = "unexplained"


class Response(NamedTuple):
    """How much of a prompt was predicted to be cached, and how much its engine reported, in tokens.

    `keys`: of the prompt. `placed_at`: seconds. `confirmed`: events had told all that was predicted. `held`:
    what the index tells of the prompt now, after the response, when its events have come.
    """

    predicted: int
    reported: int
    keys: Keys = []
    placed_at: float = 0.0
    confirmed: bool = True
    held: int = 0


class Bucket(NamedTuple):
    """A sequential test: a wrong prediction pours, a right one drains; full, it is no chance any more.

    It is a CUSUM: pour and drain are the log likelihood ratios of two rates of wrong predictions.
    """

    pour: int
    drain: int
    full: int


# Tells 1 % of unexplained misses from 30 %: ln(0.3/0.01) to ln(0.99/0.7) is 10 to 1. Five in a row fill it;
# at 30 % it takes 22 predictions, at 1 % e^17.
EXACTLY = Bucket(10, 1, 50)
# By history: no engine owes it anything, so it is given up only where four of five predictions are wrong.
BY_HISTORY = Bucket(1, 4, 20)
# Two windows of counters in a row that are off fill it.
BY_COUNTERS = Bucket(25, 50, 50)

# An engine that reports nothing is judged by counters once so many requests went there.
WINDOW = 16
# How far its hit rate may be off, and what else has to be nearly nothing meanwhile.
RATE_TOLERANCE, LITTLE = 0.25, 0.1


class Window(NamedTuple):
    """A stretch of requests at an engine that reports nothing, in tokens: predicted and prompts by us, hits
    and queries by the engine's counters; removed by its events.
    """

    requests: int
    predicted: int
    prompts: int
    hits: int
    queries: int
    removed: int

    @property
    def telling(self) -> bool:
        """The counters speak of our requests, and nothing was evicted that we counted on."""
        ours = abs(self.queries - self.prompts) <= LITTLE * self.queries
        return self.requests >= WINDOW and ours and self.removed <= LITTLE * self.prompts


class Departures:
    """The last blocks that left a replica's cache, at least SIZE of them, with when they did."""

    SIZE = 4096

    def __init__(self) -> None:
        self._left: deque[tuple[float, Keys]] = deque()
        self._count = 0
        self._forgotten = -inf  # when the last one left that is not here any more

    def note(self, keys: Keys, now: float) -> None:
        """These blocks left."""
        self._left.append((now, keys))
        self._count += len(keys)
        while self._count - len(self._left[0][1]) >= self.SIZE:
            self._forgotten, dropped = self._left.popleft()
            self._count -= len(dropped)

    def since(self, key: int, then: float) -> bool:
        """Whether the block left at or after that time; yes if so many left since that nobody knows."""
        lately = takewhile(lambda left: left[0] >= then, reversed(self._left))
        return self._forgotten >= then or any(key in keys for _, keys in lately)


@dataclass(slots=True)
class Record:
    """All that speaks for and against one replica.

    `block_size`: tokens, 0 where its keys are of text. `complete`: the index has all that its events told
    since its start. `reports`: it says how much was cached; None until it answered. `doubts`: how many that
    canaries can dispel there were so far.
    """

    block_size: int = 0
    complete: bool = True
    reports: bool | None = None
    doubts: int = 0
    departures: Departures = field(default_factory=Departures)
    _doubts: dict[Doubt, str] = field(default_factory=lambda: {Doubt.UNPROVEN: NO_CANARY})
    _setbacks: int = 0
    _failures: int = 0
    _clean: int = 0
    _needed: int = 1
    _suspicion: int = 0
    _right: int = 0

    def described(self, replica: Replica, no_tokenizer: str | None = None) -> None:
        """An engine said what it is, at its start or after a restart: all is to be proven anew.

        `no_tokenizer`: why the router has no tokenizer for it, in words.
        """
        self.doubts += 1
        self._doubts = _limits(replica, no_tokenizer)
        self._doubts[Doubt.UNPROVEN] = NO_CANARY
        self.block_size = 0 if no_tokenizer else replica.block_size or 0
        self.reports = None
        self._clean = self._failures = self._suspicion = 0
        self._needed = 1

    @property
    def verdict(self) -> Verdict:
        """The sum of it."""
        standing = [doubt for doubt in Doubt if doubt in self._doubts]
        gravest = standing[0] if standing else None
        reason = "; ".join(self._doubts[doubt] for doubt in standing)
        if gravest is None:
            reason = UNVERIFIED if self.reports is False else PROVEN
        takes_ids = OF_CACHE.issuperset(standing)
        return Verdict(trust_with(gravest), reason, self.block_size, takes_ids, gravest)

    @property
    def retry_s(self) -> float | None:
        """Seconds until the next canary; None if none can change anything."""
        if CURABLE.isdisjoint(self._doubts):
            return None
        setbacks = self._setbacks + self._failures
        if not setbacks and self._needed == 1:
            return 0.0
        return min(LONGEST_RETRY_S, RETRY_S * 2.0 ** min(max(setbacks - 1, 0), 30))

    @property
    def limited(self) -> bool:
        """No canary could make it EXACT, so none has to look at its events."""
        return not CURABLE.issuperset(self._doubts)

    def doubt(self, kind: Doubt, reason: str) -> None:
        """Something contradicts the trust."""
        if kind not in CURABLE:
            self._doubts[kind] = reason
            return
        if CURABLE.isdisjoint(self._doubts):
            self._setbacks += 1
        if kind is not Doubt.UNPROVEN:
            self._needed = CONFIRMATIONS
            self._doubts.pop(Doubt.UNPROVEN, None)  # it says less
        if kind is Doubt.EVENTS_LOST:
            self.complete = False
        self.doubts += 1
        self._doubts[kind] = reason
        self._clean = self._suspicion = self._right = 0

    def canary_failed(self, kind: Doubt, reason: str) -> None:
        """A canary found something that does not fit, or (UNPROVEN) could not be completed."""
        self._failures += 1
        self.doubt(kind, reason)

    def canary_passed(self) -> None:
        """All that a canary compares was equal."""
        self._failures = 0
        self._clean += 1
        if self._clean >= self._needed:
            self._doubts = {kind: reason for kind, reason in self._doubts.items() if kind not in CURABLE}
            self._suspicion = 0

    def judge(self, response: Response) -> Cause | None:
        """Why a prediction missed; None if it was right. Persistent misses without a reason end the trust."""
        if not self._doubts:
            return self._judge_exactly(response)
        if 2 * response.reported >= response.predicted:
            self._pour(BY_HISTORY, False)
            return None
        if TO_LOAD.isdisjoint(self._doubts) and self._pour(BY_HISTORY, True):
            self.doubt(Doubt.HISTORY_WRONG, "its engine found little cached of what had been sent there")
        return Cause.HISTORY

    def counted(self, window: Window) -> None:
        """A stretch of requests that were not reported, by the engine's counters."""
        if self._doubts or not window.telling:
            return
        expected, found = window.predicted / window.prompts, window.hits / window.queries
        if self._pour(BY_COUNTERS, abs(expected - found) > RATE_TOLERANCE):
            self.doubt(
                Doubt.MISPREDICTED,
                f"its counters tell {found:.0%} of prompt tokens cached, {expected:.0%} were predicted",
            )

    def _judge_exactly(self, response: Response) -> Cause | None:
        predicted, reported = response.predicted, response.reported
        cause = self._explained(response) if abs(predicted - reported) > self.block_size else None
        if max(predicted, reported) <= self.block_size or cause not in (None, Cause.UNEXPLAINED):
            return cause  # that nothing is cached proves nothing, nor does what has another reason
        if self._pour(EXACTLY, cause is not None):
            self.doubt(
                Doubt.MISPREDICTED,
                f"too many predictions were wrong; the last: {predicted} tokens cached, reported {reported}",
            )
        return cause

    def _explained(self, response: Response) -> Cause:
        if response.reported < response.predicted:
            if self._left(response, response.reported):
                return Cause.EVICTED
            return Cause.UNEXPLAINED if response.confirmed else Cause.UNCONFIRMED
        if response.held + self.block_size >= response.reported or self._left(response, response.held):
            return Cause.LATE
        return Cause.UNEXPLAINED if self.complete else Cause.UNLEARNT

    def _left(self, response: Response, tokens: int) -> bool:
        """Whether the block behind so many tokens of the prompt left the cache since the placement."""
        key = response.keys[tokens // self.block_size : tokens // self.block_size + 1]
        return bool(key) and self.departures.since(key[0], response.placed_at)

    def _pour(self, bucket: Bucket, wrong: bool) -> bool:
        """Counts one prediction; True if the bucket is full."""
        self._suspicion = max(0, self._suspicion + (bucket.pour if wrong else -bucket.drain))
        self._right = 0 if wrong else self._right + 1
        if self._right >= FORGIVEN:
            self._setbacks = 0
        return self._suspicion >= bucket.full


def _limits(replica: Replica, no_tokenizer: str | None) -> dict[Doubt, str]:
    """What only another engine could change, as far as its description tells."""
    found: dict[Doubt, str] = {}
    if not replica.prefix_caching:
        found[Doubt.NO_CACHE] = "its engine runs without prefix caching"
    if no_tokenizer:
        found[Doubt.NO_TOKENIZER] = no_tokenizer
    if not replica.block_size:
        found[Doubt.NO_BLOCK_SIZE] = "its engine does not tell its KV block size"
    if replica.kv_events is None:
        found[Doubt.NO_EVENTS] = "its engine publishes no KV events"
    if replica.ranks > 1:
        found[Doubt.RANKS] = f"its engine keeps {replica.ranks} caches, one for each data-parallel rank"
    return found
