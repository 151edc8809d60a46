"""Whether a stream that broke off can go on at another replica, and what is asked there instead.

What vLLM does with each setting was tried on real engines: greedy and unseeded sampling, stop strings,
logit_bias and repetition_penalty go on as if nothing had happened. What counts or obeys by the output alone
does not, since the output so far is the next engine's prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import msgspec

from router.core.blocks import TOKEN_BYTES, Prompt
from router.core.continuation import BROKEN, Stops, seam
from router.http.sse import EventStream
from router.openai_api import Call
from router.prompts import UNREAD, Reading, pack
from router.splice import Spliced, Told, closing
from router.tokenizer import Tokenizers
from router.tokenizer_config import ANY

# By default streams go on; `off`: they end in an error, as behind any other router.
Mode = Literal["exact", "off"]
# vLLM's default for completions; a chat goes on to the end of its context.
COMPLETION_TOKENS = 16
# So much of a prompt decides how the text behind it begins.
CONTEXT_TOKENS = 8
COMPLETIONS = "/v1/completions"
OBJECTS = {COMPLETIONS: "text_completion", "/v1/chat/completions": "chat.completion.chunk"}

Stream = EventStream | Spliced


@dataclass(frozen=True, slots=True)
class Leg:
    """What the next replica is asked: what the client asked, or after a break the `rest` of its stream."""

    call: Call
    reading: Reading = UNREAD
    rest: Spliced | None = None


class _Format(msgspec.Struct):
    type: str = "text"


class Sampling(msgspec.Struct):
    """What of a request decides how it goes on."""

    n: int | None = None
    seed: int | None = None
    temperature: float | None = None
    frequency_penalty: float | None = None
    presence_penalty: float | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    min_tokens: int | None = None
    stop: str | list[str] | None = None
    include_stop_str_in_output: bool | None = None
    skip_special_tokens: bool | None = None
    response_format: _Format | None = None
    structured_outputs: dict[str, Any] | None = None
    tool_choice: str | dict[str, Any] | None = None
    prompt_logprobs: int | None = None
    repetition_detection: dict[str, Any] | None = None
    thinking_token_budget: Any = None
    bad_words: list[str] | None = None
    logprobs: Any = None
    include_reasoning: bool | None = None

    @property
    def stops(self) -> Stops:
        strings = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        return Stops(strings, bool(self.include_stop_str_in_output))

    @property
    def tells_each(self) -> bool:
        """Whether the client gets logprobs; 0 alternatives are still the token's own."""
        return self.logprobs is not None and self.logprobs is not False

    @property
    def obstacle(self) -> str:
        """Why no stream of such a request goes on elsewhere; empty if it does."""
        obstacles = {
            "it has several choices": (self.n or 1) > 1,
            "its random numbers would begin anew": self.seed is not None and self.temperature != 0,
            "its penalties count the output only": bool(self.frequency_penalty or self.presence_penalty),
            "its grammar would begin anew": self._obeys_a_grammar,
            "its repetitions are counted in the output only": self.repetition_detection is not None,
            "its forbidden words are looked for in the output only": bool(self.bad_words),
            "its prompt's logprobs would come again": self.prompt_logprobs is not None,
            "its reasoning is bounded or hidden": self.thinking_token_budget is not None
            or self.include_reasoning is False,
        }
        return next((why for why, stands in obstacles.items() if stands), "")

    @property
    def _obeys_a_grammar(self) -> bool:
        formatted = self.response_format is not None and self.response_format.type != "text"
        forced = self.tool_choice not in (None, "auto", "none")
        return formatted or forced or self.structured_outputs is not None

    def most(self, completion: bool) -> int | None:
        """Output tokens, if there is a limit."""
        if completion:
            return COMPLETION_TOKENS if self.max_tokens is None else self.max_tokens
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class NotContinuable(Exception):
    """The stream cannot go on elsewhere; the message says why."""


class Continuation:
    """Lets streams go on. `modes`: by model, or under `ANY` for all others."""

    def __init__(self, modes: Mapping[str, Mode], tokenizers: Tokenizers) -> None:
        self._modes = modes
        self._tokenizers = tokenizers

    def notes(self, leg: Leg) -> bool:
        """Whether a stream is to be noted, so that it could go on."""
        call = leg.call
        mode = self._modes.get(call.model, self._modes.get(ANY, "exact"))
        return call.transformed and call.family.path in OBJECTS and leg.reading.exact and mode == "exact"

    def onward(self, asked: Leg, stream: Stream | None, cached_tokens: int) -> Leg | bytes:
        """The rest of a stream, for another replica; or its ending, where only that is missing.

        `asked`: by the client. `cached_tokens`: of its prompt, where it began. Raises NotContinuable.
        """
        if stream is None or stream.transcript is None or asked.reading.prompt is None:
            raise NotContinuable("it was not noted")
        told = _told(stream, asked.reading.prompt, cached_tokens)
        sampling = _sampling(asked.call)
        if stream.transcript.finished and (sampling.n or 1) == 1:
            return closing(told, OBJECTS[asked.call.family.path], asked.call.wants_usage)
        if why := sampling.obstacle or stream.transcript.parsed:
            raise NotContinuable(why)
        return self._leg(asked, asked.reading.prompt, told, sampling)

    def _leg(self, asked: Leg, prompt: Prompt, told: Told, sampling: Sampling) -> Leg:
        call, most = asked.call, sampling.most(asked.call.family.path == COMPLETIONS)
        last = len(told.ids) if most is None else most - 1
        found = seam(told.ids, told.text, self._decode(call, prompt, sampling), sampling.stops, last)
        if found.again and sampling.temperature != 0:
            raise NotContinuable("what it would say again is drawn by chance")
        drawn_anew = found.kept < len(told.ids) and sampling.temperature != 0
        if drawn_anew and (call.wants_ids or sampling.tells_each):
            raise NotContinuable("the client was told of tokens that would be drawn anew")
        prompt = _longer(prompt, told.ids[: found.kept])
        rest = Spliced(told, found, call.wants_ids, call.wants_usage)
        return Leg(_rest(call, sampling, found.kept), Reading(prompt, sendable=True, exact=True), rest)

    def _decode(self, call: Call, prompt: Prompt, sampling: Sampling) -> Callable[[Sequence[int]], str]:
        """What makes text of output ids. It is read behind the prompt's end, as some tokenizers drop a space
        at a text's beginning; of a tool call that may have begun its marks are shown."""
        decode = self._tokenizers.decoder(call.model)
        if decode is None or prompt.token_ids is None:
            raise NotContinuable("its tokenizer is gone")
        skip = sampling.skip_special_tokens is not False and "tools" not in call.fields
        tail = memoryview(prompt.token_ids).cast("I").tolist()[-CONTEXT_TOKENS:]
        before = decode(tail, skip)
        if before.endswith(BROKEN):
            return lambda ids: decode(ids, skip)
        return lambda ids: decode([*tail, *ids], skip)[len(before) :]


def _told(stream: Stream, prompt: Prompt, cached_tokens: int) -> Told:
    if isinstance(stream, Spliced):
        return replace(stream.told, ids=stream.token_ids, text=stream.text)
    transcript = stream.transcript
    if transcript is None or transcript.origin is None:
        raise NotContinuable("nothing came of it yet")
    return Told(transcript.origin, stream.token_ids, transcript.text, prompt.num_tokens, cached_tokens)


def _sampling(call: Call) -> Sampling:
    try:
        return msgspec.json.decode(call.body, type=Sampling)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        raise NotContinuable("its settings cannot be read") from None


def _rest(call: Call, sampling: Sampling, kept: int) -> Call:
    """The request for what comes behind so many tokens of the output."""
    fields, most = dict(call.fields), sampling.most(call.family.path == COMPLETIONS)
    if most is not None:
        name = "max_tokens" if sampling.max_completion_tokens is None else "max_completion_tokens"
        fields[name] = _number(most - kept)
    if sampling.min_tokens:
        fields["min_tokens"] = _number(max(0, sampling.min_tokens - kept))
    return replace(call, fields=fields, body=msgspec.json.encode(fields))


def _longer(prompt: Prompt, ids: Sequence[int]) -> Prompt:
    """A prompt with output behind it."""
    assert prompt.token_ids is not None
    token_ids = prompt.token_ids + pack(ids)
    return Prompt(len(token_ids) // TOKEN_BYTES, token_ids, root=prompt.root)


def _number(value: int) -> msgspec.Raw:
    return msgspec.Raw(b"%d" % value)
