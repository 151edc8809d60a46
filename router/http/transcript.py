"""What a client was told by a stream of chunks: kept so that the stream can go on elsewhere. Pure.

Nearly all chunks of a stream are alike up to their text, so of those only the text is cut out, still escaped
as JSON has it; that costs some tenths of a microsecond. The others are decoded.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import msgspec

_BREAKS = b"\n\n\r\n"
# What stands before the text of a chunk and behind it, in chats and in completions (vLLM 0.32 and 0.33).
_FORMS = (
    (b'"delta":{"content":"', b'"},"logprobs":null,"finish_reason":null}]}' + _BREAKS),
    (b'"text":"', b'","logprobs":null,"finish_reason":null,"stop_reason":null}]}' + _BREAKS),
)
# Where a chunk's event begins, behind a size line of two or three digits.
_STARTS = (4, 5)


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
    _before: bytes = b""
    _behind: bytes = b""

    @property
    def text(self) -> str:
        """All text so far."""
        return _decode_text(b'"%b"' % bytes(self._text))

    def note(self, event: bytes) -> None:
        """Any event but an error, as the engine sent it."""
        begin = event.find(b"{")
        try:
            chunk = _decode_chunk(event[begin:])
        except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
            return  # no chunk: a comment, or what no client takes for text either
        for choice in chunk.choices:
            self._note_choice(choice)
        if self.origin is None and chunk.choices:
            self.origin = _decode_origin(event[begin:])
        if not self._before:
            self._learn(event)

    def note_chunks(self, read: bytes) -> None:
        """HTTP chunks that hold an ordinary event each, their token ids cut out."""
        before, behind = self._before, self._behind
        start = _STARTS[not read.startswith(before, _STARTS[0])]  # found there, not searched: that costs more
        if before and read.startswith(before, start) and read.endswith(behind):
            text = read[start + len(before) : -len(behind)]
            if _BREAKS not in text:
                self._text += text
                return
        for chunk in read.split(_BREAKS)[:-1]:
            self.note(chunk)

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

    def _learn(self, event: bytes) -> None:
        """What ordinary chunks look like, by the first one with text."""
        for before, behind in _FORMS:
            at = event.find(before)
            if at >= 0 and event.find(b'"role":') < 0:
                self._before, self._behind = event[: at + len(before)], behind
                return
