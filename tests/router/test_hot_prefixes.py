"""Which prefixes are worth replaying: tables, and properties over any mixture of prompts."""

from __future__ import annotations

from array import array
from collections import Counter
from math import exp

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.blocks import block_keys
from router.core.hot_prefixes import FADE_S, HotPrefixes

SIZE = 4


def ids(*chunks: int) -> bytes:
    """A prompt of chunks of eight equal tokens, which are two blocks."""
    return array("I", [chunk for chunk in chunks for _ in range(8)]).tobytes()


def seen(*prompts: bytes, max_bytes: int = 1 << 20, at: float = 0.0) -> HotPrefixes:
    hot = HotPrefixes(max_bytes, chunk_tokens=8)
    for prompt in prompts:
        hot.saw(block_keys(prompt, SIZE), prompt, SIZE, at, "model")
    return hot


def key(*chunks: int) -> int:
    return block_keys(ids(*chunks), SIZE)[-1]


def everything(key: int) -> bool:
    return True


def told(hot: HotPrefixes, budget_tokens: int = 10_000, wanted=everything, **rest: float) -> list[bytes]:
    return [prefix.token_ids for prefix in hot.hottest(0.0, budget_tokens, wanted, **rest)]


def test_what_is_used_most_goes_first_and_is_gone_on_with_where_that_is_used_too():
    hot = seen(ids(1, 2), ids(1, 3), ids(1, 3), ids(7))
    assert told(hot) == [ids(1, 3), ids(1, 2), ids(7)]
    assert [prefix.new_tokens for prefix in hot.hottest(0.0, 10_000, everything)] == [16, 8, 8]
    assert told(hot, budget_tokens=8) == [ids(1)]
    assert told(hot, budget_tokens=16) == [ids(1, 3)]
    assert told(hot, least=2) == [ids(1, 3)]


def test_what_is_held_costs_nothing_and_is_worth_nothing():
    hot = seen(ids(1, 2), ids(1, 3), ids(1, 3), ids(7, 8))
    held = {key(1), key(1, 3)}
    assert told(hot, 8, lambda key: key not in held) == [ids(1, 2)]
    assert told(hot, 99, lambda wanted: wanted == key(7, 8)) == [ids(7, 8)]
    assert told(hot, 99, lambda key: False) == []


def test_a_conversation_takes_the_place_of_its_beginning():
    hot = seen(ids(1), ids(1, 2), ids(1, 2, 3), ids(9), ids(9), ids(9))
    assert len(hot) == 2
    assert told(hot, least=2.5) == [ids(1), ids(9)]
    assert told(hot) == [ids(1, 2, 3), ids(9)]
    assert [prefix.uses for prefix in hot.hottest(0.0, 99, everything)] == [1.0, 3.0]


def test_what_is_long_ago_counts_for_less():
    hot = HotPrefixes(chunk_tokens=8)
    for at, prompt in ((0.0, ids(1)), (0.0, ids(1)), (2 * FADE_S, ids(2))):
        hot.saw(block_keys(prompt, SIZE), prompt, SIZE, at)
    new, old = hot.hottest(2 * FADE_S, 99, everything)
    assert (new.token_ids, old.token_ids) == (ids(2), ids(1))
    assert (new.uses, old.uses) == (1.0, pytest.approx(2 * exp(-2)))


def test_what_could_not_be_replayed_is_not_kept():
    hot = HotPrefixes(chunk_tokens=8)
    hot.saw([1, 2, 3], None, SIZE, 0.0)
    hot.saw([1, 2, 3], b"", 0, 0.0)
    hot.saw(block_keys(ids(1)[:-4], SIZE), ids(1)[:-4], SIZE, 0.0)  # no whole chunk
    assert (len(hot), hot.nbytes, hot.hottest(0.0, 99, everything)) == (0, 0, [])


def test_blocks_larger_than_a_chunk_are_chunks_by_themselves():
    hot = HotPrefixes(chunk_tokens=1)
    hot.saw(block_keys(ids(1, 2), SIZE), ids(1, 2), SIZE, 0.0, ("model", "salt"))
    (prefix,) = hot.hottest(0.0, 12, everything)
    assert (prefix.token_ids, prefix.new_tokens) == (ids(1, 2)[:48], 12)
    assert prefix.origin == ("model", "salt")


def test_the_least_recently_used_go_when_there_is_no_room():
    one = seen(ids(0)).nbytes
    hot = seen(*(ids(n) for n in range(10)), ids(7), max_bytes=3 * one)
    assert hot.nbytes == 3 * one
    assert sorted(told(hot)) == sorted([ids(7), ids(8), ids(9)])


prompts = st.lists(st.lists(st.integers(1, 3), min_size=1, max_size=5), max_size=25)


@given(prompts, st.integers(0, 200), st.sets(st.integers(0, 4)), st.integers(1_000, 30_000))
def test_whatever_was_seen_the_best_that_the_budget_buys_is_told_once(courses, budget, unwanted, max_bytes):
    """No chunk that is not told is of more uses than one that is, and all is a prefix of what was seen."""
    hot = seen(*(ids(*course) for course in courses), max_bytes=max_bytes)
    assert hot.nbytes <= max_bytes
    uses = Counter(tuple(course[: n + 1]) for course in courses for n in range(len(course)))
    by_key = {key(*chunks): chunks for chunks in uses}

    def wanted(key: int) -> bool:
        return len(by_key[key]) not in unwanted

    found = hot.hottest(0.0, budget, wanted)
    covered: set[tuple[int, ...]] = set()
    for prefix in found:
        chunks = tuple(array("I", prefix.token_ids)[::8])
        assert ids(*chunks) == prefix.token_ids and chunks in uses
        new = {chunks[: n + 1] for n in range(len(chunks)) if n + 1 not in unwanted} - covered
        assert prefix.new_tokens <= 8 * len(new)
        covered |= new
    bought = sum(prefix.new_tokens for prefix in found)
    assert bought <= budget
    if max_bytes > 25_000:  # nothing was forgotten
        worth = sorted((count for chunks, count in uses.items() if len(chunks) not in unwanted), reverse=True)
        assert bought == 8 * min(budget // 8, len(worth))
        assert bought == 0 or min(prefix.uses for prefix in found) == worth[bought // 8 - 1]


def test_what_comes_while_somebody_asks_does_not_disturb_the_answer():
    """`hottest` runs in a thread beside `saw`."""
    hot = seen(ids(1, 2))
    records = list(hot._records.values())
    hot.saw(block_keys(ids(1, 2, 3), SIZE), ids(1, 2, 3), SIZE, 0.0, "model")
    assert hot._uses(records, 0.0)[0] == {key(1): 1.0, key(1, 2): 1.0}
