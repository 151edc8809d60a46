"""How the body of a reply is delimited (RFC 9112, section 6.3). Pure: bytes in, payload bytes out.

`reply_head` tells which of these a reply has. Lenient where nothing can be smuggled: engines are trusted.
What clients send is read by `bodies`.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Protocol

# A chunk-size line longer than this is not one: 16 hex digits and a few extensions fit easily.
MAX_SIZE_LINE = 256


class FramingError(ValueError):
    """The body does not follow its transfer coding."""


class Framing(Protocol):
    """Reads one body. `done` turns true with its last byte; bytes after that are in `rest`.

    `between_chunks`: what comes next is the size of a chunk.
    """

    done: bool
    rest: bytes

    @property
    def between_chunks(self) -> bool: ...

    def feed(self, data: bytes) -> bytes:
        """The payload in these bytes; raises FramingError."""

    def eof(self) -> bool:
        """The peer closed: True if the body was whole all the same."""


class Sized:
    """A body of `content-length` bytes."""

    between_chunks = False

    def __init__(self, length: int) -> None:
        self._missing = length
        self.done = length == 0
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        if len(data) > self._missing:
            data, self.rest = data[: self._missing], data[self._missing :]
        self._missing -= len(data)
        self.done = self._missing == 0
        return data

    def eof(self) -> bool:
        return self.done


class UntilClose:
    """A body that ends where the connection does; whether it was cut cannot be told."""

    between_chunks = False

    def __init__(self) -> None:
        self.done = False
        self.rest = b""

    def feed(self, data: bytes) -> bytes:
        return data

    def eof(self) -> bool:
        self.done = True
        return True


class Chunked:
    """A body in chunks. Trailers are read and dropped."""

    def __init__(self) -> None:
        self.done = False
        self.rest = b""
        self._held = b""  # an unfinished size line, or the line break after a chunk
        self._missing = 0  # bytes of the current chunk still to come, with its line break
        self._in_trailer = False

    @property
    def between_chunks(self) -> bool:
        return not (self._missing or self._held or self._in_trailer)

    def feed(self, data: bytes) -> bytes:
        if self.between_chunks:
            content = _whole_chunk(data)
            if content:
                return content
        if self._held:
            data, self._held = self._held + data, b""
        payload: list[bytes] = []
        at = 0
        while at < len(data) and not self.done:
            if self._missing:
                at = self._take(data, at, payload)
            else:
                at = self._line(data, at)
        if self.done:
            self.rest = data[at:]
        return payload[0] if len(payload) == 1 else b"".join(payload)

    def eof(self) -> bool:
        return self.done

    def _take(self, data: bytes, at: int, payload: list[bytes]) -> int:
        """Up to the rest of the current chunk; its closing line break is counted in `_missing`."""
        room = self._missing - 2  # payload still to come; negative within the line break
        part = data[at : at + self._missing]
        content = part[: max(room, 0)]
        line_break = part[len(content) :]
        if line_break != b"\r\n"[max(-room, 0) :][: len(line_break)]:
            raise FramingError("a chunk is longer than its size")
        if content:
            payload.append(content)
        self._missing -= len(part)
        return at + len(part)

    def _line(self, data: bytes, at: int) -> int:
        end = data.find(b"\r\n", at)
        if end < 0:
            self._held = data[at:]
            if len(self._held) > MAX_SIZE_LINE:
                raise FramingError("a chunk-size line has no end")
            return len(data)
        line = data[at:end]
        if self._in_trailer:
            self.done = not line
        else:
            self._open(line)
        return end + 2

    def _open(self, line: bytes) -> None:
        size = _chunk_size(line)
        self._in_trailer = size == 0
        self._missing = size + 2 if size else 0


def _whole_chunk(data: bytes) -> bytes:
    """The content of one chunk where the bytes are just that, as most reads from an engine are."""
    at = data.find(b"\r\n") + 2
    if not 3 <= at <= MAX_SIZE_LINE or not data.endswith(b"\r\n"):
        return b""
    size = _chunk_size(data[: at - 2])
    return data[at:-2] if size and len(data) == at + size + 2 else b""


@lru_cache(maxsize=1024)  # the chunks of streams have few different sizes
def _chunk_size(line: bytes) -> int:
    digits = line.partition(b";")[0].strip()
    if not digits or digits.strip(b"0123456789abcdefABCDEF"):
        raise FramingError("a chunk size is not a hexadecimal number")
    return int(digits, 16)
