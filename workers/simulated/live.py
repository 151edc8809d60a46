"""The engine in real time: one task steps it, sleeps while the step lasts, then hands out the tokens."""

import asyncio
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field

from workers.simulated import core, errors
from workers.simulated.events import KVEventPublisher
from workers.simulated.faults import Faults
from workers.simulated.language import Language, TokenSequence
from workers.simulated.metrics import EngineMetrics
from workers.simulated.text import TextStream

ABORT = "abort"

# A late step is made up for by shorter sleeps, but never more than this much of it (seconds).
MAX_LAG = 0.1


@dataclass(frozen=True, slots=True)
class Sampling:
    """What a request asks of its outputs. Temperature and seed have no part: output is deterministic."""

    max_tokens: int
    n: int = 1
    min_tokens: int = 0
    ignore_eos: bool = False
    stop: tuple[str, ...] = ()
    stop_token_ids: frozenset[int] = frozenset()
    include_stop: bool = False
    skip_special_tokens: bool = True
    cache_salt: str | None = None


@dataclass(slots=True)
class Delta:
    """What one choice has said since it was last asked."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    stop_reason: int | str | None = None


@dataclass(slots=True, eq=False)
class Choice:
    """One sequence of a generation, with its text."""

    index: int
    generation: "Generation"
    tokens: TokenSequence
    text: TextStream
    sequence: core.Sequence
    first_token: float | None = None
    last_token: float = 0.0


class GenerationAbortedError(Exception):
    """The client left before the answer was whole."""


class Generation:
    """A request under way: iterate over what its choices say. Slow readers get several tokens at once."""

    def __init__(self, engine: "LiveEngine", prompts: Sequence[list[int]]) -> None:
        self.prompts = prompts
        self.choices: list[Choice] = []
        self._engine = engine
        self._pending: dict[int, Delta] = {}
        self._unfinished = 0
        self._aborted = False
        self._error: errors.ApiError | None = None
        self._waiter: asyncio.Future[None] | None = None

    @property
    def num_prompt_tokens(self) -> int:
        """Tokens of all prompts."""
        return sum(len(prompt) for prompt in self.prompts)

    @property
    def cached_tokens(self) -> int:
        """Tokens of the last prompt that were found in the cache."""
        return self.choices[-1].sequence.cached_tokens or 0 if self.choices else 0

    def put(self, delta: Delta) -> None:
        """Add what a choice said; merged with what was not yet read."""
        before = self._pending.get(delta.index)
        if before is None:
            self._pending[delta.index] = delta
        else:
            before.text += delta.text
            before.token_ids += delta.token_ids
            before.finish_reason, before.stop_reason = delta.finish_reason, delta.stop_reason
        if delta.finish_reason is not None:
            self._unfinished -= 1
        self._wake()

    def expect(self, choices: int) -> None:
        """Say how many choices will finish."""
        self._unfinished = choices

    def fail(self, error: errors.ApiError) -> None:
        """End with an error after what was said."""
        self._error = error
        self._wake()

    def abort(self) -> None:
        """Stop now and free what the engine holds for it."""
        for choice in self.choices:
            self._engine.abort(choice)
        self._unfinished = 0
        self._aborted = True
        self._wake()

    async def __aiter__(self) -> AsyncIterator[Delta]:
        """Deltas until every choice has finished. Raises the ApiError it failed with."""
        while self._pending or self._unfinished > 0:
            if not self._pending:
                if self._error is not None:
                    raise self._error
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter
            pending, self._pending = self._pending, {}
            for delta in pending.values():
                yield delta

    async def whole(self) -> list[Delta]:
        """What every choice said, when all have finished. GenerationAbortedError if they never will."""
        result: dict[int, Delta] = {}
        async for delta in self:
            if (before := result.setdefault(delta.index, delta)) is not delta:
                before.text += delta.text
                before.token_ids += delta.token_ids
                before.finish_reason, before.stop_reason = delta.finish_reason, delta.stop_reason
        if self._aborted:
            raise GenerationAbortedError
        return [result[index] for index in sorted(result)]

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class LiveEngine:
    """Drives a core against the clock. One task runs it; everything else is called from the same loop."""

    def __init__(
        self,
        engine: core.Engine,
        language: Language,
        metrics: EngineMetrics,
        faults: Faults,
        publisher: KVEventPublisher | None,
        *,
        max_num_queued_reqs: int | None = None,
    ) -> None:
        self.core = engine
        self.language = language
        self.metrics = metrics
        self.draining = False
        self._faults = faults
        self._publisher = publisher
        self._max_queued = max_num_queued_reqs
        self._choices: dict[str, Choice] = {}
        self._work = asyncio.Event()
        self._idle = asyncio.Event()
        self._idle.set()

    def generate(
        self, id: str, prompts: Sequence[list[int]], sampling: Sampling, script: Sequence[int] | None = None
    ) -> Generation:
        """Start n choices for each prompt; choice i of prompt p has index p * n + i."""
        generation = Generation(self, prompts)
        generation.expect(len(prompts) * sampling.n)
        if self.draining:  # vLLM takes such a request and aborts it
            for index in range(len(prompts) * sampling.n):
                generation.put(Delta(index, finish_reason=ABORT))
            return generation
        now = asyncio.get_running_loop().time()
        for number, prompt in enumerate(prompts):
            self.metrics.params_n.observe(sampling.n)
            for choice in range(sampling.n):
                self._start(generation, f"{id}-{number}-{choice}", prompt, choice, sampling, script, now)
        self._work.set()
        self._idle.clear()
        return generation

    def _start(
        self,
        generation: Generation,
        id: str,
        prompt: list[int],
        choice: int,
        sampling: Sampling,
        script: Sequence[int] | None,
        now: float,
    ) -> None:
        tokens = TokenSequence(
            self.language,
            prompt,
            block_size=self.core.config.block_size,
            choice=choice,
            cache_salt=sampling.cache_salt,
            ignore_eos=sampling.ignore_eos,
            min_tokens=sampling.min_tokens,
            stop_token_ids=sampling.stop_token_ids,
            script=script,
        )
        text = TextStream(
            self.language.tokenizer.stream_after(prompt, skip_special_tokens=sampling.skip_special_tokens),
            stop=sampling.stop,
            include_stop=sampling.include_stop,
            min_tokens=sampling.min_tokens,
        )
        while id in self._choices:  # a client may use one X-Request-Id for several requests
            id += "'"
        sequence = self.core.add(id, tokens, sampling.max_tokens, now)
        self._choices[id] = Choice(len(generation.choices), generation, tokens, text, sequence)
        generation.choices.append(self._choices[id])

    def check_admission(self, n: int) -> None:
        """Raise the queue limit's error if `n` more sequences would exceed it."""
        if self._max_queued is not None and len(self._choices) + n > self._max_queued:
            self.metrics.rejections.inc()
            raise errors.busy()

    def abort(self, choice: Choice) -> None:
        """Drop a choice if it is still under way. Like vLLM, count it nowhere."""
        if self._forget(choice):
            self.core.abort(choice.sequence.id)

    async def run(self) -> None:
        """Step until cancelled. Waits without any cost while there is nothing to do."""
        clock = asyncio.get_running_loop().time
        due = clock()
        while True:
            if not self.core.has_work:
                self._work.clear()
                await self._work.wait()
                due = clock()
            await self._faults.while_hanging()
            step = self.core.step(clock())
            if step is None:  # the last sequence was aborted meanwhile
                continue
            due = max(due, clock() - MAX_LAG) + step.duration * self._faults.slowdown
            await asyncio.sleep(due - clock())
            self._deliver(step, clock())

    async def drain(self, timeout: float) -> None:
        """Refuse new requests and wait for those under way; after `timeout` seconds they fail."""
        self.draining = True
        if timeout <= 0:
            for choice in list(self._choices.values()):
                self.abort(choice)
                choice.generation.put(
                    Delta(choice.index, choice.text.take(finished=True), finish_reason=ABORT)
                )
            return
        try:
            await asyncio.wait_for(self._idle.wait(), timeout)
        except TimeoutError:
            for choice in list(self._choices.values()):
                self.abort(choice)
                choice.generation.fail(errors.engine_dead())

    def _deliver(self, step: core.Step, now: float) -> None:
        for output in step.outputs:
            choice = self._choices.get(output.sequence.id)
            if choice is not None:
                choice.generation.put(self._said(choice, output.finish, now))
        self.metrics.stepped(step)
        if self._publisher is not None and step.events:
            self._publisher.publish(step.events, lose=self._faults.take("drop_kv_events") is not None)

    def _said(self, choice: Choice, finish: core.Finish | None, now: float) -> Delta:
        """One new token of a choice as a delta; ends the choice if the token or the text does."""
        if choice.first_token is None:
            choice.first_token = now
            self.metrics.first_token.observe(now - choice.sequence.arrived)
        else:
            self.metrics.token_gap.observe(now - choice.last_token)
        choice.last_token = now
        token = choice.tokens.last_token
        stopped = choice.text.push(token, ends=finish is core.Finish.STOP)
        reason: str | None = finish
        if stopped is not None:
            reason = core.Finish.STOP
            self.core.abort(choice.sequence.id)
        text = choice.text.take(finished=reason is not None)
        if reason is None:
            return Delta(choice.index, text, [token])
        self._forget(choice)
        self._record(choice, reason)
        stop_reason = stopped if stopped is not None else choice.tokens.stop_token
        return Delta(choice.index, text, [token], str(reason), stop_reason)

    def _record(self, choice: Choice, reason: str) -> None:
        now = asyncio.get_running_loop().time()
        self.metrics.finished(choice.sequence, reason, choice.first_token, now)

    def _forget(self, choice: Choice) -> bool:
        if self._choices.pop(choice.sequence.id, None) is None:
            return False
        if not self._choices:
            self._idle.set()
        return True
