"""The simulated engine as a pure state machine: continuous batching over a paged, prefix-cached KV cache.

It has no clock, no socket and no tokens of its own. A live server steps it in real time with sequences of
token ids; a simulator steps it in virtual time with sequences known only by their length and block keys.
"""

from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from math import inf
from typing import NamedTuple, Protocol

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
    """The sizes that decide how an engine batches; names as vLLM's flags."""

    step_time: StepTime
    num_gpu_blocks: int
    block_size: int = 16
    max_num_seqs: int = 256
    max_num_batched_tokens: int = 8192
    enable_prefix_caching: bool = True

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
    """Prompt tokens found in the cache at first admission; None before."""
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


class Quiet(NamedTuple):
    """Steps in a row that do nothing but decode one token each for the same sequences, and when they end."""

    steps: int
    ends: float


class Engine:
    """Schedules sequences first come, first served.

    Blocks are taken as a sequence grows, and when there are none left the latest sequence is preempted and
    computed again later: vLLM does so, and reserving max_tokens up front would idle most of the cache, since
    clients ask for far more tokens than they get.
    """

    def __init__(self, config: EngineConfig) -> None:
        self.config = config
        self.cache = KVCache(config.num_gpu_blocks)
        self._waiting: OrderedDict[str, Sequence] = OrderedDict()
        self._running: dict[str, Sequence] = {}
        self._preempted = 0
        # Whether the first in line had no room, and nothing has made any since.
        self._full = False

    @property
    def num_waiting(self) -> int:
        """Sequences in line."""
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        """Sequences in the batch."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting or self._running)

    @property
    def kv_usage(self) -> float:
        """Share of blocks that sequences use, 0 to 1; cached blocks that nobody uses do not count."""
        return 1 - self.cache.num_free / self.cache.capacity

    def add(self, id: str, content: Content, max_tokens: int, now: float) -> Sequence:
        """Put a sequence in line. ValueError if it could never fit or its id is taken."""
        if id in self._waiting or id in self._running:
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
        sequence = self._waiting.pop(id, None) or self._running.pop(id, None)
        if sequence is None:
            return False
        self._release(sequence)
        return True

    def reset_prefix_cache(self) -> bool:
        """Forget all cached blocks; False, and nothing done, while any is in use."""
        return self.cache.reset()

    def step(self, now: float) -> Step | None:
        """Begin a step at `now` and say what it brings; None if there is nothing to do."""
        self._preempted = 0
        self._full = False
        admitted: list[Sequence] = []
        batch = list(self._schedule(now, admitted))
        if not batch:
            return None
        work = self._work(batch)
        return Step(
            duration=self.config.step_time.seconds(work),
            work=work,
            outputs=self._compute(batch),
            events=self.cache.take_events(),
            admitted=admitted,
            preempted=self._preempted,
        )

    def quiet(self, now: float, until: float = inf) -> Quiet:
        """The quiet steps from `now` on, as far as they begin before `until`. Changes nothing.

        They are those for which `skip` does the same as `step`: no sequence comes, ends, or fills or takes a
        block. Only for contents that end by max_tokens, since nobody asks these what they say.
        """
        most = self._num_quiet()
        decoding = len(self._running)
        context = sum([sequence.num_tokens for sequence in self._running.values()]) if most else 0
        seconds = self.config.step_time.decode_seconds
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
        while budget and self._waiting and not self._preempted:
            sequence = next(iter(self._waiting.values()))
            if len(self._running) >= self.config.max_num_seqs or not self._admit(sequence, now, admitted):
                self._full = True
                break
            count = min(sequence.num_tokens - sequence.num_computed, budget)
            self._grow(sequence, count)
            budget -= count
            yield sequence, count

    def _admit(self, sequence: Sequence, now: float, admitted: list[Sequence]) -> bool:
        """Move the first in line into the batch with its cached prefix, if all of its tokens fit now."""
        hits = self._cached_prefix(sequence)
        needed = self._num_blocks(sequence.num_tokens) - len(hits)
        if needed > self.cache.num_free_without(hits):
            return False
        self.cache.share(hits)
        sequence.blocks = hits
        sequence.num_stored = len(hits)
        sequence.num_computed = len(hits) * self.config.block_size
        del self._waiting[sequence.id]
        self._running[sequence.id] = sequence
        if sequence.scheduled is None:
            sequence.scheduled = now
            sequence.cached_tokens = sequence.num_computed
            admitted.append(sequence)
        return True

    def _cached_prefix(self, sequence: Sequence) -> list[int]:
        if not self.config.enable_prefix_caching:
            return []
        # The last token is always computed, for its logits: a full hit gives up its last block.
        reusable = (sequence.num_tokens - 1) // self.config.block_size
        return self.cache.longest_prefix(sequence.content.key(block) for block in range(reusable))

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
        return True

    def _preempt(self, sequence: Sequence) -> None:
        del self._running[sequence.id]
        self._release(sequence)
        sequence.num_computed = sequence.num_stored = 0
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
                self._release(sequence)
            outputs.append(Output(sequence, finish))
        return outputs

    def _release(self, sequence: Sequence) -> None:
        self._full = False
        if sequence.blocks is not None:
            self.cache.release(sequence.blocks)
            sequence.blocks = None

    def _num_blocks(self, num_tokens: int) -> int:
        return -(-num_tokens // self.config.block_size)
