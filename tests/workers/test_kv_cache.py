"""The KV cache: block hashes, and the LRU pool against a slow and obvious one."""

from __future__ import annotations

from dataclasses import dataclass
from hashlib import sha256
from pickle import dumps

import pytest
from hypothesis import given
from hypothesis import strategies as st

from workers.simulated.kv_cache import Cleared, KVCache, Removed, Stored, block_keys


@dataclass(frozen=True)
class Named:
    """Blocks that are named by letters."""

    keys: str

    def key(self, block: int) -> str:
        return self.keys[: block + 1]


def fill(cache: KVCache, keys: str) -> list[int]:
    """A sequence that holds and stores blocks for all of these keys."""
    owner = Named(keys)
    hits = cache.longest_prefix(owner.key(n) for n in range(len(keys)))
    cache.share(hits)
    blocks = hits + cache.allocate(len(keys) - len(hits))
    if len(blocks) > len(hits):
        cache.store(owner, blocks, len(hits), len(blocks) - len(hits))
    return blocks


def found(cache: KVCache, keys: str) -> int:
    return len(cache.longest_prefix(Named(keys).key(n) for n in range(len(keys))))


def test_keys_are_vllms_hash_chain() -> None:
    root = sha256(dumps("vllm-none-hash", protocol=5)).digest()
    first = sha256(dumps((root, (1, 2), None), protocol=5)).digest()
    second = sha256(dumps((first, (3, 4), None), protocol=5)).digest()
    assert block_keys([1, 2, 3, 4, 5], 2) == [first, second]


def test_a_salt_changes_every_key_through_the_first() -> None:
    plain, salted = block_keys(range(8), 2), block_keys(range(8), 2, "tenant")
    assert not set(plain) & set(salted)
    root = sha256(dumps("vllm-none-hash", protocol=5)).digest()
    assert salted[0] == sha256(dumps((root, (0, 1), (("cache_salt", "tenant"),)), protocol=5)).digest()


def test_released_blocks_stay_findable_until_their_space_is_needed() -> None:
    cache = KVCache(5)
    cache.release(fill(cache, "abc"))
    assert (cache.num_free, found(cache, "abc")) == (4, 3)
    cache.release(fill(cache, "xy"))
    assert found(cache, "xy") == 2
    assert found(cache, "abc") == 2  # the fourth block was free; one of the three had to go, from the tail


def test_the_tail_of_a_prefix_goes_before_its_head() -> None:
    cache = KVCache(4)
    cache.release(fill(cache, "abc"))
    cache.take_events()
    cache.allocate(2)
    assert cache.take_events() == [Removed("abc"), Removed("ab")]


def test_the_least_recently_released_prefix_goes_first() -> None:
    cache = KVCache(5)
    cache.release(fill(cache, "ab"))
    cache.release(fill(cache, "xy"))
    cache.release(fill(cache, "ab"))
    cache.allocate(2)
    assert (found(cache, "ab"), found(cache, "xy")) == (2, 0)


def test_blocks_that_hold_nothing_reusable_are_taken_first() -> None:
    cache = KVCache(4)
    cache.release(fill(cache, "a"))
    blocks = cache.allocate(2)
    cache.release(blocks)
    assert set(cache.allocate(2)) == set(blocks)
    assert found(cache, "a") == 1


def test_both_copies_of_one_block_are_announced() -> None:
    cache = KVCache(3)
    owner = Named("a")
    for _ in range(2):
        cache.store(owner, cache.allocate(1), 0, 1)
    cache.release([1])
    cache.release([2])
    assert cache.take_events() == [Stored(owner, 0, 1), Stored(owner, 0, 1)]
    cache.allocate(1)
    assert found(cache, "a") == 1
    cache.allocate(1)
    assert found(cache, "a") == 0
    assert cache.take_events() == [Removed("a"), Removed("a")]


def test_reset_forgets_everything_unless_something_is_in_use() -> None:
    cache = KVCache(4)
    blocks = fill(cache, "ab")
    assert not cache.reset()
    cache.release(blocks)
    cache.take_events()
    assert cache.reset()
    assert (found(cache, "ab"), cache.take_events()) == (0, [Cleared()])


def test_needs_more_than_the_reserved_block() -> None:
    with pytest.raises(ValueError, match="at least 2 blocks"):
        KVCache(1)


class Reference:
    """The same as a list: free keys in the order of their eviction, and how often each is in use."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.used: dict[str, int] = {}
        self.free: list[str] = []
        self.evicted: list[str] = []

    def hits(self, keys: list[str]) -> int:
        known = [key in self.used or key in self.free for key in keys]
        return known.index(False) if False in known else len(known)

    def hold(self, keys: list[str]) -> bool:
        hits = self.hits(keys)
        idle = [key for key in keys[:hits] if key in self.free]
        in_use = len(self.used) + len(idle)
        if in_use + len(keys) - hits > self.capacity:
            return False
        for key in idle:
            self.free.remove(key)
        for key in keys:
            self.used[key] = self.used.get(key, 0) + 1
        while len(self.used) + len(self.free) > self.capacity:
            self.evicted.append(self.free.pop(0))
        return True

    def release(self, keys: list[str]) -> None:
        for key in reversed(keys):
            self.used[key] -= 1
            if not self.used[key]:
                del self.used[key]
                self.free.append(key)


@given(
    st.integers(1, 12),
    st.lists(
        st.tuples(st.booleans(), st.text("abc", min_size=1, max_size=5), st.integers(0, 9)), max_size=60
    ),
)
def test_behaves_as_the_obvious_cache_does(capacity: int, actions: list[tuple[bool, str, int]]) -> None:
    cache, reference = KVCache(capacity + 1), Reference(capacity)
    held: list[tuple[list[int], list[str]]] = []
    for release, text, which in actions:
        if release and held:
            blocks, keys = held.pop(which % len(held))
            cache.release(blocks)
            reference.release(keys)
            continue
        keys = [text[: n + 1] for n in range(len(text))]
        hits = cache.longest_prefix(keys)
        assert len(hits) == reference.hits(keys)
        fits = len(keys) - len(hits) <= cache.num_free_without(hits)
        assert fits == reference.hold(keys)
        if fits:
            held.append((fill(cache, text), keys))
        assert cache.num_free == capacity - len(reference.used)
        assert cache.num_cached == len(reference.used) + len(reference.free)
    assert [e.key for e in cache.take_events() if isinstance(e, Removed)] == reference.evicted
