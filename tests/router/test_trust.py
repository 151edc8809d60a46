"""Verdicts by the evidence, and the sequential test on caches that are healthy and on such that are not."""

from __future__ import annotations

from collections import deque
from itertools import islice
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.core.blocks import block_keys
from router.core.fleet import Replica, Trust
from router.core.trust import (
    CONFIRMATIONS,
    CURABLE,
    LONGEST_RETRY_S,
    RETRY_S,
    Cause,
    Departures,
    Doubt,
    Record,
    Response,
    Window,
)
from workers.simulated.kv_cache import KVCache, Removed, Stored

BLOCK = 16
UNEXPLAINED, RIGHT, NOTHING = Response(64, 0), Response(64, 64), Response(0, 0)
WHOLE = Replica("r", "http://r", ("m",), block_size=BLOCK, kv_events="tcp://r:1")


def record(replica=WHOLE, no_tokenizer=None):
    it = Record()
    it.described(replica, no_tokenizer)
    return it


def exact():
    it = record()
    it.canary_passed()
    assert it.verdict.trust is Trust.EXACT
    return it


def replica(**differs):
    known = {"block_size": BLOCK, "kv_events": "tcp://r:1"}
    return Replica("r", "http://r", ("m",), **{**known, **differs})


def test_a_newcomer_is_known_by_what_is_sent_there_until_one_canary_passed():
    it = record()
    assert it.verdict == (Trust.APPROXIMATE, "no canary has passed yet", BLOCK, False, Doubt.UNPROVEN)
    assert it.retry_s == 0
    it.canary_passed()
    assert it.verdict[0] is Trust.EXACT
    assert it.verdict[2:] == (BLOCK, True, None)
    assert it.retry_s is None


@pytest.mark.parametrize(
    ("described", "no_tokenizer", "trust", "kind", "key_blocks", "takes_ids"),
    [
        (replica(kv_events=None), None, Trust.APPROXIMATE, Doubt.NO_EVENTS, BLOCK, True),
        (replica(ranks=2), None, Trust.APPROXIMATE, Doubt.RANKS, BLOCK, True),
        (replica(block_size=None), None, Trust.APPROXIMATE, Doubt.NO_BLOCK_SIZE, 0, True),
        (replica(), "no tokenizer.json", Trust.APPROXIMATE, Doubt.NO_TOKENIZER, 0, False),
        (replica(prefix_caching=False), None, Trust.LOAD, Doubt.NO_CACHE, BLOCK, True),
        (replica(prefix_caching=False, kv_events=None), None, Trust.LOAD, Doubt.NO_CACHE, BLOCK, True),
    ],
)
def test_what_an_engine_lacks_no_canary_brings(described, no_tokenizer, trust, kind, key_blocks, takes_ids):
    it = record(described, no_tokenizer)
    it.canary_passed()
    verdict = it.verdict
    assert (verdict.trust, verdict.kind, verdict.key_blocks) == (trust, kind, key_blocks)
    assert verdict.takes_ids is takes_ids
    assert verdict.reason
    assert it.retry_s is None
    assert it.limited


def test_reasons_are_told_gravest_first():
    it = record(replica(kv_events=None, prefix_caching=False))
    first, *others = it.verdict.reason.split("; ")
    assert first == "its engine runs without prefix caching"
    assert others == ["its engine publishes no KV events", "no canary has passed yet"]


@pytest.mark.parametrize("kind", sorted(CURABLE - {Doubt.UNPROVEN}))
def test_one_contradiction_ends_exactness_and_clean_canaries_in_a_row_bring_it_back(kind):
    it = exact()
    it.doubt(kind, "because")
    assert it.verdict.trust is (Trust.LOAD if kind is Doubt.HISTORY_WRONG else Trust.APPROXIMATE)
    assert (it.verdict.reason, it.verdict.kind) == ("because", kind)
    for _ in range(CONFIRMATIONS - 1):
        it.canary_passed()
        assert it.verdict.trust is not Trust.EXACT
    it.doubt(Doubt.TOKENS_DIFFER, "again")
    for _ in range(CONFIRMATIONS):
        assert it.verdict.trust is not Trust.EXACT
        it.canary_passed()
    assert it.verdict.trust is Trust.EXACT


@pytest.mark.parametrize("kind", sorted(Doubt))
def test_ids_go_only_where_nothing_is_known_against_the_tokens(kind):
    it = exact()
    it.doubt(kind, "because")
    against = {Doubt.TOKENS_DIFFER, Doubt.BLOCKS_DIFFER, Doubt.MISPREDICTED, Doubt.UNPROVEN}
    assert it.verdict.takes_ids is (
        kind not in against | {Doubt.NO_TEXT, Doubt.NO_TOKENIZER, Doubt.NO_TOKENIZE}
    )


def test_canaries_back_off_with_every_failure_and_every_demotion():
    it = exact()
    it.doubt(Doubt.TOKENS_DIFFER, "because")
    assert it.retry_s == RETRY_S
    waits = []
    for _ in range(12):
        it.canary_failed(Doubt.TOKENS_DIFFER, "still")
        waits.append(it.retry_s)
    assert waits[:3] == [2 * RETRY_S, 4 * RETRY_S, 8 * RETRY_S]
    assert waits[-1] == LONGEST_RETRY_S
    for _ in range(CONFIRMATIONS):
        it.canary_passed()
    it.doubt(Doubt.MISPREDICTED, "once more")
    assert it.retry_s == 2 * RETRY_S


OPS = st.one_of(
    st.just("pass"), st.just("describe"), st.sampled_from([*Doubt]), st.sampled_from([RIGHT, UNEXPLAINED])
)


@given(st.lists(OPS, max_size=40))
def test_whatever_happened_clean_canaries_bring_all_that_the_engine_allows(ops):
    it = record()
    clean = limited = False
    for op in ops:
        if op == "pass":
            it.canary_passed()
            clean = True
        elif op == "describe":
            it.described(WHOLE)
            clean = limited = False
        elif isinstance(op, Response):
            it.judge(op)
        else:
            it.doubt(op, "because")
            clean, limited = clean and op not in CURABLE, limited or op not in CURABLE
        assert it.verdict.trust is not Trust.EXACT or (clean and not limited)
    for _ in range(CONFIRMATIONS):
        it.canary_passed()
    assert (it.verdict.trust is Trust.EXACT) is not limited
    assert it.retry_s is None


def test_a_long_time_without_fault_forgives():
    it = exact()
    for _ in range(3):
        it.doubt(Doubt.MISPREDICTED, "because")
        for _ in range(CONFIRMATIONS):
            it.canary_passed()
    for _ in range(1000):
        it.judge(RIGHT)
    it.doubt(Doubt.MISPREDICTED, "because")
    assert it.retry_s == RETRY_S


def test_a_restarted_engine_is_a_newcomer():
    it = exact()
    it.doubt(Doubt.TOKENS_DIFFER, "because")
    it.described(replica(block_size=32))
    assert (it.verdict.kind, it.verdict.key_blocks) == (Doubt.UNPROVEN, 32)
    it.canary_passed()
    assert it.verdict.trust is Trust.EXACT


def test_after_lost_events_what_was_there_before_is_held_against_nobody():
    it = exact()
    it.doubt(Doubt.EVENTS_LOST, "three of its events are gone")
    for _ in range(CONFIRMATIONS):
        it.canary_passed()
    assert fed([Response(0, 64)] * 60, it) is None
    assert fed([UNEXPLAINED] * 9, it) == 5


def test_who_reports_nothing_is_called_unverified():
    it = exact()
    it.reports = False
    assert it.verdict.trust is Trust.EXACT
    assert "does not report" in it.verdict.reason


KEYS = [10, 11, 12, 13, 14]


@pytest.mark.parametrize(
    ("response", "left", "complete", "cause"),
    [
        (Response(64, 64, KEYS), [], True, None),
        (Response(64, 48, KEYS), [], True, None),
        (Response(48, 64, KEYS), [], True, None),
        (Response(64, 32, KEYS), [12], True, Cause.EVICTED),
        (Response(64, 32, KEYS), [13], True, Cause.UNEXPLAINED),
        (Response(64, 32, KEYS, placed_at=2.0), [12], True, Cause.UNEXPLAINED),
        (Response(64, 32, KEYS, confirmed=False), [], True, Cause.UNCONFIRMED),
        (Response(64, 32, KEYS, confirmed=False), [12], True, Cause.EVICTED),
        (Response(0, 64, KEYS, held=64), [], True, Cause.LATE),
        (Response(0, 64, KEYS, held=48), [], True, Cause.LATE),
        (Response(0, 64, KEYS, held=32), [12], True, Cause.LATE),
        (Response(0, 64, KEYS, held=32), [11], True, Cause.UNEXPLAINED),
        (Response(0, 64, KEYS), [], False, Cause.UNLEARNT),
        (Response(0, 64), [], True, Cause.UNEXPLAINED),
    ],
)
def test_a_miss_has_a_cause(response, left, complete, cause):
    it = exact()
    it.complete = complete
    it.departures.note(left, 1.0)
    assert it.judge(response) is cause


def test_departures_remember_the_last_ones():
    left = Departures()
    left.note([7, 8], 1.0)
    left.note([7], 3.0)
    assert left.since(7, 2.0)
    assert left.since(8, 1.0)
    assert not left.since(8, 1.5)
    assert not left.since(9, 0.5)
    left.note(range(100, 100 + Departures.SIZE), 4.0)
    assert left.since(9, 2.0)  # who knows
    assert not left.since(9, 5.0)


# -- the sequential test


EXPLAINED = {
    Cause.EVICTED: Response(64, 0, [1, 2, 3, 4]),
    Cause.UNCONFIRMED: Response(64, 0, confirmed=False),
    Cause.LATE: Response(0, 64, held=64),
}


def fed(responses, it=None):
    """How many predictions it took to lose EXACT; None if it did not."""
    it = it or exact()
    it.departures.note([1], 1.0)
    for number, response in enumerate(responses, 1):
        it.judge(response)
        if it.verdict.trust is not Trust.EXACT:
            assert it.verdict.kind is Doubt.MISPREDICTED
            return number
    return None


def drawn(seed, count, rate):
    random = Random(seed)
    return [UNEXPLAINED if random.random() < rate else RIGHT for _ in range(count)]


def test_five_unexplained_misses_in_a_row_are_enough():
    assert fed([UNEXPLAINED] * 9) == 5


@given(st.integers(0, 2**32), st.floats(0.5, 1.0))
def test_who_is_wrong_every_other_time_is_found_within_fifty(seed, rate):
    assert fed(drawn(seed, 50, rate)) is not None


@given(st.lists(st.sampled_from([*EXPLAINED]), max_size=200))
def test_what_has_an_explanation_is_held_against_nobody(causes):
    it = exact()
    it.departures.note([1], 1.0)
    assert [it.judge(EXPLAINED[cause]) for cause in causes] == causes
    assert it.verdict.trust is Trust.EXACT


@given(st.integers(0, 2**32))
@settings(max_examples=20)
def test_one_in_a_hundred_is_within_what_is_right(seed):
    assert fed(drawn(seed, 3000, 0.01)) is None


def test_that_nothing_is_cached_proves_nothing():
    assert fed([UNEXPLAINED, *[NOTHING] * 30] * 5) == 4 * 31 + 1


def test_history_that_is_never_true_is_given_up_and_comes_back():
    it = record(replica(kv_events=None))
    it.canary_passed()
    for _ in range(19):
        assert it.judge(UNEXPLAINED) is Cause.HISTORY
        assert it.verdict.trust is Trust.APPROXIMATE
    assert it.judge(UNEXPLAINED) is Cause.HISTORY
    assert (it.verdict.trust, it.verdict.kind) == (Trust.LOAD, Doubt.HISTORY_WRONG)
    assert it.verdict.takes_ids
    for _ in range(CONFIRMATIONS):
        it.canary_passed()
    assert it.verdict.trust is Trust.APPROXIMATE


def test_history_that_is_true_half_of_the_time_is_kept():
    it = record(replica(kv_events=None))
    for _ in range(100):
        assert it.judge(UNEXPLAINED) is Cause.HISTORY
        it.judge(RIGHT)
    assert it.verdict.trust is Trust.APPROXIMATE


def window(**differs):
    usual = {"requests": 16, "predicted": 500, "prompts": 1000, "hits": 480, "queries": 1000, "removed": 0}
    return Window(**{**usual, **differs})


def test_counters_speak_where_reports_do_not():
    it = exact()
    for _ in range(10):
        it.counted(window())
    it.counted(window(hits=0))
    assert it.verdict.trust is Trust.EXACT
    it.counted(window())
    for _ in range(2):
        it.counted(window(predicted=0))
    assert it.verdict.kind is Doubt.MISPREDICTED
    assert "48% of prompt tokens cached, 0% were predicted" in it.verdict.reason


@pytest.mark.parametrize("differs", [{"requests": 5}, {"queries": 4000}, {"queries": 400}, {"removed": 200}])
def test_counters_of_others_requests_and_under_pressure_say_nothing(differs):
    it = exact()
    for _ in range(10):
        it.counted(window(**{"hits": 0, **differs}))
    assert it.verdict.trust is Trust.EXACT


# -- a cache as an engine keeps it, an index as events tell it


class Engine:
    """vLLM's cache, and what a router makes of its events."""

    def __init__(self, blocks, *, template=0, block=BLOCK, lost=0.0, seed=0):
        self.cache, self.random = KVCache(blocks), Random(seed)
        self.template, self.block, self.lost = template, block, lost
        self.held, self.events = {}, deque()
        self.now, self.record = 0.0, exact()

    def round(self, prompts):
        """Requests at the same time: all placed, then all computed; judged when their events have come."""
        self.now += 1
        placed = [(tokens, self.match(keys(tokens, BLOCK)) * BLOCK) for tokens in prompts]
        reported = [self.serve(tokens) for tokens in prompts]
        self.hear()
        return [self.judge(*it, told) for it, told in zip(placed, reported, strict=True)]

    def judge(self, tokens, predicted, reported):
        expected = keys(tokens, BLOCK)
        held = self.match(expected) * BLOCK
        return self.record.judge(Response(predicted, reported, expected, self.now, held=held))

    def serve(self, tokens):
        """Cached tokens, as the engine would report them."""
        tokens = [self.template, *tokens] if self.template else tokens
        owner = Tokens(tokens, self.block)
        wanted = len(owner.keys)
        hits = self.cache.longest_prefix(owner.keys[: (len(tokens) - 1) // self.block])
        self.cache.share(hits)
        blocks = hits + self.cache.allocate(wanted - len(hits))
        if wanted > len(hits):
            self.cache.store(owner, blocks, len(hits), wanted - len(hits))
        self.cache.release(blocks)
        told = self.cache.take_events()
        self.events += [e for e in told if self.random.random() >= self.lost]
        return len(hits) * self.block

    def hear(self):
        """The router hears the events."""
        while self.events:
            match self.events.popleft():
                case Stored(owner=owner, first=first, count=count):
                    for key in owner.keys[first : first + count]:
                        self.held[key] = self.held.get(key, 0) + 1
                case Removed(key=key):
                    if self.held.get(key):
                        self.held[key] -= 1
                        self.record.departures.note([key], self.now)

    def match(self, expected):
        return next((n for n, key in enumerate(expected) if not self.held.get(key)), len(expected))


class Tokens:
    def __init__(self, tokens, block):
        self.keys = keys(tokens, block, last=True)

    def key(self, block):
        return self.keys[block]


def keys(tokens, block, last=False):
    tokens = tokens if last else tokens[:-1]
    return block_keys(b"".join(t.to_bytes(4, "little") for t in tokens), block)


def conversations(seed, count):
    """Prompts of so many requests: conversations that grow by a turn each, a dozen of them at a time."""
    random = Random(seed)
    begun = []
    for _ in range(count):
        if len(begun) < 6 or random.random() < 0.1:
            begun.append([random.randrange(1, 9999)] * 20)
        conversation = random.choice(begun[-12:])
        conversation += [random.randrange(1, 9999) for _ in range(random.randrange(10, 60))]
        yield list(conversation)
        if len(conversation) > 600:
            begun.remove(conversation)


@given(st.integers(0, 2**32), st.integers(60, 400), st.integers(1, 8))
@settings(max_examples=40)
def test_a_healthy_replica_under_cache_pressure_is_never_demoted(seed, blocks, at_once):
    engine = Engine(blocks)
    asked = conversations(seed, 160)
    while prompts := list(islice(asked, at_once)):
        assert Cause.UNEXPLAINED not in engine.round(prompts)
    assert engine.record.verdict.trust is Trust.EXACT


@pytest.mark.parametrize(
    "broken",
    [{"template": 5}, {"block": 2 * BLOCK}, {"block": BLOCK // 2}, {"lost": 1.0}, {"lost": 0.5}],
    ids=str,
)
@given(st.integers(0, 2**32), st.integers(400, 2000))
@settings(max_examples=15)
def test_a_broken_replica_is_demoted_within_fifty_requests(broken, seed, blocks):
    engine, asked = Engine(blocks, seed=seed), conversations(seed, 100)
    for tokens in islice(asked, 50):
        engine.round([tokens])
    for name, value in broken.items():
        setattr(engine, name, value)
    for tokens in asked:
        engine.round([tokens])
    assert engine.record.verdict.kind is Doubt.MISPREDICTED
