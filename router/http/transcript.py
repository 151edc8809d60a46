"""What a client was told by a stream of chunks: kept so that the stream can go on elsewhere. Pure.

Of nearly all chunks the text is known, still escaped as JSON has it (`token_chunk.Form`), and kept as it is.
The others are decoded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec


class _Delta(msgspec.Struct):
    content: str | None = None
    tool_calls: list[Any] | None = None
    function_call: Any = None
    reasoning: str | None = None
    reasoning_content: str | None = None


class _Choice(msgspec.Struct):
    delta: _Delta | None = None
    text: str | None = None
    finish_reason: str | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []


class Origin(msgspec.Struct):
    """By what all chunks of one stream are known."""

    id: str = ""
    created: int = 0
    model: str = ""
    system_fingerprint: str | None = None


_decode_chunk = msgspec.json.Decoder(_Chunk).decode
_decode_origin = msgspec.json.Decoder(Origin).decode
_decode_text = msgspec.json.Decoder(str).decode


@dataclass(slots=True)
class Transcript:
    """`finished`: the last word was said, only counts may be missing. `parsed`: why the text that was sent is
    not all text that was generated, in words.
    """

    origin: Origin | None = None
    finished: bool = False
    parsed: str = ""
    _text: bytearray = field(default_factory=bytearray)  # as JSON has it

    @property
    def text(self) -> str:
        """All text so far."""
        return _decode_text(b'"%b"' % bytes(self._text))

    def note(self, event: bytes) -> None:
        """Any event but an error, as the engine sent it, or the chunk that holds it."""
        begin = event.find(b"{")
        try:
            chunk = _decode_chunk(event[begin:])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return  # no chunk: a comment, or what no client takes for text either
        for choice in chunk.choices:
            self._note_choice(choice)
        if self.origin is None and chunk.choices:
            self.origin = _decode_origin(event[begin:])

    def add(self, text: bytes) -> None:
        """The text of an ordinary chunk, as JSON has it."""
        self._text += text

    def _note_choice(self, choice: _Choice) -> None:
        delta = choice.delta or _Delta()
        if text := choice.text or delta.content:
            self._text += msgspec.json.encode(text)[1:-1]
        if choice.finish_reason is not None:
            self.finished = True
        if delta.tool_calls or delta.function_call:
            self.parsed = "a tool call has begun"
        elif delta.reasoning or delta.reasoning_content:
            self.parsed = "it reasons"
