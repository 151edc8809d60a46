"""Which replica holds which block, on which tier.

A replica is one bit; each block key has, per tier, the bits of those that hold it. A prompt is matched with
all replicas in one walk along its keys. Beside what events told stand optimistic entries: blocks that a
request just placed will bring, until an event confirms them or the request ends.
"""

from __future__ import annotations

from typing import NamedTuple

from router.core.blocks import Keys, block_keys, root_key
from router.core.kv_events import AllBlocksCleared, BlockHash, BlockRemoved, BlockStored, KVEvent, Tier


class Held(NamedTuple):
    """These replicas have the first `blocks` of a prompt at hand, the next `slower` on slower tiers."""

    bits: int
    blocks: int
    slower: int


class KVIndex:
    """The blocks of every replica of every model."""

    def __init__(self) -> None:
        self._held: dict[Tier, dict[int, int]] = {tier: {} for tier in Tier}
        self._expected: dict[int, int] = {}
        self._key_of: dict[BlockHash, int] = {}
        self._bits = 0

    def join(self) -> int:
        """A bit for a replica that nothing is known of."""
        bit = ~self._bits & (self._bits + 1)
        self._bits |= bit
        return bit

    def leave(self, bit: int) -> None:
        """The replica is gone, and what it held."""
        self.forget(bit)
        self._bits &= ~bit

    def forget(self, bit: int) -> None:
        """Nothing is known of the replica's blocks any more."""
        for table in (*self._held.values(), self._expected):
            for key in [key for key, bits in table.items() if bits & bit]:
                self._drop(table, key, bit)

    def apply(self, bit: int, event: KVEvent) -> None:
        """What a replica's event says."""
        match event:
            case BlockStored():
                self._store(bit, event)
            case BlockRemoved():
                tier = Tier(event.medium or Tier.GPU)
                for block in event.block_hashes:
                    if (key := self._key_of.get(block)) is not None:
                        self._drop(self._held[tier], key, bit)
            case AllBlocksCleared():
                self.forget(bit)

    def match(self, keys: Keys, among: int) -> list[Held]:
        """How much of a prompt each of these replicas holds; those that hold nothing are left out."""
        gpu, expected = self._held[Tier.GPU], self._expected
        found: list[Held] = []
        depth = 0
        for depth, key in enumerate(keys):
            bits = gpu.get(key, 0)
            if bits & among != among:
                still = among & (bits | expected.get(key, 0))
                if depth and still != among:
                    found.append(Held(among ^ still, depth, 0))
                among = still
                if not among:
                    return found
        if among and keys:
            found.append(Held(among, depth + 1, 0))
        return found

    def expect(self, bit: int, keys: Keys) -> None:
        """A request was placed that will bring these blocks."""
        for key in keys:
            self._expected[key] = self._expected.get(key, 0) | bit

    def withdraw(self, bit: int, keys: Keys) -> None:
        """The request is over; what no event confirmed is not there."""
        for key in keys:
            self._drop(self._expected, key, bit)

    def _store(self, bit: int, event: BlockStored) -> None:
        parent = root_key(event.lora_name)
        if event.parent_block_hash is not None:
            known = self._key_of.get(event.parent_block_hash)
            if known is None:
                return
            parent = known
        ids = b"".join(token.to_bytes(4, "little") for token in event.token_ids)
        table = self._held[Tier(event.medium or Tier.GPU)]
        for block, key in zip(event.block_hashes, block_keys(ids, event.block_size, parent), strict=True):
            self._key_of[block] = key
            table[key] = table.get(key, 0) | bit
            self._drop(self._expected, key, bit)

    @staticmethod
    def _drop(table: dict[int, int], key: int, bit: int) -> None:
        if left := table.get(key, 0) & ~bit:
            table[key] = left
        else:
            table.pop(key, None)
