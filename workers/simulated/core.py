"""The simulated engine as a pure state machine: continuous batching over a paged, prefix-cached KV cache.

It has no clock, no socket and no tokens of its own. A live server steps it in real time with sequences of
token ids; a simulator steps it in virtual time with sequences known only by their length and block keys.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum, StrEnum, auto
from itertools import takewhile
from math import inf
from typing import NamedTuple, Protocol

from workers.simulated.cpu_tier import CpuTier
from workers.simulated.kv_cache import BlockKey, CacheEvent, KVCache
from workers.simulated.step_time import StepTime, StepWork


class Finish(StrEnum):
    """Why a sequence ended, in vLLM's words."""

    STOP = "stop"
    LENGTH = "length"


class Content(Protocol):
    """What a sequence says. The engine needs only its length, its block keys and its next token."""

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of the prompt, at least 1."""

    def key(self, block: int) -> BlockKey:
        """The key of full block number `block`, all of whose tokens exist."""

    def extend(self) -> bool:
        """Say one more token; True if it ends the sequence."""


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """The sizes that decide how an engine batches; names as vLLM's flags.

    `num_cpu_blocks`: of those, in host memory, 0 for none.
    """

    step_time: StepTime
    num_gpu_blocks: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    enable_prefix_caching: bool = True
    num_cpu_blocks: int = 0

    def __post_init__(self) -> None:
        for name in ("block_size", "max_num_seqs", "max_num_batched_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, not {getattr(self, name)}")


@dataclass(slots=True, eq=False)
class Sequence:
    """One request inside the engine. Read it from outside; only the engine writes."""

    id: str
    content: Content
    max_tokens: int
    arrived: float
    num_tokens: int
    """Prompt and output so far."""
    num_computed: int = 0
    """Tokens whose KV is in the cache."""
    num_stored: int = 0
    """Leading blocks that have been made findable."""
    blocks: list[int] | None = None
    """Held KV blocks; None while waiting."""
    cached_tokens: int | None = None
    """Prompt tokens found in the cache, on whatever tier, when first looked for; None before."""
    loaded_tokens: int = 0
    """Of these, those that were found on the CPU."""
    offered: tuple[int, int] = (0, 0)
    """From which block to which the CPU tier was asked for its blocks."""
    scheduled: float | None = None
    preemptions: int = 0

    @property
    def num_outputs(self) -> int:
        """Tokens generated so far."""
        return self.num_tokens - self.content.num_prompt_tokens


class Output(NamedTuple):
    """One new token of one sequence."""

    sequence: Sequence
    finish: Finish | None


@dataclass(frozen=True, slots=True)
class Step:
    """What one step does and what is there when it is over, `duration` seconds after it began."""

    duration: float
    work: StepWork
    outputs: list[Output]
    events: list[CacheEvent]
    admitted: list[Sequence]
    """Sequences that left the waiting line for the first time."""
    preempted: int


class Load(NamedTuple):
    """Blocks on their way from the CPU to the GPU for a sequence, which waits for them."""

    sequence: Sequence
    keys: list[BlockKey]
    ends: float


class Entry(Enum):
    """What became of a sequence in line."""

    RUNS = auto()
    WAITS = auto()
    """For blocks that are loaded for it or for another."""
    HAS_NO_ROOM = auto()


class Quiet(NamedTuple):
    """Steps in a row that do nothing but decode one token each for the same sequences, and when they end."""

    steps: int
    ends: float


class Engine:
    """Schedules sequences first come, first served.

    Blocks are taken as a sequence grows, and when there are none left the latest sequence is preempted and
    computed again later: vLLM does so, and reserving max_tokens up front would idle most of the cache, since
    clients ask for far more tokens than they get.

    With a CPU tier it does as vLLM's OffloadingConnector, except that copies take no time: full blocks of
    prompts are there with the step that computes them. What is found there behind the GPU's part of a prefix
    is loaded, one load after the other, while others are computed; who would load a block that is on its way
    waits for that.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.cache = KVCache(config.num_gpu_blocks)
        self.cpu = CpuTier(config.num_cpu_blocks)
        self._waiting: OrderedDict[str, Sequence] = OrderedDict()
        self._running: dict[str, Sequence] = {}
        self._loads: dict[str, Load] = {}  # in the order of their ends
        self._link_free = 0.0  # when the last of them is over
        self._preempted = 0
        # Whether the first in line had no room, and nothing has made any since.
        self._full = False

    @property
    def num_waiting(self) -> int:
        """Sequences in line, with those whose blocks are being loaded."""
        return len(self._waiting) + len(self._loads)

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting or self._running or self._loads)

    @property
    def kv_usage(self) -> float:
        """Share of blocks that sequences use, 0 to 1; cached blocks that nobody uses do not count."""
        return 1 - self.cache.num_free / self.cache.capacity

    def add(self, id: str, content: Content, max_tokens: int, now: float) -> Sequence:
        """Put a sequence in line. ValueError if it could never fit or its id is taken."""
        if id in self._waiting or id in self._running or id in self._loads:
            raise ValueError(f"sequence {id} is already here")
        if max_tokens < 1:
            raise ValueError(f"max_tokens must be at least 1, not {max_tokens}")
        if self._num_blocks(content.num_prompt_tokens + max_tokens - 1) > self.cache.capacity:
            raise ValueError(f"sequence {id} does not fit into {self.cache.capacity} KV blocks")
        sequence = Sequence(id, content, max_tokens, now, num_tokens=content.num_prompt_tokens)
        self._waiting[id] = sequence
        return sequence

    def abort(self, id: str) -> bool:
        """Drop a sequence and free its blocks at once; False if it is not here."""
        sequence = self._waiting.pop(id, None) or self._running.pop(id, None) or self._stop_loading(id)
        if sequence is None:
            return False
        self._leave(sequence)
        return True

    def _stop_loading(self, id: str) -> Sequence | None:
        """Whose load that was; the transfer itself goes on to its end."""
        load = self._loads.pop(id, None)
        if load is None:
            return None
        self.cpu.end_load(load.keys)
        return load.sequence

    def reset_prefix_cache(self, external: bool = False) -> bool:
        """Forget all cached blocks, with `external` those on the CPU too.

        False, and nothing done, while any is in use.
        """
        if not self.cache.reset():
            return False
        if external:
            self.cpu.reset()
        return True

    def step(self, now: float) -> Step | None:
        """Begin a step at `now` and say what it brings; None if there is nothing to do."""
        self._preempted = 0
        self._full = False
        admitted: list[Sequence] = []
        batch = list(self._schedule(now, admitted))
        if not batch:
            return self._pause(now) if self._loads else None
        work = self._work(batch)
        return Step(
            duration=self.config.step_time.seconds(work),
            work=work,
            outputs=self._compute(batch),
            events=self._take_events(),
            admitted=admitted,
            preempted=self._preempted,
        )

    def _pause(self, now: float) -> Step:
        """A step in which nothing can be done before a load is over: the shortest, or until that."""
        shortest = self.config.step_time.step
        left = self._next_loaded() - now
        duration = min(shortest, left) if left > 0 else shortest
        return Step(duration, StepWork(), [], self._take_events(), [], self._preempted)

    def _next_loaded(self) -> float:
        """When the first load under way is over."""
        return next((load.ends for load in self._loads.values()), inf)

    def _take_events(self) -> list[CacheEvent]:
        """Those of the GPU first: what enters the CPU tier has been there."""
        return self.cache.take_events() + self.cpu.take_events()

    def quiet(self, now: float, until: float = inf) -> Quiet:
        """The quiet steps from `now` on, as far as they begin before `until`. Changes nothing.

        They are those for which `skip` does the same as `step`: no sequence comes, ends, or fills or takes a
        block, and no load ends. Only for contents that end by max_tokens: nobody asks these what they say.
        """
        most = self._num_quiet()
        decoding = len(self._running)
        context = sum([sequence.num_tokens for sequence in self._running.values()]) if most else 0
        seconds = self.config.step_time.decode_seconds
        until = min(until, self._next_loaded())
        steps = 0
        while steps < most and now < until:
            # Added up step by step, so that the times are those of single steps to the last bit.
            now += seconds(decoding, context)
            context += decoding
            steps += 1
        return Quiet(steps, now)

    def skip(self, steps: int) -> None:
        """Do as many quiet steps at once."""
        for sequence in self._running.values():
            sequence.num_computed += steps
            sequence.num_tokens += steps

    def _num_quiet(self) -> int:
        if not self._running or (self._waiting and not self._full):
            return 0
        noisy = inf  # the first step that ends a sequence or fills a block; the one after that takes a block
        for sequence in self._running.values():
            outputs = sequence.num_outputs
            if not outputs or sequence.num_tokens - sequence.num_computed != 1:
                return 0
            noisy = min(noisy, sequence.max_tokens - outputs, -sequence.num_computed % self.config.block_size)
        return max(0, int(noisy) - 1)

    def _schedule(self, now: float, admitted: list[Sequence]) -> Iterator[tuple[Sequence, int]]:
        """Sequences of this step with the number of tokens each computes: running ones first."""
        budget = self.config.max_num_batched_tokens
        for sequence in list(self._running.values()):
            if not budget or sequence.id not in self._running:
                break
            count = min(sequence.num_tokens - sequence.num_computed, budget)
            if self._grow(sequence, count):
                budget -= count
                yield sequence, count
        for sequence in [*self._loaded(now), *self._waiting.values()]:
            if not budget or self._preempted:
                break
            entry = self._enter(sequence, now)
            if entry is Entry.HAS_NO_ROOM:
                self._full = True
                break
            if entry is Entry.WAITS:
                continue
            self._running[sequence.id] = sequence
            if sequence.scheduled is None:
                sequence.scheduled = now
                admitted.append(sequence)
            count = min(sequence.num_tokens - sequence.num_computed, budget)
            self._grow(sequence, count)
            budget -= count
            yield sequence, count

    def _loaded(self, now: float) -> list[Sequence]:
        """Sequences whose loads are over."""
        return [load.sequence for load in takewhile(lambda load: load.ends <= now, self._loads.values())]

    def _enter(self, sequence: Sequence, now: float) -> Entry:
        """Move a sequence in line into the batch with its cached prefix, if all of its tokens fit now."""
        if len(self._running) >= self.config.max_num_seqs:
            return Entry.HAS_NO_ROOM
        if sequence.id in self._loads:
            return self._take_load(sequence)
        hits, keys = self._cached_prefix(sequence)
        if self.cpu.is_loading(keys):
            return Entry.WAITS
        needed = self._num_blocks(sequence.num_tokens) - len(hits)
        if needed > self.cache.num_free_without(hits) - self._reserved():
            return Entry.HAS_NO_ROOM
        self.cache.share(hits)
        sequence.blocks = hits
        sequence.num_stored = len(hits)
        sequence.num_computed = (len(hits) + len(keys)) * self.config.block_size
        del self._waiting[sequence.id]
        if sequence.cached_tokens is None:
            sequence.cached_tokens = sequence.num_computed
            sequence.loaded_tokens = len(keys) * self.config.block_size
        if not keys:
            return Entry.RUNS
        self._begin_load(sequence, keys, now)
        return Entry.WAITS

    def _cached_prefix(self, sequence: Sequence) -> tuple[list[int], list[BlockKey]]:
        """The blocks of its prefix on the GPU, and the keys of those that follow on the CPU."""
        if not self.config.enable_prefix_caching:
            return [], []
        # The last token is always computed, for its logits: a full hit gives up its last block.
        reusable = (sequence.num_tokens - 1) // self.config.block_size
        key = sequence.content.key
        hits = self.cache.longest_prefix(key(block) for block in range(reusable))
        if not self.cpu.capacity:
            return hits, []
        return hits, self.cpu.prefix(key(block) for block in range(len(hits), reusable))

    # -- the CPU tier

    def _reserved(self) -> int:
        """Blocks that those who load will need beside those they hold: nobody could free any for them."""
        reserved = 0
        for sequence, _, _ in self._loads.values():
            assert sequence.blocks is not None
            reserved += self._num_blocks(sequence.num_tokens) - len(sequence.blocks)
        return reserved

    def _begin_load(self, sequence: Sequence, keys: list[BlockKey], now: float) -> None:
        assert sequence.blocks is not None
        first = len(sequence.blocks)
        sequence.blocks += self.cache.allocate(len(keys))
        sequence.offered = (first, len(sequence.blocks))
        self.cpu.begin_load(keys)
        seconds = len(keys) * self.config.block_size * self.config.step_time.loading
        self._link_free = max(now, self._link_free) + seconds
        self._loads[sequence.id] = Load(sequence, keys, self._link_free)

    def _take_load(self, sequence: Sequence) -> Entry:
        """A load is over: its blocks are ordinary ones from now on."""
        assert sequence.blocks is not None
        if self._num_blocks(sequence.num_tokens) - len(sequence.blocks) > self.cache.num_free:
            return Entry.HAS_NO_ROOM
        self._stop_loading(sequence.id)
        first, end = sequence.offered
        self.cache.store(sequence.content, sequence.blocks, first, end - first)
        sequence.num_stored = end
        return Entry.RUNS

    def _offload(self, sequence: Sequence, full: int) -> None:
        """Copy to the CPU what is new of a prompt's first `full` blocks; what finds no room is left out."""
        first, end = sequence.offered
        full = min(full, sequence.content.num_prompt_tokens // self.config.block_size)
        if full > end and self.cpu.capacity:
            self.cpu.store(sequence.content, end, full)
            sequence.offered = (first, full)

    # -- the GPU

    def _grow(self, sequence: Sequence, count: int) -> bool:
        """Hold the blocks for `count` more tokens and make full ones findable; False if it was preempted."""
        assert sequence.blocks is not None
        end = sequence.num_computed + count
        missing = self._num_blocks(end) - len(sequence.blocks)
        if missing > 0:
            while self.cache.num_free < missing:
                latest = next(reversed(self._running.values()))
                self._preempt(latest)
                if latest is sequence:
                    return False
            sequence.blocks += self.cache.allocate(missing)
        full = end // self.config.block_size
        if full > sequence.num_stored and self.config.enable_prefix_caching:
            self.cache.store(
                sequence.content, sequence.blocks, sequence.num_stored, full - sequence.num_stored
            )
            sequence.num_stored = full
        if self.config.enable_prefix_caching:
            self._offload(sequence, full)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        del self._running[sequence.id]
        self._release(sequence)
        sequence.num_computed = sequence.num_stored = 0
        sequence.offered = (0, 0)
        sequence.preemptions += 1
        self._preempted += 1
        self._waiting[sequence.id] = sequence
        self._waiting.move_to_end(sequence.id, last=False)

    def _work(self, batch: list[tuple[Sequence, int]]) -> StepWork:
        prefill = decoding = context = 0
        attention = 0.0
        for sequence, count in batch:
            if count == 1 and sequence.num_outputs:
                decoding += 1
                context += sequence.num_tokens
            else:
                prefill += count
                attention += count * (sequence.num_computed + count / 2)
        return StepWork(prefill, attention, decoding, context)

    def _compute(self, batch: list[tuple[Sequence, int]]) -> list[Output]:
        """Let each sequence whose tokens are all computed say its next one."""
        outputs: list[Output] = []
        for sequence, count in batch:
            sequence.num_computed += count
            if sequence.num_computed < sequence.num_tokens:
                continue
            stopped = sequence.content.extend()
            sequence.num_tokens += 1
            finish = Finish.STOP if stopped else None
            if not stopped and sequence.num_outputs == sequence.max_tokens:
                finish = Finish.LENGTH
            if finish is not None:
                del self._running[sequence.id]
                self._leave(sequence)
            outputs.append(Output(sequence, finish))
        return outputs

    def _leave(self, sequence: Sequence) -> None:
        """A sequence is over."""
        self._release(sequence)
        self.cpu.touch(sequence.content, *sequence.offered)

    def _release(self, sequence: Sequence) -> None:
        self._full = False
        if sequence.blocks is not None:
            self.cache.release(sequence.blocks)
            sequence.blocks = None

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)
