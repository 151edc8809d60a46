"""The head of an engine's reply: status, headers, and how its body is delimited. Pure.

An engine says nearly the same head every time, so a head that was read before is looked up.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

from router.http import grammar
from router.http.framing import Chunked, Framing, FramingError, Sized, UntilClose
from router.http.headers import Headers, first, to_client, tokens

MAX_HEAD_BYTES = 64 * 1024
# Larger heads are read each time, so that what is remembered stays small.
_REMEMBERED_BYTES, _REMEMBERED = 2048, 512
# RFC 9112, sections 4 and 5: no line folding, no space before a colon, nothing but CR LF ends a line.
_HEAD = re.compile(
    rb"HTTP/1\.(?P<minor>[01]) (?P<status>[0-9]{3})(?: [^\r\n\0]*)?\r\n"
    rb"(?P<lines>(?:%b:[^\r\n\0]*\r\n)*)\r\n" % grammar.TOKEN
)


@dataclass(frozen=True, slots=True)
class Head:
    """Status and headers (lower-case names) of a reply; `passed` are those that the client gets.

    `framing()` reads its body, of `length` bytes where that is told.
    """

    status: int
    headers: Headers
    passed: Headers
    keep_alive: bool
    length: int | None
    framing: Callable[[], Framing]

    def header(self, name: bytes) -> bytes | None:
        """The first header of this (lower-case) name."""
        return first(self.headers, name)


def read_head(raw: bytes) -> Head:
    """The head that these bytes are, with its blank line. Raises FramingError."""
    return _remembered(raw) if len(raw) <= _REMEMBERED_BYTES else _read(raw)


def _read(raw: bytes) -> Head:
    match = _HEAD.fullmatch(raw)
    if match is None:
        raise FramingError("its head is malformed")
    status = int(match["status"])
    if status == 101:
        raise FramingError("it changes the protocol")
    headers = [_header(line) for line in match["lines"].split(b"\r\n")[:-1]]
    length, framing = _framing(status, headers)
    return Head(status, headers, to_client(headers), _keeps_alive(match["minor"], headers), length, framing)


_remembered = lru_cache(maxsize=_REMEMBERED)(_read)


def _header(line: bytes) -> tuple[bytes, bytes]:
    name, _, value = line.partition(b":")
    return name.lower(), value.strip(b" \t")


def _keeps_alive(minor: bytes, headers: Headers) -> bool:
    options = tokens(headers, b"connection")
    return b"close" not in options and (minor == b"1" or b"keep-alive" in options)


def _framing(status: int, headers: Headers) -> tuple[int | None, Callable[[], Framing]]:
    """The length of the body, where it is told, and what reads it (RFC 9112, section 6.3)."""
    if status < 200 or status in (204, 304):
        return None, lambda: Sized(0)
    codings = [value.lower() for name, value in headers if name == b"transfer-encoding"]
    lengths = {value for name, value in headers if name == b"content-length"}
    if codings and (codings != [b"chunked"] or lengths):
        raise FramingError(f"its transfer coding {b', '.join(codings)!r} cannot be read")
    if codings:
        return None, Chunked
    if not lengths:
        return None, UntilClose
    length = _length(lengths)
    return length, lambda: Sized(length)


def _length(lengths: set[bytes]) -> int:
    """One number, of fewer digits than a body could need."""
    if len(lengths) > 1 or not (text := min(lengths)).isdigit() or len(text) > 18:
        raise FramingError(f"its content-length {b', '.join(sorted(lengths))!r} is not a number")
    return int(text)
