"""A chat's answer as it arrives: when, how many tokens, and whether it was whole."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import msgspec


class Delta(msgspec.Struct):
    """What a chunk adds to the answer. A reasoning model thinks before it speaks; both are tokens, and so is
    the call of a tool.
    """

    content: str | None = None
    reasoning_content: str | None = None
    reasoning: str | None = None
    tool_calls: list[msgspec.Raw] | None = None

    @property
    def says_something(self) -> bool:
        return bool(self.content or self.reasoning_content or self.reasoning or self.tool_calls)


class Choice(msgspec.Struct):
    """One answer; these users ask for no more. A stream has deltas, a whole answer a message."""

    delta: Delta = msgspec.field(default_factory=Delta)
    message: Delta = msgspec.field(default_factory=Delta)


class Details(msgspec.Struct):
    """Of the prompt's tokens, those that were in cache."""

    cached_tokens: int | None = None


class Usage(msgspec.Struct):
    """Tokens, as the engine counted them."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: Details | None = None

    @property
    def cached_tokens(self) -> int | None:
        """None if the engine does not tell."""
        return self.prompt_tokens_details and self.prompt_tokens_details.cached_tokens


class Chunk(msgspec.Struct):
    """One event of a chat stream, or a whole answer, as far as these users read it."""

    choices: list[Choice] = []
    usage: Usage | None = None
    error: object = None


class BrokenStream(Exception):
    """The stream did not end as a whole answer does."""


decode = msgspec.json.Decoder(Chunk).decode


@dataclass(slots=True)
class Answer:
    """What came, and when; times in seconds of `time.perf_counter`."""

    asked_at: float
    first_at: float | None = None
    last_at: float = 0.0
    usage: Usage = field(default_factory=Usage)
    parts: list[str] = field(default_factory=list)

    def read(self, events: Iterator[bytes]) -> None:
        """Reads a stream to its end; BrokenStream if that is not `[DONE]`, or if an event tells an error."""
        done = answered = False
        for data in events:
            done = done or data == b"[DONE]"
            if not done:
                chunk = decode(data)
                answered = answered or bool(chunk.choices)
                self._take(chunk)
        if not done:
            raise BrokenStream("the stream ended without [DONE]")
        if not answered:
            raise BrokenStream("the stream held no answer")

    def read_whole(self, body: bytes) -> None:
        """Reads an answer that came in one piece, of which no token has a time."""
        reply = decode(body)
        if reply.error is not None or not reply.choices:
            raise BrokenStream(f"no answer: {body[:200]!r}")
        self.usage = reply.usage or self.usage
        self.parts += [choice.message.content or "" for choice in reply.choices]

    def _take(self, chunk: Chunk) -> None:
        if chunk.error is not None:
            raise BrokenStream(f"error event: {chunk.error}")
        self.usage = chunk.usage or self.usage
        for choice in chunk.choices:
            if choice.delta.says_something:
                self.last_at = time.perf_counter()
                self.first_at = self.first_at or self.last_at
                self.parts.append(choice.delta.content or "")

    @property
    def text(self) -> str:
        return "".join(self.parts)

    @property
    def ttft_ms(self) -> float | None:
        """Time to first token; None if none came."""
        return None if self.first_at is None else (self.first_at - self.asked_at) * 1000

    @property
    def tpot_ms(self) -> float | None:
        """Mean time per output token after the first; None for answers of less than two."""
        tokens = self.usage.completion_tokens
        if self.first_at is None or tokens < 2:
            return None
        return (self.last_at - self.first_at) * 1000 / (tokens - 1)
