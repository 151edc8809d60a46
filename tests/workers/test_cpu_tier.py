"""The CPU tier of the simulated engine's cache."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.simulated.cpu_tier import CpuTier
from workers.simulated.kv_cache import CacheEvent, Removed, Stored, Tier


@dataclass(frozen=True)
class Named:
    """Blocks that are named by letters."""

    keys: str

    def key(self, block: int) -> str:
        return self.keys[: block + 1]


def chain(keys: str) -> list[str]:
    return [keys[: n + 1] for n in range(len(keys))]


def found(tier: CpuTier, keys: str) -> int:
    return len(tier.prefix(chain(keys)))


def test_events_tell_each_block_as_vllm_does() -> None:
    tier, abc = CpuTier(3), Named("abc")
    tier.store(abc, 0, 2)
    tier.store(abc, 0, 3)
    assert tier.take_events() == [Stored(abc, n, 1, Tier.CPU) for n in range(3)]
    tier.store(Named("x"), 0, 1)
    assert tier.take_events() == [Removed("a", Tier.CPU), Stored(Named("x"), 0, 1, Tier.CPU)]


def test_the_tail_of_what_is_over_goes_before_its_head() -> None:
    tier = CpuTier(5)
    tier.store(Named("abc"), 0, 3)
    tier.touch(Named("abc"), 0, 3)
    tier.store(Named("xyz"), 0, 3)
    assert (found(tier, "abc"), found(tier, "xyz")) == (2, 3)


def test_the_least_recently_used_goes_first() -> None:
    tier = CpuTier(4)
    for keys in ("ab", "xy", "ab"):
        tier.store(Named(keys), 0, 2)
        tier.touch(Named(keys), 0, 2)
    tier.store(Named("pq"), 0, 2)
    assert (found(tier, "ab"), found(tier, "xy")) == (2, 0)


@pytest.mark.parametrize(("keys", "stored"), [("pq", 2), ("pqr", 0)])
def test_what_is_being_loaded_stays_and_who_finds_no_room_is_left_out(keys: str, stored: int) -> None:
    tier = CpuTier(4)
    tier.store(Named("abcd"), 0, 4)
    tier.begin_load(["a", "ab"])
    assert tier.is_loading(["zz", "ab"])
    assert not tier.is_loading(["abc"])
    tier.store(Named(keys), 0, len(keys))
    assert (found(tier, "ab"), found(tier, keys)) == (2, stored)
    tier.end_load(["a", "ab"])
    tier.store(Named(keys), 0, len(keys))
    assert found(tier, keys) == len(keys)


def test_none_of_it_is_left_after_a_reset() -> None:
    tier = CpuTier(4)
    tier.store(Named("abcd"), 0, 4)
    tier.reset()
    assert (len(tier), found(tier, "abcd")) == (0, 0)


def follow(content: set[object], events: list[CacheEvent]) -> None:
    """What somebody knows who hears the events."""
    for event in events:
        match event:
            case Stored(owner, first, count, Tier.CPU):
                new = {owner.key(block) for block in range(first, first + count)}
                assert not new & content
                content |= new
            case Removed(key, Tier.CPU):
                content.remove(key)


PREFIX = st.text("ab", min_size=1, max_size=6)


@given(
    st.integers(1, 9),
    st.lists(st.tuples(st.sampled_from(["store", "touch", "load", "loaded"]), PREFIX), max_size=60),
)
def test_events_tell_all_that_is_there_and_nothing_else(size: int, acts: list[tuple[str, str]]) -> None:
    tier, known, loading = CpuTier(size), set[object](), set[str]()
    for act, keys in acts:
        match act:
            case "store":
                tier.store(Named(keys), 0, len(keys))
            case "touch":
                tier.touch(Named(keys), 0, len(keys))
            case "load" if not tier.is_loading(hits := tier.prefix(chain(keys))):
                tier.begin_load(hits)
                loading |= set(map(str, hits))
            case "loaded":
                tier.end_load(loading)
                loading.clear()
        follow(known, tier.take_events())
        assert len(tier) == len(known) <= size
        assert loading <= known
        assert all(bool(tier.prefix([key])) == (key in known) for key in chain(keys))
