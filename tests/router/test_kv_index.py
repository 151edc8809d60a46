"""The KV index against a naive one, under any order of events, and within its bound of bytes."""

from __future__ import annotations

from array import array
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import takewhile
from typing import NamedTuple

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, rule
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

    def keys(self) -> Keys:
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
contents = st.builds(
    Content,
    size=st.sampled_from((2, 3)),
    tokens=st.builds(
        lambda tokens, blocks: tokens[: blocks * 3], st.sampled_from(SEQUENCES), st.integers(1, 4)
    ),
    adapter=st.sampled_from((None, None, "a")),
    salt=st.sampled_from((None, None, "a", "s")),
    images=st.sampled_from((frozenset(), frozenset(), frozenset({1}))),
).map(lambda content: content.prefix(content.blocks))
tiers = st.sampled_from((Tier.GPU, Tier.GPU, Tier.CPU, Tier.STORAGE))


class Comparison(RuleBasedStateMachine):
    """Engines that store, drop, lose events and restart; requests that come and go."""

    engines = Bundle("engines")
    flights = Bundle("flights")
    max_bytes = 1 << 20
    exact = True

    @initialize()
    def start(self) -> None:
        self.index = KVIndex(self.max_bytes, generation=4)
        self.all: list[Engine] = []
        self.promised: dict[int, set[int]] = {}
        self.unconfirmed: dict[int, set[int]] = {}

    @rule(
        target=engines, size=st.sampled_from((2, 3)), seed=st.sampled_from((0, 0, 1)), in_bytes=st.booleans()
    )
    def join(self, size: int, seed: int, in_bytes: bool) -> Engine:
        engine = Engine(self.index.join(), size, seed, in_bytes)
        assert not [other for other in self.all if other.bit == engine.bit]
        self.all.append(engine)
        return engine

    @rule(engine=consumes(engines))
    def leave(self, engine: Engine) -> None:
        self.index.leave(engine.bit)
        self._unpromise(engine)
        self.all.remove(engine)

    @rule(engine=engines)
    def forget(self, engine: Engine) -> None:
        self._unpromise(engine)
        engine.forgotten(self.index.forget(engine.bit))

    @rule(engine=engines)
    def restart(self, engine: Engine) -> None:
        engine.holds.clear()
        self.forget(engine)

    @rule(engine=engines, content=contents, tier=tiers, removed=st.booleans())
    def lose_an_event(self, engine: Engine, content: Content, tier: Tier, removed: bool) -> None:
        block = Block(tier, content)
        engine.holds[block] = max(0, engine.holds[block] + (-1 if removed else 1))
        self.forget(engine)

    @rule(engine=engines, content=contents, first=st.integers(0, 2), tier=tiers, bare=st.booleans())
    def store(self, engine: Engine, content: Content, first: int, tier: Tier, bare: bool) -> None:
        if content.size != engine.size or first >= content.blocks:
            return
        bare = bare and tier is not Tier.GPU
        new = [content.prefix(blocks) for blocks in range(first + 1, content.blocks + 1)]
        if bare:
            sure = engine.sized and all(self._named(engine, block) for block in new)
        else:
            sure = not first or self._named(engine, content.prefix(first))
            engine.sized = True
        self.index.apply(engine.bit, engine.stored(content, first, tier, bare))
        for told in (engine.holds, engine.maybe, *([engine.sure] if sure else ())):
            told.update(Block(tier, block) for block in new)
        if tier is Tier.GPU:
            keys = set() if content.images else set(content.keys()[first:])
            self._confirm(engine.bit, keys, sure)

    @rule(engine=engines, content=contents, tier=tiers)
    def remove(self, engine: Engine, content: Content, tier: Tier) -> None:
        block = Block(tier, content)
        left = self.index.apply(engine.bit, engine.removed(content, tier))
        if engine.sure[block] == engine.maybe[block] and not content.images and self.exact:
            assert left == (content.keys()[-1:] if engine.sure[block] == 1 else []) or not engine.sure[block]
        for told in (engine.holds, engine.maybe, engine.sure):
            told[block] = max(0, told[block] - 1)

    @rule(target=flights, engine=engines, content=contents, history=st.booleans())
    def place(self, engine: Engine, content: Content, history: bool) -> tuple[int, Keys]:
        bit, keys = engine.bit << (HISTORY if history else 0), content.keys()
        promised, unconfirmed = self._promises(bit)
        own = self.index.expect(bit, keys)
        if self.exact:
            assert set(keys) - promised <= set(own) <= set(keys) - unconfirmed
        promised.update(own)
        unconfirmed.update(own)
        return bit, own

    @rule(flight=consumes(flights))
    def end(self, flight: tuple[int, Keys]) -> None:
        bit, own = flight
        self.index.withdraw(bit, own)
        for promises in self._promises(bit):
            promises.difference_update(own)

    @rule(engine=engines, content=contents, capacity=st.integers(1, 6))
    def send(self, engine: Engine, content: Content, capacity: int) -> None:
        keys = content.keys()
        self.index.remember(engine.bit, keys, capacity)
        for key in reversed(keys):
            engine.sent[key] = None
            engine.sent.move_to_end(key)
        while len(engine.sent) > capacity:
            engine.sent.popitem(last=False)
        self._confirm(engine.bit << HISTORY, set(keys), True)

    @rule(content=contents, among=st.sets(st.integers(0, 5)), history=st.booleans())
    def match(self, content: Content, among: set[int], history: bool) -> None:
        asked = [engine for place, engine in enumerate(self.all) if place in among]
        bits = {engine.bit << (HISTORY if history else 0): engine for engine in asked}
        found = self.index.match(content.keys(), sum(bits))
        told = {bit: held for held in found for bit in bits_of(held.bits)}
        assert len(told) == sum(held.bits.bit_count() for held in found)
        assert told.keys() <= bits.keys()
        assert all(held.blocks + held.slower for held in found)
        for bit, engine in bits.items():
            self._check(engine, bit, content, told.get(bit, Held(bit, 0, 0)))

    def teardown(self) -> None:
        for sequence in SEQUENCES:
            for size in (2, 3):
                self.match(Content(size, sequence), set(range(6)), False)
        assert self.index.nbytes <= self.max_bytes + 200 * 3 * self.index._count

    def _check(self, engine: Engine, bit: int, content: Content, held: Held) -> None:
        prefixes = [content.prefix(blocks + 1) for blocks in range(content.blocks)]
        keys = content.keys()
        promised, unconfirmed = self._promises(bit)
        has: list[Callable[[int], bool]] = []
        for told, promises in ((engine.sure, unconfirmed), (engine.maybe, promised)):
            if bit == engine.bit:
                has.append(
                    lambda n, told=told, p=promises: told[Block(Tier.GPU, prefixes[n])] or keys[n] in p
                )
            else:
                has.append(lambda n, p=promises: keys[n] in engine.sent or keys[n] in p)
        least, most = (len(list(takewhile(test, range(content.blocks)))) for test in has)
        assert held.blocks <= most
        if self.exact:
            assert held.blocks >= least
        behind = range(held.blocks, content.blocks)
        least, most = (
            len(list(takewhile(lambda n, told=told: self._slower(told, prefixes[n]), behind)))
            for told in (engine.sure, engine.maybe)
        )
        if bit != engine.bit:
            least = most = 0
        assert held.slower <= most
        if self.exact:
            assert held.slower >= least
        assert all(engine.maybe[block] <= engine.holds[block] for block in engine.maybe)

    @staticmethod
    def _slower(told: Counter[Block], content: Content) -> bool:
        return bool(told[Block(Tier.CPU, content)] or told[Block(Tier.STORAGE, content)])

    def _named(self, engine: Engine, content: Content) -> bool:
        """Whether an engine that hashes alike told for certain that it holds this."""
        alike = [other for other in self.all if (other.seed, other.size) == (engine.seed, engine.size)]
        return any(other.sure[Block(tier, content)] for other in alike for tier in Tier)

    def _promises(self, bit: int) -> tuple[set[int], set[int]]:
        return self.promised.setdefault(bit, set()), self.unconfirmed.setdefault(bit, set())

    def _confirm(self, bit: int, keys: Iterable[int], sure: bool) -> None:
        promised, unconfirmed = self._promises(bit)
        unconfirmed.difference_update(keys)
        if sure:
            promised.difference_update(keys)

    def _unpromise(self, engine: Engine) -> None:
        for bit in (engine.bit, engine.bit << HISTORY):
            self.promised.pop(bit, None)
            self.unconfirmed.pop(bit, None)


class Bounded(Comparison):
    """The same in a few blocks' room: it may claim less, never more."""

    max_bytes = 1 << 13
    exact = False


Comparison.TestCase.settings = settings(max_examples=300, stateful_step_count=60)
Bounded.TestCase.settings = settings(max_examples=200, stateful_step_count=60)
TestComparison = Comparison.TestCase
TestBounded = Bounded.TestCase
