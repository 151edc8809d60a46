"""The rest of a stream from another engine, as the first one would have said it. Pure: bytes in, bytes out.

Only what comes after a break passes here, so every chunk is decoded.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import msgspec

from router.core.continuation import Seam
from router.errors import Diverged
from router.http.sse import EventStream, PromptTokensDetails, Shortcut, Splitter, Usage
from router.http.transcript import Origin, Transcript

_DATA = b"data: "
DONE = b"data: [DONE]\n\n"


@dataclass(frozen=True, slots=True)
class Told:
    """What a client had of a stream when it broke off.

    `ids`: of all tokens that were generated. `prompt_tokens`, `cached_tokens`: as its usage is to tell.
    """

    origin: Origin
    ids: list[int]
    text: str
    prompt_tokens: int
    cached_tokens: int

    def usage(self, completion_tokens: int) -> dict[str, Any]:
        """As if one engine had done it all."""
        return {
            "prompt_tokens": self.prompt_tokens,
            "total_tokens": self.prompt_tokens + completion_tokens,
            "completion_tokens": completion_tokens,
            "prompt_tokens_details": {"cached_tokens": self.cached_tokens},
        }


@dataclass(slots=True)
class Spliced:
    """A stream that goes on; read as an `EventStream` is. `keep_ids`, `keep_usage`: what the client wants."""

    told: Told
    seam: Seam
    keep_ids: bool = False
    keep_usage: bool = False
    _stream: EventStream = field(init=False)
    _splitter: Splitter = field(default_factory=Splitter)
    _ahead: str = field(init=False)
    _again: str = field(init=False)
    _tokens_again: int = field(init=False)

    def __post_init__(self) -> None:
        self._stream = EventStream(keep_ids=True, keep_usage=True, transcript=Transcript())
        self._ahead, self._again = self.seam.ahead, self.seam.again
        self._tokens_again = len(self.told.ids) - self.seam.kept

    # -- what came of it

    @property
    def usage(self) -> Usage | None:
        """What this engine reported of its part."""
        return self._stream.usage

    @property
    def done(self) -> bool:
        return self._stream.done

    @property
    def error(self) -> bytes | None:
        return self._stream.error

    @property
    def events(self) -> int:
        return self._stream.events

    @property
    def between(self) -> bool:
        return self._splitter.between

    @property
    def broken(self) -> bool:
        return self._stream.broken

    @property
    def token_ids(self) -> list[int]:
        """Of the whole output so far."""
        if self._tokens_again:
            return self.told.ids
        return self.told.ids[: self.seam.kept] + self._stream.token_ids

    @property
    def transcript(self) -> Transcript:
        """Of this engine's part."""
        assert self._stream.transcript is not None
        return self._stream.transcript

    @property
    def text(self) -> str:
        """All that the client has."""
        ahead = "" if self._ahead else self.seam.ahead
        return self.told.text + ahead + self.transcript.text[len(self.seam.again) :]

    def whole(self, usage: Usage) -> Usage:
        """What an engine reported of its part, as of the whole stream."""
        told = self.told
        count = self.seam.kept + (usage.completion_tokens or 0)
        return Usage(told.prompt_tokens, count, PromptTokensDetails(told.cached_tokens))

    # -- on its way

    def feed(self, data: bytes) -> bytes:
        """Whole events out. Raises StreamTooLong, and Diverged where it goes on with another text."""
        out = [self._stream.feed(event) for event in self._splitter.feed(data)]
        return b"".join([self._edited(event) for event in out if event])

    def shortcut(self, write: Callable[[bytes], None]) -> Shortcut | None:
        """None: every event is changed."""
        return None

    def _edited(self, event: bytes) -> bytes:
        chunk = _chunk_in(event)
        if chunk is None:
            return event
        origin = self.told.origin
        chunk |= {"id": origin.id, "created": origin.created, "model": origin.model}
        if usage := chunk.get("usage"):
            count = self.seam.kept + (usage.get("completion_tokens") or 0)
            chunk["usage"] = usage | self.told.usage(count)
        if not chunk["choices"]:
            return event_of(chunk) if self.keep_usage else b""
        chunk.pop("prompt_token_ids", None)
        says = [self._edit(choice) for choice in chunk["choices"]]
        return event_of(chunk) if any(says) else b""

    def _edit(self, choice: dict[str, Any]) -> bool:
        """Changes a choice to what it adds for the client; whether that is anything."""
        ids = choice.pop("token_ids", None) or []
        choice.pop("prompt_token_ids", None)
        known = min(len(ids), self._tokens_again)
        self._tokens_again -= known
        if self.keep_ids:
            choice["token_ids"] = ids[known:]
        logprobs = self._edit_logprobs(choice, known)
        text = self._edit_text(choice)
        if self._again and choice.get("finish_reason"):
            raise Diverged("it ends before it has said what the client has")
        return bool(text or logprobs or choice.get("finish_reason") or choice.get("token_ids"))

    def _edit_text(self, choice: dict[str, Any]) -> bool:
        where, name = (choice, "text") if "text" in choice else (choice.get("delta", {}), "content")
        where.pop("role", None)
        if name in where or (self._ahead and choice.get("finish_reason")):
            where[name] = self._new(where.get(name) or "")
        return any(where.values()) if name == "content" else bool(where[name])

    def _new(self, text: str) -> str:
        """What of the engine's text is new; before it what the client lacks."""
        known = min(len(text), len(self._again))
        if text[:known] != self._again[:known]:
            raise Diverged("it goes on with another text than the client has")
        self._again = self._again[known:]
        ahead, self._ahead = self._ahead, ""
        return ahead + text[known:]

    def _edit_logprobs(self, choice: dict[str, Any], known: int) -> bool:
        logprobs = choice.get("logprobs")
        if not isinstance(logprobs, dict):
            return False
        for name, values in logprobs.items():
            if isinstance(values, list):
                logprobs[name] = values[known:]
        if offsets := logprobs.get("text_offset"):
            begin = len(self.told.text) + len(self.seam.ahead) - len(self.seam.again)
            logprobs["text_offset"] = [begin + offset for offset in offsets]
        return any(isinstance(values, list) and values for values in logprobs.values())


def closing(told: Told, object_: str, keep_usage: bool) -> bytes:
    """The end of a stream whose last word was said, and of which only the counts are missing."""
    origin = told.origin
    head = {"id": origin.id, "object": object_, "created": origin.created, "model": origin.model}
    usage = event_of(head | {"choices": [], "usage": told.usage(len(told.ids))})
    return (usage if keep_usage else b"") + DONE


def event_of(chunk: dict[str, Any]) -> bytes:
    """A chunk as an event."""
    return _DATA + msgspec.json.encode(chunk) + b"\n\n"


def _chunk_in(event: bytes) -> dict[str, Any] | None:
    if not event.startswith(_DATA + b"{"):
        return None
    chunk = msgspec.json.decode(event[len(_DATA) :])
    return chunk if isinstance(chunk.get("choices"), list) else None
