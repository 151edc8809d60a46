"""Which replica holds which block, on which tier; never in more memory than it was given.

A replica has four bits in a row, and each block's key the bits of those that hold it: on the GPU, on the CPU,
in storage, and by what was sent there. A prompt is matched with all replicas in one walk along its keys.
Beside that stand promises: blocks that a request just placed will bring, until an event confirms them or the
request ends.

Engines name blocks by hashes of their own. Equal hashes mean equal content, so replicas share one table of
names; engines that seed their hashes at random only take more room there.

All lies in shards of a fixed size, so that nothing takes long: no dict of millions grows, and none is looked
through when a replica is forgotten. A shard has a young and an old generation of blocks. What is stored or
matched is young; when the young are too many, the old go and the young become old. The blocks of a chain are
of one age, so they go together.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, repeat
from sys import getsizeof
from typing import NamedTuple

from router.core.blocks import Keys
from router.core.kv_events import TIERS, BlockHash, BlockRemoved, BlockStored, Tier, stored_keys

# A replica's bits: one for each tier, and one for what it should have because it was sent there.
HISTORY = len(Tier)
WIDTH = HISTORY + 1
ALL = (1 << WIDTH) - 1
NAME_BITS = (1 << 60) - 1  # of an engine's hash: Python keeps those in 32 bytes, longer ones in 48
SCATTER = 0x9E3779B97F4A7C15  # 2^64 divided by the golden ratio

DEFAULT_BYTES = 1 << 30
# Blocks in one generation of a shard: as many as a dict of 1,024 slots takes before it grows.
GENERATION = 682
INT_BYTES = 32  # a key or a name
MASK_BYTES = 64  # the bits of up to 75 replicas
ENTRY_BYTES = 120  # of a large dict: at worst it has six slots for an entry
PROMISE_BYTES = ENTRY_BYTES + INT_BYTES + MASK_BYTES
SURPLUS_BYTES = ENTRY_BYTES + INT_BYTES + MASK_BYTES + 72  # its key is a tuple
# Of all bytes: for promises, for surplus copies, for what was sent to replicas that tell no events.
PROMISES, SURPLUS, MIRRORS = 1 / 32, 1 / 32, 1 / 16
# A full mirror drops so much of its capacity at a time.
MIRROR_STEP = 1 / 16

# The kinds of attention with which a prefix is cached as far as its blocks are. None: not told.
FULL_ATTENTION = frozenset({None, "full_attention", "mla_attention", "sink_full_attention"})


class Held(NamedTuple):
    """These replicas have the first `blocks` of a prompt at hand, the next `slower` on slower tiers."""

    bits: int
    blocks: int
    slower: int


@dataclass(slots=True)
class Source:
    """How one replica tells of its blocks, and what could not be made of that.

    `size`: tokens in a block, 0 until its first. `group`: the one of its KV cache's groups that is indexed;
    `groups`: all that it spoke of. Blocks not taken in: `orphans` follow one that is unknown; `unkeyed` came
    without their tokens, or on a tier unheard of. `mirror`: keys of what was sent there, the least recent
    first.
    """

    bit: int
    size: int = 0
    group: int | None = None
    groups: set[int] = field(default_factory=set)
    orphans: int = 0
    unkeyed: int = 0
    used: bool = False
    mirror: dict[int, None] = field(default_factory=dict)

    def takes(self, event: BlockStored) -> bool:
        """Whether the event is of the group that is indexed: the first that has full attention."""
        group, full = event.group_idx, event.kv_cache_spec_kind in FULL_ATTENTION
        if group is None:
            return full
        self.groups.add(group)
        if self.group is None and full:
            self.group = group
        return group == self.group

    def names(self, hashes: list[BlockHash]) -> list[int]:
        """The engine's hashes as the index has them.

        A hybrid model's hash of two small blocks is another model's hash of the second, so the block size is
        part of the name. Of a hash in bytes vLLM's integer form has the last eight.
        """
        mark = self.size * SCATTER & NAME_BITS
        try:
            return [(h & NAME_BITS) ^ mark for h in hashes]  # type: ignore[operator]
        except TypeError:
            return self.names([int.from_bytes(h[-8:], "big") if isinstance(h, bytes) else h for h in hashes])


class KVIndex:
    """The blocks of every replica of every model, in at most `max_bytes` bytes.

    A shard is counted with the largest size that its dicts can take, and an int of its own for each key, name
    and mask, all of it full; so most of the time a third is used. A GiB has room for three million blocks.
    `generation`: blocks in a generation of a shard. `dropped`: blocks that were given up for want of room.
    """

    def __init__(self, max_bytes: int = DEFAULT_BYTES, generation: int = GENERATION) -> None:
        self._generation = self._most_young = generation
        self._count = max(1, int(max_bytes * (1 - PROMISES - SURPLUS - MIRRORS)) // _shard_bytes(generation))
        self._most_promised = int(max_bytes * PROMISES) // PROMISE_BYTES
        self._most_surplus = int(max_bytes * SURPLUS) // SURPLUS_BYTES
        self._most_mirrored = int(max_bytes * MIRRORS) // ENTRY_BYTES
        self._young: list[dict[int, int]] = [{} for _ in range(self._count)]
        self._old: list[dict[int, int]] = [{} for _ in range(self._count)]
        self._named: list[dict[int, int]] = [{} for _ in range(self._count)]
        self._promised: dict[int, int] = {}
        self._surplus: dict[tuple[int, int], int] = {}
        self._mirrored = 0
        self._sources: dict[int, Source] = {}
        self._places = self._leaving = 0
        self.dropped = 0
        self._tiered = self._stale = 0
        self._sweeper: Iterator[None] = iter(())

    def __len__(self) -> int:
        """Blocks that some replica holds."""
        return sum(map(len, self._young)) + sum(map(len, self._old))

    @property
    def nbytes(self) -> int:
        """What it takes now; masks, which blocks that came together share, are left out."""
        named = sum(map(len, self._named))
        dicts = (*self._young, *self._old, *self._named, self._promised, self._surplus)
        mirrors = sum(getsizeof(source.mirror) for source in self._sources.values())
        return sum(map(getsizeof, dicts)) + INT_BYTES * (len(self) + named) + mirrors

    # -- replicas come and go

    def join(self) -> int:
        """A bit for a replica that nothing is known of."""
        place = ~self._places & (self._places + 1)
        self._places |= place
        bit = 1 << WIDTH * (place.bit_length() - 1)
        self._sources[bit] = Source(bit)
        self._fit(getsizeof(max(self._sources) * ALL))
        return bit

    def leave(self, bit: int) -> None:
        """The replica is gone, and what it held; that is swept out with the events that come later."""
        source = self._sources.pop(bit)
        self._mirrored -= len(source.mirror)
        self._tiered &= ~bit
        bits = bit * ALL
        self.withdraw(bits, [key for key, promised in self._promised.items() if promised & bits])
        for copy in [copy for copy in self._surplus if copy[1] & bits]:
            del self._surplus[copy]
        self._leaving |= 1 << (bit.bit_length() - 1) // WIDTH
        self._stale |= bits
        self._sweeper = self._sweep()

    def forget(self, bit: int) -> int:
        """Nothing is known of the replica's blocks any more. Returns the bit that it has from now on."""
        if not self._sources[bit].used:
            return bit
        self.leave(bit)
        return self.join()

    def source(self, bit: int) -> Source:
        """How the replica tells of its blocks."""
        return self._sources[bit]

    # -- what replicas tell, and what is sent to them

    def apply(self, bit: int, event: BlockStored | BlockRemoved) -> Keys:
        """What a replica's event says. Returns the keys of the blocks that it has on no tier any more."""
        if self._stale:
            next(self._sweeper, None)
        source = self._sources[bit]
        if isinstance(event, BlockRemoved):
            return self._remove(source, event)
        if source.takes(event):
            self._store(source, event)
        return []

    def expect(self, bit: int, keys: Keys) -> Keys:
        """A request was placed that will bring these blocks. Returns those that no other had promised."""
        promised = self._promised
        self._sources[bit if bit in self._sources else bit >> HISTORY].used = True
        keys = keys[: max(0, self._most_promised - len(promised))]
        if not promised.keys().isdisjoint(keys):
            keys = [key for key in keys if not promised.get(key, 0) & bit]
            shared = {key: promised[key] | bit for key in keys if key in promised}
            promised.update(dict.fromkeys(keys, bit) | shared)
        else:
            promised.update(dict.fromkeys(keys, bit))
        return keys

    def withdraw(self, bits: int, keys: Keys) -> None:
        """The request is over; of what it had promised, what no event confirmed is not there."""
        promised = self._promised
        for key, held in zip(keys, map(promised.pop, keys, repeat(0)), strict=True):
            if held != bits and (left := held & ~bits):
                promised[key] = left

    def remember(self, bit: int, keys: Keys, capacity: int) -> None:
        """A replica was sent these blocks, and is taken to keep the last `capacity` of all that it was sent.

        It has them by the bit `bit << HISTORY`.
        """
        source, bits = self._sources[bit], bit << HISTORY
        source.used = True
        self._put(keys, bits)  # which may drop older ones, also from the mirror
        before = len(source.mirror)
        for key in reversed(keys):  # an engine drops the tail of a prompt before its head
            source.mirror.pop(key, None)
            source.mirror[key] = None
        self._mirrored += len(source.mirror) - before
        self.withdraw(bits, keys)
        self._trim(source, min(capacity, self._most_mirrored - (self._mirrored - len(source.mirror))))

    # -- what requests find

    def match(self, keys: Keys, among: int) -> list[Held]:
        """How much of a prompt each of these replicas holds; those that hold nothing are left out."""
        parted = self._at_hand(keys, among)
        if among & self._tiered:
            return list(self._with_slower(keys, parted))
        return [Held(bits, depth, 0) for depth, bits in parted if depth]

    def told(self, keys: Keys, bit: int) -> int:
        """How many of these blocks, from the first, the replica's events told of, on whatever tier."""
        bits = bit * (ALL >> 1)
        return next((place for place, key in enumerate(keys) if not self._held(key) & bits), len(keys))

    def holds(self, key: int, bit: int) -> bool:
        """Whether the replica's events told of this block, on whatever tier."""
        return bool(self._held(key) & bit * (ALL >> 1))

    def is_alone(self, key: int, bit: int) -> bool:
        """Whether this replica holds the block, and no other."""
        return self.holds(key, bit) and not self._held(key) & ~(bit * ALL)

    def _at_hand(self, keys: Keys, among: int) -> list[tuple[int, int]]:
        """Behind how many blocks which replicas lack the next, in order."""
        young, count, promised = self._young, self._count, self._promised
        parted = []
        for depth, key in enumerate(keys):
            held = young[key % count].get(key)
            if held is None:
                held = self._renew(key)
            if held & among != among:
                still = among & (held | promised.get(key, 0))
                if still != among:
                    parted.append((depth, among ^ still))
                    among = still
                    if not among:
                        return parted
        parted.append((len(keys), among))
        return parted

    def _with_slower(self, keys: Keys, parted: list[tuple[int, int]]) -> Iterator[Held]:
        """The same with what follows on slower tiers, as vLLM's offloading connector looks it up."""
        joining, walking, there = dict(parted), list[tuple[int, int]](), 0
        for depth in range(parted[0][0], len(keys) + 1):
            if joined := joining.get(depth, 0):
                walking.append((depth, joined))
                there |= joined
            held = self._held(keys[depth]) if there and depth < len(keys) else 0
            still = there & self._tiered & (held >> Tier.CPU | held >> Tier.STORAGE)
            if gone := there ^ still:
                ended = [(start, bits & gone) for start, bits in walking if bits & gone]
                yield from (Held(bits, start, depth - start) for start, bits in ended if depth)
                there = still

    # -- blocks by their keys

    def _held(self, key: int) -> int:
        """Who holds a block, in bits."""
        shard = key % self._count
        return self._young[shard].get(key) or self._old[shard].get(key, 0)

    def _renew(self, key: int) -> int:
        """Who holds a block that is not young; from now on it is."""
        shard = key % self._count
        held = self._old[shard].pop(key, 0)
        if held:
            self._young[shard][key] = held
            if len(self._young[shard]) >= self._most_young:
                self._age(shard)
        return held

    def _put(self, keys: Keys, bits: int) -> Keys:
        """These blocks are there. Returns those that were before."""
        young, old, count, most = self._young, self._old, self._count, self._most_young
        again = []
        before, after = 0, bits  # blocks that come together were held alike, and go on to share a mask
        for key in keys:
            shard = key % count
            table = young[shard]
            held = table.get(key)
            if held is None:
                held = old[shard].pop(key, 0)
            if held & bits:
                again.append(key)
            if held is not before:
                before, after = held, held | bits
            table[key] = after
            if len(table) >= most:
                self._age(shard)
        return again

    def _drop(self, key: int, bits: int) -> int:
        """A block is not there any more. Returns who still has it, in bits."""
        shard = key % self._count
        table = self._young[shard]
        held = table.get(key)
        if held is None:
            table = self._old[shard]
            held = table.get(key, 0)
        if left := held & ~bits:
            table[key] = left
            return left
        table.pop(key, None)
        return 0

    def _age(self, shard: int) -> None:
        """A shard's young are old from now on, and its old are gone."""
        gone, self._old[shard], self._young[shard] = self._old[shard], self._young[shard], {}
        self.dropped += len(gone)
        if self._surplus or self._mirrored:
            for key, held in gone.items():
                self._lose(key, held)

    def _lose(self, key: int, held: int) -> None:
        """Nothing is known of a block any more, whoever held it."""
        for bit in bits_of(held):
            self._surplus.pop((key, bit), None)
            source = self._sources.get(bit >> HISTORY)
            if source is not None and key in source.mirror:
                del source.mirror[key]
                self._mirrored -= 1

    def _trim(self, source: Source, most: int) -> None:
        """A mirror that is too large drops what was sent least recently."""
        excess = len(source.mirror) - max(0, most)
        if excess > 0:
            for key in list(islice(source.mirror, excess + int(most * MIRROR_STEP))):
                del source.mirror[key]
                self._mirrored -= 1
                self._drop(key, source.bit << HISTORY)

    # -- blocks by the names that engines give them

    def _store(self, source: Source, event: BlockStored) -> None:
        tier = TIERS.get(event.medium)
        if tier is None:
            source.unkeyed += len(event.block_hashes)
            return
        told = len(event.block_hashes) * event.block_size == len(event.token_ids) > 0
        if told:
            source.size = max(source.size, event.block_size)
            if event.block_size < source.size:  # vLLM caches parts of blocks too
                return
        names = source.names(event.block_hashes)
        keys = self._keys(source, event, names, told)
        source.used = True
        bit = source.bit << tier
        for key in self._put(keys, bit):
            self._copied(key, bit)
        self._name(names, keys)
        if tier is not Tier.GPU:
            self._tiered |= source.bit
        elif self._promised:
            self.withdraw(bit, keys)

    def _keys(self, source: Source, event: BlockStored, names: list[int], told: bool) -> Keys:
        """The keys of an event's blocks; none where they are not known and it has not `told` their tokens."""
        named, count = self._named, self._count
        if names and names[0] in named[names[0] % count]:
            known = [named[name % count].get(name, 0) for name in names]
            if all(known):
                return known
        blocks, parent = len(names), None
        if not told or len(event.extra_keys or names) != blocks:
            source.unkeyed += blocks
            return []
        if event.parent_block_hash is not None:
            (name,) = source.names([event.parent_block_hash])
            parent = named[name % count].get(name)
            if parent is None:
                source.orphans += blocks
                return []
        return stored_keys(event, parent)

    def _name(self, names: list[int], keys: Keys) -> None:
        named, count, most = self._named, self._count, 2 * self._most_young
        for name, key in zip(names, keys, strict=False):
            shard = name % count
            table = named[shard]
            table[name] = key
            if len(table) >= most:
                self._tidy(shard)

    def _remove(self, source: Source, event: BlockRemoved) -> Keys:
        tier = TIERS.get(event.medium)
        if tier is None or event.group_idx not in (None, source.group):
            return []
        named, young, count, surplus = self._named, self._young, self._count, self._surplus
        left, bit, tiers = [], source.bit << tier, source.bit * (ALL >> 1)
        for name in source.names(event.block_hashes):
            names = named[name % count]
            key = names.get(name)
            if key is None or (surplus and self._one_copy_less(key, bit)):
                continue
            blocks = young[key % count]
            if blocks.get(key) == bit:  # most are held by one replica, on one tier
                del blocks[key], names[name]
                left.append(key)
                continue
            held = self._drop(key, bit)
            if not held:
                del names[name]
            if not held & tiers:
                left.append(key)
        return left

    def _copied(self, key: int, bit: int) -> None:
        """Two sequences stored the same block at once: its removal will be told for each copy."""
        if len(self._surplus) < self._most_surplus and self._held(key) & bit:
            self._surplus[key, bit] = self._surplus.get((key, bit), 0) + 1

    def _one_copy_less(self, key: int, bit: int) -> bool:
        copies = self._surplus.pop((key, bit), 0)
        if copies > 1:
            self._surplus[key, bit] = copies - 1
        return copies > 0

    def _tidy(self, shard: int) -> None:
        """Too many names: those of blocks that are gone go, and if need be others with their blocks."""
        young, count = self._young, self._count
        kept = {name: key for name, key in self._named[shard].items() if self._held(key)}
        excess = len(kept) - 3 * self._most_young // 2
        if excess > 0:
            self.dropped += excess
            for name in sorted(kept, key=lambda name: kept[name] in young[kept[name] % count])[:excess]:
                key = kept.pop(name)
                self._lose(key, self._held(key))
                self._drop(key, ~0)
        self._named[shard] = kept

    # -- memory

    def _fit(self, mask_bytes: int) -> None:
        """Wider masks leave room for fewer blocks."""
        block_bytes = _shard_bytes(self._generation) // (2 * self._generation)
        wider = max(0, mask_bytes - MASK_BYTES)
        self._most_young = max(1, self._generation * block_bytes // (block_bytes + wider))

    def _sweep(self) -> Iterator[None]:
        """Takes the bits of replicas that are gone out of all shards, some hundred blocks at a step."""
        looked = 0
        for shard in range(self._count):
            for table in (self._old[shard], self._young[shard]):
                self._strip(table)
                looked += len(table)
            if looked > self._generation:
                looked = 0
                yield
        for named in self._named:
            for name in [name for name, key in named.items() if not self._held(key)]:
                del named[name]
            looked += len(named)
            if looked > self._generation:
                looked = 0
                yield
        self._places &= ~self._leaving
        self._leaving = self._stale = 0

    def _strip(self, table: dict[int, int]) -> None:
        stale, before, after = self._stale, 0, 0
        for key, held in [item for item in table.items() if item[1] & stale]:
            if held is not before:
                before, after = held, held & ~stale
            if after:
                table[key] = after
            else:
                del table[key]


def bits_of(bits: int) -> Iterator[int]:
    """Each bit by itself, from the lowest."""
    while bits:
        bit = bits & -bits
        yield bit
        bits ^= bit


def _shard_bytes(generation: int) -> int:
    """The most that a shard takes: two generations of blocks, and as many names, whose blocks may be gone."""
    dicts = 2 * _dict_bytes(generation) + _dict_bytes(2 * generation)
    return dicts + 2 * generation * (3 * INT_BYTES + MASK_BYTES)


def _dict_bytes(entries: int) -> int:
    """The most that a dict takes that never has more entries, however they come and go (CPython 3.11).

    When its slots are used up it gets the power of two that is at least three times its entries.
    """
    slots = 1 << (3 * entries - 1).bit_length()
    index = 1 if slots < 1 << 8 else 2 if slots < 1 << 16 else 4
    return 200 + slots * index + slots * 2 // 3 * 24
