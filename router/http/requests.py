"""Requests out of the bytes of one connection. Pure: no transport, no clock.

What the RFC forbids is refused and never repaired: a request that two readers can read in two ways is how one
is smuggled past the other. Wherever the bytes were split on their way, the same requests come out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

from router.errors import BadRequest, HeadTooLarge, TargetTooLong
from router.http import grammar
from router.http.bodies import Body, Chunked, Sized, too_large
from router.http.headers import Headers, tokens

# RFC 9112, section 3, asks for 8000 at least.
MAX_TARGET_BYTES = 8192
# A length of more digits is beyond any limit, and `int` refuses thousands of them.
_MAX_DIGITS = 18
# Two of these, even if they agree, are two ways to read one request.
_AT_MOST_ONCE = (b"host", b"content-length", b"transfer-encoding")


class Limits(BaseModel):
    """What a client may send, and how slowly. Bytes and seconds.

    A request has `receive_s` to arrive, and a second more for every `receive_rate` bytes of it that have: a
    large body on a slow line gets its time, a trickle does not. `idle_s` is how long a connection may rest
    between requests, and how long a client may take nothing of its reply.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    head_bytes: Annotated[int, Field(gt=0)] = 64 * 1024
    headers: Annotated[int, Field(gt=0)] = 256
    body_bytes: Annotated[int, Field(gt=0)] = 64 * 1024 * 1024
    receive_s: Annotated[float, Field(gt=0)] = 60.0
    receive_rate: Annotated[float, Field(gt=0)] = 64 * 1024
    idle_s: Annotated[float, Field(gt=0)] = 120.0


@dataclass(slots=True)
class Request:
    """One whole request. Header names are in lower case; the target is in origin form, or `*`."""

    method: str
    target: str
    path: str
    version: str  # "1.0" or "1.1"
    headers: Headers
    fields: dict[bytes, bytes]  # the first header of each name
    keep_alive: bool
    body: bytes = b""
    received_at: float = 0.0

    def header(self, name: bytes) -> bytes | None:
        """The first header of this (lower-case) name."""
        return self.fields.get(name)


class RequestReader:
    """Reads one connection: `feed` it what arrives, then take requests with `next` until there is none.

    What is not taken yet is held as it came. After an error nothing can be read any more.
    """

    __slots__ = ("_body", "_held", "_limits", "_request", "_seen", "must_continue", "path")

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._held = b""
        self._seen = 0  # of what is held, how much holds nothing forbidden and no end of a head
        self._request: Request | None = None  # its body is arriving
        self._body: Body | None = None
        self.path = ""  # of the request that is read, or refused, once it is known
        self.must_continue = False  # the client waits for a 100 before it sends the body

    def feed(self, data: bytes) -> None:
        """Bytes that arrived."""
        self._held = self._held + data if self._held else data

    def next(self) -> Request | None:
        """The next request, if it is there whole. Raises ApiError for one that is refused."""
        request = self._request or self._read_head()
        if request is None or self._body is None:
            return request
        self._held = self._body.feed(self._held)
        if not self._body.done:
            self._request = request
            return None
        request.body = self._body.content.getvalue()
        self._request = self._body = None
        return request

    @property
    def held(self) -> int:
        """Bytes that have arrived and belong to no request that was taken."""
        return len(self._held) + (self._body.content.tell() if self._body is not None else 0)

    @property
    def between(self) -> bool:
        """Whether no request has begun to arrive."""
        return not self._held and self._request is None

    def _read_head(self) -> Request | None:
        if self._held.startswith(b"\r\n"):
            self._skip_blank_lines()
        self.path, held = "", self._held
        end = held.find(b"\r\n\r\n", max(self._seen - 3, 0)) + 4
        if not 4 <= end <= self._limits.head_bytes:
            self._judge_part(held)
            return None
        match = grammar.HEAD.fullmatch(held, 0, end)
        if match is None:
            raise _fault(held[:end])
        self._held, self._seen = held[end:], 0
        request = self._open(*match.groups())
        self._begin_body(request)
        return request

    def _skip_blank_lines(self) -> None:
        """RFC 9112, section 2.2: some clients end a body with one."""
        blank = grammar.BLANK_LINES.match(self._held)
        self._held, self._seen = self._held[blank.end() if blank else 0 :], 0

    def _judge_part(self, held: bytes) -> None:
        """Refuses a head whose end is not there as soon as it is known to be none."""
        limit = self._limits.head_bytes
        if grammar.FORBIDDEN.search(held, max(self._seen - 1, 0), limit):
            raise _fault(held[:limit])
        self._seen = len(held)
        if len(held) > limit:
            if held.find(b"\r\n", 0, limit) < 0:
                raise TargetTooLong(f"The request line is over the limit of {MAX_TARGET_BYTES} bytes")
            raise HeadTooLarge(f"The headers are over the limit of {limit} bytes")

    def _open(self, method: bytes, target: bytes, minor: bytes, lines: bytes) -> Request:
        """The request that has this head."""
        pairs = [line.partition(b":") for line in lines.split(b"\r\n")[:-1]]
        headers = [(name.lower(), value.strip()) for name, _, value in pairs]
        if len(headers) > self._limits.headers:
            raise HeadTooLarge(f"More than {self._limits.headers} headers")
        if len(target) > MAX_TARGET_BYTES:
            raise TargetTooLong(f"The request target is over the limit of {MAX_TARGET_BYTES} bytes")
        fields = dict(reversed(headers))
        if len(fields) != len(headers):
            _refuse_twice([name for name, _ in headers])
        origin_form = _origin_form(method, target.decode("ascii"))
        self.path = origin_form.partition("?")[0]
        old = minor == b"0"
        _check_host(fields.get(b"host"), old)
        return Request(
            method.decode("ascii"),
            origin_form,
            self.path,
            "1.0" if old else "1.1",
            headers,
            fields,
            _keeps(headers, old) if b"connection" in fields else not old,
        )

    def _begin_body(self, request: Request) -> None:
        """Gives the request its body, if that is there, or awaits it."""
        length = request.fields.get(b"content-length")
        if b"transfer-encoding" in request.fields:
            _check_coding(request)
            self._body = Chunked(self._limits.body_bytes, self._limits.head_bytes)
        elif length is not None:
            size = self._size(length)
            if len(self._held) < size:
                self._body = Sized(size)
            else:
                request.body, self._held = self._held[:size], self._held[size:]
        if self._body is not None and not self._held and request.version != "1.0":
            self.must_continue = request.fields.get(b"expect", b"").lower() == b"100-continue"

    def _size(self, length: bytes) -> int:
        """The number in a content-length."""
        if not length.isdigit():
            raise BadRequest("The content-length is not a number")
        if len(length) > _MAX_DIGITS or int(length) > self._limits.body_bytes:
            raise too_large(self._limits.body_bytes)
        return int(length)


def _fault(head: bytes) -> BadRequest:
    """What is wrong with a head that is not one."""
    if found := grammar.FORBIDDEN.search(head):
        what = "a line that does not end in CR LF" if found[0] in b"\r\n" else "a control character"
        return BadRequest(f"The head of the request holds {what}")
    line, *fields = head.removesuffix(b"\r\n\r\n").split(b"\r\n")
    match = grammar.REQUEST_LINE.fullmatch(line)
    if match is None:
        return BadRequest("The request line is not of the form METHOD TARGET HTTP/1.1")
    if match[2] != b"1":
        return BadRequest("Only HTTP/1.1 and HTTP/1.0 are spoken here")
    if not all(grammar.FIELD_LINE.fullmatch(field) for field in fields):
        return BadRequest("A header is not of the form NAME: VALUE")
    return BadRequest("The request target holds bytes that no URI has")


def _refuse_twice(names: list[bytes]) -> None:
    for name in _AT_MOST_ONCE:
        if names.count(name) > 1:
            raise BadRequest(f"The header {name.decode('ascii')} is given twice")


def _origin_form(method: bytes, target: str) -> str:
    """Path and query of a target in any form (RFC 9112, section 3.2); `*` stays."""
    if method == b"CONNECT":
        raise BadRequest("This is no proxy")
    if target[0] == "/" and "#" not in target:
        return target
    if target == "*" and method == b"OPTIONS":
        return target
    match = grammar.ABSOLUTE_FORM.fullmatch(target)
    if match is None:
        raise BadRequest("The request target is neither a path nor a URL")
    return (match[1] or "/") + (match[2] or "")


def _check_host(host: bytes | None, old: bool) -> None:
    """RFC 9112, section 3.2."""
    if host is None:
        if not old:
            raise BadRequest("The header host is missing")
    elif not grammar.HOST.fullmatch(host):
        raise BadRequest("The header host is not a host")


def _check_coding(request: Request) -> None:
    """RFC 9112, section 6.1."""
    if request.version == "1.0":
        raise BadRequest("HTTP/1.0 has no transfer-encoding")
    if b"content-length" in request.fields:
        raise BadRequest("Both content-length and transfer-encoding are given")
    if request.fields[b"transfer-encoding"].lower() != b"chunked":
        raise BadRequest("The only transfer-encoding taken is chunked")


def _keeps(headers: Headers, old: bool) -> bool:
    """Whether the connection takes another request (RFC 9112, section 9.3)."""
    options = tokens(headers, b"connection")
    return b"close" not in options and (not old or b"keep-alive" in options)
