"""The engine's KV blocks: an LRU prefix cache with reference counts and vLLM's block hashes."""

import pickle
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from typing import Protocol

BlockKey = Hashable
"""Names the content of one full block and of all blocks before it."""

# The root of vLLM's hash chain where PYTHONHASHSEED is unset (kv_cache_utils.py, init_none_hash).
ROOT_SEED = "vllm-none-hash"


def _digest(value: object) -> bytes:
    # Protocol 5 is what vLLM's "sha256" pickles with; another protocol gives other hashes.
    return sha256(pickle.dumps(value, protocol=5)).digest()


ROOT_KEY = _digest(ROOT_SEED)


def chain_key(parent: bytes, token_ids: Sequence[int], extra: tuple[object, ...] | None = None) -> bytes:
    """vLLM's key of one full block: 32 bytes over its parent's key, its tokens and its extra keys."""
    return _digest((parent, tuple(token_ids), extra))


def block_keys(token_ids: Sequence[int], block_size: int, cache_salt: str | None = None) -> list[bytes]:
    """The keys of all full blocks of a prompt; a salt separates the caches of those who do not share it."""
    keys: list[bytes] = []
    parent = ROOT_KEY
    for start in range(0, len(token_ids) - block_size + 1, block_size):
        extra = (("cache_salt", cache_salt),) if cache_salt and not start else None
        parent = chain_key(parent, token_ids[start : start + block_size], extra)
        keys.append(parent)
    return keys


class Tier(StrEnum):
    """Where a block lies, as vLLM's events name it."""

    GPU = "GPU"
    CPU = "CPU"


class Blocks(Protocol):
    """Whatever can name its own full blocks: the owner of a Stored event."""

    def key(self, block: int) -> BlockKey:
        """The key of full block number `block`."""


@dataclass(frozen=True, slots=True)
class Stored:
    """Blocks `first` to `first + count - 1` of `owner` entered a tier of the cache."""

    owner: Blocks
    first: int
    count: int
    tier: Tier = Tier.GPU


@dataclass(frozen=True, slots=True)
class Removed:
    """One block left a tier of the cache."""

    key: BlockKey
    tier: Tier = Tier.GPU


@dataclass(frozen=True, slots=True)
class Cleared:
    """Every block left the GPU."""


CacheEvent = Stored | Removed | Cleared


class KVCache:
    """A pool of equal blocks; full ones stay findable by key until their space is needed.

    A free block is one that no sequence uses. Free blocks that hold nothing reusable are taken first, then
    the least recently freed. As in vLLM, two sequences that compute the same block at the same time leave
    two copies behind, and each copy is announced when it is stored and when it goes.
    """

    def __init__(self, num_blocks: int) -> None:
        if num_blocks < 2:
            raise ValueError(f"a KV cache needs at least 2 blocks (one is reserved), not {num_blocks}")
        self.capacity = num_blocks - 1  # vLLM keeps block 0 for itself
        self.events: list[CacheEvent] = []
        self._free: OrderedDict[int, None] = OrderedDict.fromkeys(range(1, num_blocks))
        self._references = [0] * num_blocks
        self._key_of: dict[int, BlockKey] = {}
        self._copies: dict[BlockKey, dict[int, None]] = {}

    @property
    def num_free(self) -> int:
        """Blocks that no sequence uses, cached or not."""
        return len(self._free)

    @property
    def num_cached(self) -> int:
        """Distinct keys that a lookup can find."""
        return len(self._copies)

    def longest_prefix(self, keys: Iterable[BlockKey]) -> list[int]:
        """The cached blocks that hold the first of these keys, up to the first miss."""
        found: list[int] = []
        for key in keys:
            copies = self._copies.get(key)
            if copies is None:
                break
            found.append(next(iter(copies)))
        return found

    def num_free_without(self, blocks: Iterable[int]) -> int:
        """How many blocks would be free if these were in use."""
        return len(self._free) - sum(1 for block in blocks if not self._references[block])

    def share(self, blocks: Iterable[int]) -> None:
        """Let one more sequence use these cached blocks."""
        for block in blocks:
            if not self._references[block]:
                del self._free[block]
            self._references[block] += 1

    def allocate(self, count: int) -> list[int]:
        """Take `count` free blocks, evicting what they held; the caller has checked num_free."""
        blocks = [self._free.popitem(last=False)[0] for _ in range(count)]
        for block in blocks:
            self._evict(block)
            self._references[block] = 1
        return blocks

    def store(self, owner: Blocks, blocks: Sequence[int], first: int, count: int) -> None:
        """Make blocks `first` to `first + count - 1` of a sequence findable; `blocks` are all it holds."""
        for number in range(first, first + count):
            key, block = owner.key(number), blocks[number]
            self._key_of[block] = key
            self._copies.setdefault(key, {})[block] = None
        self.events.append(Stored(owner, first, count))

    def release(self, blocks: Sequence[int]) -> None:
        """Give up a sequence's blocks; the tail of a prefix will be evicted before its head."""
        unused: list[int] = []
        for block in reversed(blocks):
            self._references[block] -= 1
            if self._references[block]:
                continue
            if block in self._key_of:
                self._free[block] = None
            else:
                unused.append(block)
        for block in reversed(unused):
            self._free[block] = None
            self._free.move_to_end(block, last=False)

    def reset(self) -> bool:
        """Forget every cached block; refused, as vLLM refuses it, while a sequence uses any."""
        if self.num_free != self.capacity:
            return False
        self._key_of.clear()
        self._copies.clear()
        self.events.append(Cleared())
        return True

    def take_events(self) -> list[CacheEvent]:
        """What entered and left since the last call, in order."""
        events, self.events = self.events, []
        return events

    def _evict(self, block: int) -> None:
        key = self._key_of.pop(block, None)
        if key is None:
            return
        copies = self._copies[key]
        del copies[block]
        if not copies:
            del self._copies[key]
        self.events.append(Removed(key))
