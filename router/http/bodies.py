"""Bodies of requests as they arrive, in either framing (RFC 9112, section 6). Pure: bytes in, a body out.

Strict where `framing` is lenient: what clients send may have passed another proxy, and whoever reads its
length differently smuggles a request past one of the two.
"""

from __future__ import annotations

import re
from io import BytesIO
from typing import Protocol

from router.errors import BadRequest, HeadTooLarge, TooLarge
from router.http import grammar
from router.http.framing import MAX_SIZE_LINE

# A size of more digits is beyond any limit, and `int` refuses thousands of them.
_SIZE_LINE = re.compile(rb"([0-9A-Fa-f]{1,16})([ \t]*;%b*+)?" % grammar.TEXT)


class Body(Protocol):
    """Reads one body. `content` grows, and is whole once `done`; its `getvalue` is the body, not a copy."""

    content: BytesIO
    done: bool

    def feed(self, data: bytes) -> bytes:
        """Takes what is the body's; what is left follows it, or is not to be told yet. Raises ApiError."""


class Sized:
    """A body of `length` bytes, one at least."""

    def __init__(self, length: int) -> None:
        self.content = BytesIO()
        self.done = False
        self._missing = length

    def feed(self, data: bytes) -> bytes:
        taken = self.content.write(data[: self._missing])
        self._missing -= taken
        self.done = not self._missing
        return data[taken:]


class Chunked:
    """A body in chunks. Extensions and trailers are read and dropped, `spare` bytes of them at most."""

    def __init__(self, limit: int, spare: int) -> None:
        self.content = BytesIO()
        self.done = False
        self._limit = limit
        self._spare = spare
        self._missing = 0  # of the chunk under way
        self._at_end = False  # of a chunk: its line break is next
        self._in_trailers = False

    def feed(self, data: bytes) -> bytes:
        at = 0
        while at < len(data) and not self.done:
            if self._missing:
                at = self._take(data, at)
            elif (end := self._line_end(data, at)) is None:
                break
            else:
                self._read_line(data[at:end])
                at = end + 2
        return data[at:]

    def _take(self, data: bytes, at: int) -> int:
        taken = self.content.write(data[at : at + self._missing])
        self._missing -= taken
        self._at_end = not self._missing
        return at + taken

    def _line_end(self, data: bytes, at: int) -> int | None:
        """Where the line that begins here ends, if that has arrived."""
        end = data.find(b"\n", at)
        length = (end if end >= 0 else len(data)) - at
        if self._in_trailers and length > self._spare:
            raise self._too_much()
        if self._at_end and data[at : at + 2] not in (b"", b"\r", b"\r\n"):
            raise BadRequest("A chunk of the body is longer than its size")
        if not self._in_trailers and length > MAX_SIZE_LINE:
            raise _malformed()
        if end < 0:
            return None
        if end == at or data[end - 1 : end] != b"\r":
            raise _malformed()
        return end - 1

    def _read_line(self, line: bytes) -> None:
        if self._at_end:
            self._at_end = False
        elif self._in_trailers:
            self._read_trailer(line)
        else:
            self._read_size(line)

    def _read_size(self, line: bytes) -> None:
        match = _SIZE_LINE.fullmatch(line)
        if match is None:
            raise _malformed()
        self._spend(len(match[2] or b""))
        self._missing = int(match[1], 16)
        self._in_trailers = not self._missing
        if self.content.tell() + self._missing > self._limit:
            raise too_large(self._limit)

    def _read_trailer(self, line: bytes) -> None:
        if line and not grammar.FIELD_LINE.fullmatch(line):
            raise BadRequest("A trailer of the body is malformed")
        self._spend(len(line))
        self.done = not line

    def _spend(self, length: int) -> None:
        self._spare -= length
        if self._spare < 0:
            raise self._too_much()

    def _too_much(self) -> HeadTooLarge:
        return HeadTooLarge("The extensions and trailers of the chunked body are over the limit")


def too_large(limit: int) -> TooLarge:
    """The refusal of a body."""
    return TooLarge(f"The body is over the limit of {limit} bytes")


def _malformed() -> BadRequest:
    return BadRequest("The chunked body is malformed")
