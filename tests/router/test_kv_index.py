"""The KV index against a naive one, under any order of events, and within its bound of bytes."""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple

from hypothesis import given, settings
from hypothesis import strategies as st
from xxhash import xxh3_64_intdigest

from router.core.blocks import Keys, block_keys, root_key
from router.core.kv_events import BlockRemoved, BlockStored, Tier
from router.core.kv_index import HISTORY, Held, KVIndex, bits_of


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
        if engine.sure[block] == engine.maybe[block] == 1 and not content.images and self.exact:
            assert left == content.keyed()[-1:]
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


@settings(max_examples=100)
@given(st.lists(steps, min_size=30, max_size=80))
def test_it_equals_a_naive_index(taken: list[Step]) -> None:
    world = World(KVIndex(1 << 20), exact=True)
    for step in taken:
        world.take(step)


@settings(max_examples=60)
@given(st.lists(steps, min_size=30, max_size=80))
def test_in_little_room_it_claims_less_and_never_more(taken: list[Step]) -> None:
    world = World(KVIndex(1 << 13, generation=4), exact=False)
    for step in taken:
        world.take(step)
        assert len(world.index) <= 8 * world.index._count
