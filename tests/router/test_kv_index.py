"""The KV index against a naive one, under any order of events, and within its bound of bytes."""

from __future__ import annotations

import tracemalloc
from array import array
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from itertools import takewhile
from random import Random
from sys import getsizeof
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from router.core.blocks import Keys, block_keys, root_key
from router.core.kv_events import BlockRemoved, BlockStored, Tier
from router.core.kv_index import GENERATION, HISTORY, Held, KVIndex, _dict_bytes, bits_of


class Content(NamedTuple):
    """A prefix in whole blocks, with all that makes its last block what it is."""

    size: int
    tokens: tuple[int, ...]
    adapter: str | None = None
    salt: str | None = None
    images: frozenset[int] = frozenset()

    @property
    def blocks(self) -> int:
        return len(self.tokens) // self.size

    def prefix(self, blocks: int) -> Content:
        images = frozenset(image for image in self.images if image < blocks)
        return self._replace(tokens=self.tokens[: blocks * self.size], images=images)

    def keyed(self) -> Keys:
        """As a request has them, which knows of no image."""
        ids = array("I", self.tokens).tobytes()
        return block_keys(ids, self.size, root_key(self.adapter, self.salt))

    def extra(self, block: int) -> list[object] | None:
        adapter = [self.adapter] if self.adapter else []
        image = [["picture", 1]] if block in self.images else []
        salt = [self.salt] if self.salt and not block else []
        return [*adapter, *image, *salt] or None


class Block(NamedTuple):
    tier: Tier
    content: Content


@dataclass(eq=False)
class Engine:
    """What one engine holds, and what it told since its replica was last forgotten, in copies.

    `sure` was keyed for certain; `maybe` only if a block before it, that this engine did not tell, is known.
    """

    bit: int
    size: int
    seed: int = 0
    in_bytes: bool = False
    sized: bool = False
    holds: Counter[Block] = field(default_factory=Counter)
    sure: Counter[Block] = field(default_factory=Counter)
    maybe: Counter[Block] = field(default_factory=Counter)
    sent: OrderedDict[int, None] = field(default_factory=OrderedDict)

    def named(self, content: Content) -> int | bytes:
        """Its hash. Blocks of two sizes that end at the same token have the same one, as in hybrid models."""
        digest = xxh3_64_intdigest(repr((self.seed, *content[1:])).encode())
        return b"\7" * 24 + digest.to_bytes(8, "big") if self.in_bytes else digest

    def stored(self, content: Content, first: int, tier: Tier = Tier.GPU, bare: bool = False) -> BlockStored:
        """Blocks `first` and after of a prefix; `bare`: without tokens."""
        blocks = range(first, content.blocks)
        extra = [content.extra(block) for block in blocks]
        return BlockStored(
            block_hashes=[self.named(content.prefix(block + 1)) for block in blocks],
            token_ids=[] if bare else list(content.tokens[first * content.size :]),
            block_size=0 if bare else content.size,
            parent_block_hash=self.named(content.prefix(first)) if first and not bare else None,
            medium=tier.name,
            lora_name=None if bare else content.adapter,
            extra_keys=extra if any(extra) and not bare else None,
        )

    def removed(self, content: Content, tier: Tier = Tier.GPU) -> BlockRemoved:
        return BlockRemoved([self.named(content)], tier.name)

    def forgotten(self, bit: int) -> None:
        self.bit, self.sized = bit, False
        for told in (self.sure, self.maybe, self.sent):
            told.clear()


# Prompts that share beginnings: a request is a prefix of one.
SEQUENCES = ((0,) * 12, (0,) * 6 + (1,) * 6, (0, 1) * 6, (0, 0, 1) * 4)
SIZES = (2, 2, 3)


class Step(NamedTuple):
    """One thing that happens; what it does not need of this it does not read. `pick`: of what there is."""

    kind: str
    engine: int
    pick: int
    content: Content
    first: int
    tier: Tier
    flag: bool


often = ("store", "store", "copy", "copy_of_another", "remove", "remove", "remove", "place", "end", "send")
steps = st.builds(
    Step,
    kind=st.sampled_from((*often, *often, "evict", "lose", "restart", "leave")),
    engine=st.integers(0, 2),
    pick=st.integers(0, 7),
    content=st.builds(
        lambda sequence, blocks, *rest: Content(3, sequence[: 3 * blocks], *rest),
        st.sampled_from(SEQUENCES),
        st.integers(1, 4),
        st.sampled_from((None, None, None, "a")),
        st.sampled_from((None, None, None, "a", "s")),
        st.sampled_from((frozenset(), frozenset(), frozenset(), frozenset({1}))),
    ),
    first=st.integers(0, 2),
    tier=st.sampled_from((Tier.GPU, Tier.GPU, Tier.GPU, Tier.CPU, Tier.STORAGE)),
    flag=st.booleans(),
)


class World:
    """Three engines that store, drop, lose events and restart, requests that come and go; and the index."""

    def __init__(self, index: KVIndex, exact: bool) -> None:
        self.index, self.exact = index, exact
        self.engines = [self.joined(place) for place in range(3)]
        self.flights: list[tuple[int, Keys]] = []
        self.promised: dict[int, set[int]] = {}
        self.unconfirmed: dict[int, set[int]] = {}

    def joined(self, place: int) -> Engine:
        """The second speaks in bytes, the third has larger blocks."""
        return Engine(self.index.join(), SIZES[place], in_bytes=place == 1)

    def take(self, step: Step) -> None:
        engine = self.engines[step.engine]
        content = step.content._replace(size=engine.size).prefix(len(step.content.tokens) // engine.size)
        first = step.first if step.first < content.blocks else 0
        held = [block for block, copies in engine.holds.items() if copies]
        others = [block.content for other in self.engines for block in other.sure if other.sure[block]]
        tier, there = held[step.pick % len(held)] if held else (step.tier, content)
        match step.kind:
            case "store":
                self.store(engine, content, first, step.tier, step.flag)
            case "copy":
                self.store(engine, there, there.blocks - 1, tier, step.flag)
            case "copy_of_another" if others:
                there = others[step.pick % len(others)]._replace(size=engine.size)
                there = there.prefix(len(there.tokens) // engine.size)
                self.store(engine, there, 0, step.tier, False)
            case "remove":
                self.remove(engine, there, tier)
            case "evict":
                self.remove(engine, content, step.tier)
            case "lose" | "restart":
                self.lose(engine, Block(tier, there), step)
            case "leave":
                self.unpromise(engine)
                self.index.leave(engine.bit)
                self.engines[step.engine] = self.joined(step.engine)
                assert len({engine.bit for engine in self.engines}) == 3
            case "place":
                self.place(engine.bit << (HISTORY if step.flag else 0), content.keyed())
            case "end" if self.flights:
                self.end(*self.flights.pop(step.pick % len(self.flights)))
            case "send":
                self.send(engine, content.keyed(), 2 + step.pick)
        for looked_for in (content, there):
            self.look(looked_for)

    # -- what happens

    def store(self, engine: Engine, content: Content, first: int, tier: Tier, bare: bool) -> None:
        bare = bare and tier is not Tier.GPU
        new = [content.prefix(blocks) for blocks in range(first + 1, content.blocks + 1)]
        if bare:
            sure = engine.sized and all(self.named(engine, block) for block in new)
        else:
            sure = not first or self.named(engine, content.prefix(first))
            engine.sized = True
        self.index.apply(engine.bit, engine.stored(content, first, tier, bare))
        for told in (engine.holds, engine.maybe, *([engine.sure] if sure else ())):
            told.update(Block(tier, block) for block in new)
        if tier is Tier.GPU:
            self.confirm(engine.bit, set(content.keyed()[first : min(content.images, default=None)]), sure)

    def remove(self, engine: Engine, content: Content, tier: Tier) -> None:
        block = Block(tier, content)
        left = self.index.apply(engine.bit, engine.removed(content, tier))
        others = [Block(other, content) for other in Tier if other is not tier]
        if engine.sure[block] == engine.maybe[block] == 1 and not content.images and self.exact:
            if not any(engine.maybe[other] for other in others):
                assert left == content.keyed()[-1:]
            elif any(engine.sure[other] for other in others):
                assert left == []
        for told in (engine.holds, engine.maybe, engine.sure):
            told[block] = max(0, told[block] - 1)

    def lose(self, engine: Engine, block: Block, step: Step) -> None:
        """Seen as a gap, or as a restart of the engine: it is forgotten, and learnt anew from then on."""
        if step.kind == "restart":
            engine.holds.clear()
        else:
            engine.holds[block] = max(0, engine.holds[block] + (1 if step.flag else -1))
        self.unpromise(engine)
        engine.forgotten(self.index.forget(engine.bit))

    def place(self, bit: int, keys: Keys) -> None:
        promised, unconfirmed = self.promises(bit)
        own = self.index.expect(bit, keys)
        if self.exact:
            assert set(keys) - promised <= set(own) <= set(keys) - unconfirmed
        promised.update(own)
        unconfirmed.update(own)
        self.flights.append((bit, own))

    def end(self, bit: int, own: Keys) -> None:
        self.index.withdraw(bit, own)
        for promises in self.promises(bit):
            promises.difference_update(own)

    def send(self, engine: Engine, keys: Keys, capacity: int) -> None:
        self.index.remember(engine.bit, keys, capacity)
        for key in reversed(keys):
            engine.sent[key] = None
            engine.sent.move_to_end(key)
        while len(engine.sent) > capacity:
            engine.sent.popitem(last=False)
        self.confirm(engine.bit << HISTORY, set(keys), True)

    # -- what is found

    def look(self, content: Content) -> None:
        """A longer request of the same beginning, in blocks of either size, by events and by history."""
        for size in set(SIZES):
            asked = content._replace(size=size, tokens=content.tokens + (0,) * 6, images=frozenset())
            for shift in (0, HISTORY):
                self.match(asked.prefix(len(asked.tokens) // size), shift)

    def match(self, content: Content, shift: int) -> None:
        bits = {engine.bit << shift: engine for engine in self.engines}
        found = self.index.match(content.keyed(), sum(bits))
        told = {bit: held for held in found for bit in bits_of(held.bits)}
        assert len(told) == sum(held.bits.bit_count() for held in found), "a replica is told of twice"
        assert told.keys() <= bits.keys()
        assert all(held.blocks + held.slower for held in found)
        for bit, engine in bits.items():
            self.check(engine, bit, content, told.get(bit, Held(bit, 0, 0)))

    def check(self, engine: Engine, bit: int, content: Content, held: Held) -> None:
        prefixes = [content.prefix(blocks + 1) for blocks in range(content.blocks)]
        promised, unconfirmed = self.promises(bit)
        for told, promises, bound in ((engine.maybe, promised, "most"), (engine.sure, unconfirmed, "least")):
            if bit == engine.bit:
                at_hand = [told[Block(Tier.GPU, prefix)] > 0 for prefix in prefixes]
                slower = [told[Block(Tier.CPU, p)] + told[Block(Tier.STORAGE, p)] > 0 for p in prefixes]
            else:
                at_hand, slower = [key in engine.sent for key in content.keyed()], []
            at_hand = [
                is_there or key in promises for is_there, key in zip(at_hand, content.keyed(), strict=False)
            ]
            expected = run(at_hand), run(slower[held.blocks :])
            if bound == "most":
                assert held.blocks <= expected[0] and held.slower <= expected[1]
            elif self.exact:
                assert held.blocks >= expected[0] and held.slower >= expected[1]
        assert all(engine.maybe[block] <= engine.holds[block] for block in engine.maybe)

    def named(self, engine: Engine, content: Content) -> bool:
        """Whether an engine that hashes alike told for certain that it holds this."""
        alike = [other for other in self.engines if (other.seed, other.size) == (engine.seed, engine.size)]
        return any(other.sure[Block(tier, content)] for other in alike for tier in Tier)

    # -- promises

    def promises(self, bit: int) -> tuple[set[int], set[int]]:
        return self.promised.setdefault(bit, set()), self.unconfirmed.setdefault(bit, set())

    def confirm(self, bit: int, keys: set[int], sure: bool) -> None:
        promised, unconfirmed = self.promises(bit)
        unconfirmed.difference_update(keys)
        if sure:
            promised.difference_update(keys)

    def unpromise(self, engine: Engine) -> None:
        for bit in (engine.bit, engine.bit << HISTORY):
            self.promised.pop(bit, None)
            self.unconfirmed.pop(bit, None)


def run(flags: list[bool]) -> int:
    """How many are true before the first that is not."""
    return len(list(takewhile(bool, flags)))


@settings(max_examples=40)
@given(st.lists(steps, min_size=30, max_size=80))
def test_it_equals_a_naive_index(taken: list[Step]) -> None:
    world = World(KVIndex(1 << 20), exact=True)
    for step in taken:
        world.take(step)


@settings(max_examples=25)
@given(st.lists(steps, min_size=30, max_size=80))
def test_in_little_room_it_claims_less_and_never_more(taken: list[Step]) -> None:
    world = World(KVIndex(1 << 13, generation=4), exact=False)
    for step in taken:
        world.take(step)
        assert len(world.index) <= 8 * world.index._count
        assert world.index.nbytes <= 1 << 13


SIZE = 16
PROMPT = Content(SIZE, tuple(range(4 * SIZE)))


def chain_of(blocks: int, first_token: int = 0) -> Content:
    return Content(SIZE, tuple(range(first_token, first_token + blocks * SIZE)))


def engine_in(index: KVIndex, in_bytes: bool = False) -> Engine:
    return Engine(index.join(), SIZE, in_bytes=in_bytes)


def blocks_of(index: KVIndex, content: Content, bit: int) -> tuple[int, int]:
    """At hand and behind that on slower tiers."""
    found = index.match(content.keyed(), bit)
    assert len(found) <= 1
    return found[0][1:] if found else (0, 0)


def test_replicas_are_told_apart_in_one_walk() -> None:
    index = KVIndex()
    engines = [engine_in(index) for _ in range(4)]
    for engine, blocks in zip(engines, (4, 2, 2, 0), strict=True):
        if blocks:
            index.apply(engine.bit, engine.stored(PROMPT.prefix(blocks), 0))
    bits = [engine.bit for engine in engines]
    found = index.match(PROMPT.keyed(), sum(bits))
    assert found == [Held(bits[1] | bits[2], 2, 0), Held(bits[0], 4, 0)]
    assert index.match(PROMPT.keyed(), bits[1] | bits[3]) == [Held(bits[1], 2, 0)]
    assert index.match([], sum(bits)) == []


def test_a_block_has_left_when_it_is_on_no_tier() -> None:
    index = KVIndex()
    one, other = engine_in(index), engine_in(index)
    for engine, tier in ((one, Tier.GPU), (one, Tier.CPU), (other, Tier.GPU)):
        index.apply(engine.bit, engine.stored(PROMPT, 0, tier))
    last = PROMPT.keyed()[-1:]
    assert index.apply(one.bit, one.removed(PROMPT)) == []
    assert index.apply(one.bit, one.removed(PROMPT, Tier.CPU)) == last
    assert index.apply(other.bit, other.removed(PROMPT)) == last


def test_slower_tiers_count_from_where_the_gpu_ends_and_as_far_as_they_reach() -> None:
    index = KVIndex()
    engine = engine_in(index)
    index.apply(engine.bit, engine.stored(PROMPT, 0))
    for block, tier in ((2, Tier.CPU), (3, Tier.CPU), (3, Tier.STORAGE), (4, Tier.STORAGE)):
        index.apply(engine.bit, engine.stored(PROMPT.prefix(block), block - 1, tier, bare=True))
    assert blocks_of(index, PROMPT, engine.bit) == (4, 0)
    for block in (4, 3, 2):
        index.apply(engine.bit, engine.removed(PROMPT.prefix(block)))
    assert blocks_of(index, PROMPT, engine.bit) == (1, 3)
    index.apply(engine.bit, engine.removed(PROMPT.prefix(3), Tier.CPU))
    assert blocks_of(index, PROMPT, engine.bit) == (1, 3)
    index.apply(engine.bit, engine.removed(PROMPT.prefix(3), Tier.STORAGE))
    assert blocks_of(index, PROMPT, engine.bit) == (1, 1)
    index.apply(engine.bit, engine.removed(PROMPT.prefix(1)))
    assert blocks_of(index, PROMPT, engine.bit) == (0, 0)


def test_a_block_with_copies_is_there_until_the_last_is_removed() -> None:
    index = KVIndex()
    engine, other = engine_in(index), engine_in(index)
    for _ in range(3):
        index.apply(engine.bit, engine.stored(PROMPT, 0))
    index.apply(other.bit, other.stored(PROMPT, 0))
    last = PROMPT.keyed()[-1]
    left = [index.apply(engine.bit, engine.removed(PROMPT)) for _ in range(3)]
    assert left == [[], [], [last]]
    assert blocks_of(index, PROMPT, engine.bit) == (3, 0)
    assert blocks_of(index, PROMPT, other.bit) == (4, 0)


def test_what_was_promised_is_there_until_it_is_confirmed_or_withdrawn() -> None:
    index = KVIndex()
    engine = engine_in(index)
    first = index.expect(engine.bit, PROMPT.keyed())
    assert first == PROMPT.keyed()
    assert index.expect(engine.bit, PROMPT.keyed()) == []
    assert blocks_of(index, PROMPT, engine.bit) == (4, 0)
    index.apply(engine.bit, engine.stored(PROMPT.prefix(2), 0))
    index.apply(engine.bit, engine.removed(PROMPT.prefix(2)))
    assert blocks_of(index, PROMPT, engine.bit) == (1, 0), "an event confirmed it, and another took it back"
    index.withdraw(engine.bit, first)
    assert blocks_of(index, PROMPT, engine.bit) == (1, 0)


def test_what_was_sent_is_taken_to_be_there_within_the_capacity() -> None:
    index = KVIndex()
    bit = index.join()
    history = bit << HISTORY
    other = chain_of(3, 1000)
    own = index.expect(history, PROMPT.keyed())
    index.remember(bit, PROMPT.keyed(), 6)
    index.remember(bit, other.keyed(), 6)
    assert blocks_of(index, PROMPT, history) == (3, 0), "its tail went first"
    assert blocks_of(index, other, history) == (3, 0)
    assert blocks_of(index, PROMPT, bit) == (0, 0), "events tell of nothing"
    index.remember(bit, PROMPT.keyed(), 6)
    assert blocks_of(index, other, history) == (2, 0)
    index.withdraw(history, own)
    assert blocks_of(index, PROMPT, history) == (4, 0)


def test_a_forgotten_replica_starts_anew_and_its_place_is_used_again() -> None:
    index = KVIndex()
    engine, other = engine_in(index), engine_in(index)
    for _ in range(2):
        index.apply(engine.bit, engine.stored(PROMPT, 0))
    index.expect(engine.bit, chain_of(2, 500).keyed())
    before = engine.bit
    engine.bit = index.forget(before)
    assert engine.bit != before
    assert index.forget(engine.bit) == engine.bit, "nothing was known of it"
    assert index.match(PROMPT.keyed(), engine.bit) == []
    index.apply(other.bit, other.stored(chain_of(1, 900), 0))  # events sweep out what is stale
    assert len(index) == 1
    assert index.join() == before
    assert index.match(PROMPT.keyed() + chain_of(2, 500).keyed(), before) == []
    again = Engine(before, SIZE)
    index.apply(before, again.stored(PROMPT, 0))
    index.apply(before, again.removed(PROMPT))
    assert blocks_of(index, PROMPT, before) == (3, 0), "copies of before are forgotten too"


def test_hashes_in_bytes_and_in_integers_are_the_same_names() -> None:
    index = KVIndex()
    one, two = engine_in(index), engine_in(index, in_bytes=True)
    index.apply(one.bit, one.stored(PROMPT.prefix(2), 0))
    index.apply(two.bit, two.stored(PROMPT, 2))
    index.apply(two.bit, two.stored(PROMPT.prefix(2), 0))
    assert blocks_of(index, PROMPT, two.bit) == (4, 0)


def test_what_cannot_be_keyed_is_counted_and_not_guessed() -> None:
    index = KVIndex()
    engine = engine_in(index)
    index.apply(engine.bit, engine.stored(PROMPT, 2))
    assert index.source(engine.bit).orphans == 2
    index.apply(engine.bit, engine.stored(PROMPT.prefix(2), 0, Tier.CPU, bare=True))
    known = engine.stored(PROMPT, 0)
    for tokens, size in ((known.token_ids[:-1], SIZE), (known.token_ids, 10 * SIZE), ([], -1)):
        index.apply(engine.bit, BlockStored(known.block_hashes, tokens, size))
    index.apply(engine.bit, BlockStored(known.block_hashes, known.token_ids, SIZE, medium="TAPE"))
    index.apply(engine.bit, BlockRemoved(known.block_hashes, medium="TAPE"))
    extra = BlockStored(known.block_hashes, known.token_ids, SIZE, extra_keys=[None])
    index.apply(engine.bit, extra)
    assert index.source(engine.bit).unkeyed == 2 + 3 * 4 + 4 + 4
    assert len(index) == 0
    index.apply(engine.bit, known)
    assert blocks_of(index, PROMPT, engine.bit) == (4, 0)


def test_of_several_groups_the_first_with_full_attention_is_indexed() -> None:
    index = KVIndex()
    engine = engine_in(index)

    def told(content: Content, group: int, kind: str) -> None:
        event = engine.stored(content, 0)
        fields = (event.block_hashes, event.token_ids, SIZE, None, "GPU", None, None, group, kind)
        index.apply(engine.bit, BlockStored(*fields))

    told(PROMPT, 0, "sliding_window")
    assert blocks_of(index, PROMPT, engine.bit) == (0, 0)
    told(PROMPT, 1, "full_attention")
    told(PROMPT, 2, "full_attention")
    hashes = engine.stored(PROMPT, 3).block_hashes
    for group in (0, 2):
        index.apply(engine.bit, BlockRemoved(hashes, "GPU", group))
    assert blocks_of(index, PROMPT, engine.bit) == (4, 0)
    index.apply(engine.bit, BlockRemoved(hashes, "GPU", 1))
    assert blocks_of(index, PROMPT, engine.bit) == (3, 0)
    assert index.source(engine.bit).groups == {0, 1, 2}


def test_a_part_of_a_block_is_no_block() -> None:
    index = KVIndex()
    engine = engine_in(index)
    index.apply(engine.bit, engine.stored(PROMPT, 0))
    index.apply(engine.bit, Engine(engine.bit, SIZE // 2).stored(Content(SIZE // 2, PROMPT.tokens), 0))
    assert index.source(engine.bit).size == SIZE
    assert blocks_of(index, Content(SIZE // 2, PROMPT.tokens), engine.bit) == (0, 0)


def test_what_is_matched_outlives_what_is_not() -> None:
    """One shard of two generations; 40 chains of a block each, of which one is asked for all the time."""
    index = KVIndex(1 << 12, generation=8)
    engine = engine_in(index)
    prompts = [chain_of(1, 100 * place) for place in range(40)]
    for prompt in prompts:
        index.apply(engine.bit, engine.stored(prompt, 0))
        assert blocks_of(index, prompts[0], engine.bit) == (1, 0)
    held = [blocks_of(index, prompt, engine.bit) == (1, 0) for prompt in prompts]
    assert held[0] and held[-1] and not any(held[1:20])
    index.apply(engine.bit, engine.removed(prompts[0]))
    assert blocks_of(index, prompts[0], engine.bit) == (0, 0)


def test_a_block_that_was_dropped_for_room_leaves_no_copies_behind() -> None:
    index = KVIndex(1 << 14, generation=32)
    engine = engine_in(index)
    for _ in range(2):
        index.apply(engine.bit, engine.stored(PROMPT, 0))
    for place in range(1, 200):
        index.apply(engine.bit, engine.stored(chain_of(1, 1000 * place), 0))
    assert blocks_of(index, PROMPT, engine.bit) == (0, 0)
    for event in (engine.stored(PROMPT, 0), engine.removed(PROMPT)):
        index.apply(engine.bit, event)
    assert blocks_of(index, PROMPT, engine.bit)[0] < 4


# -- bytes


def test_a_dict_grows_as_it_is_counted() -> None:
    for entries in (GENERATION, 2 * GENERATION):
        chance, table = Random(entries), dict[int, int]()
        largest = 0
        for _ in range(20 * entries):
            if len(table) == entries:
                del table[next(iter(table))]
            table[chance.getrandbits(60)] = 1
            largest = max(largest, getsizeof(table))
        assert _dict_bytes(entries) / 1.1 < largest <= _dict_bytes(entries)


def filled(index: KVIndex, replicas: int, blocks: int, shared: bool) -> None:
    """Chains of 64 blocks at each replica: the same ones, or others."""
    chance = Random(1)
    bits = [index.join() for _ in range(replicas)]
    for bit in bits:
        chance = Random(1) if shared else chance
        for _ in range(blocks // 64):
            hashes = [chance.getrandbits(64) for _ in range(64)]
            index.apply(bit, BlockStored(list(hashes), [chance.getrandbits(17) for _ in range(64)], 1))


@pytest.mark.parametrize(("shared", "most"), [(False, 220), (True, 220 / 16)])
def test_a_block_takes_few_bytes(shared: bool, most: float) -> None:
    """By replica; one that others have as well next to nothing."""
    tracemalloc.start()
    index = KVIndex(1 << 25)
    empty = tracemalloc.get_traced_memory()[0]
    filled(index, 32, 1024, shared)
    used = tracemalloc.get_traced_memory()[0] - empty
    tracemalloc.stop()
    assert len(index) == (1024 if shared else 32 * 1024)
    assert used / (32 * 1024) <= most
    assert used <= 1.1 * index.nbytes


def test_the_bound_holds_by_tracemalloc() -> None:
    bound = 1 << 21
    tracemalloc.start()
    index = KVIndex(bound)
    filled(index, 8, 4096, False)
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert index.nbytes <= bound
    assert bound / 600 < len(index) < 8 * 4096
    assert most <= bound + 200_000  # beside the index there is an event
