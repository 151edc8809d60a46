"""Headers as they cross the router: end-to-end ones pass, those of one hop do not."""

from __future__ import annotations

Headers = list[tuple[bytes, bytes]]

# RFC 9110, section 7.6.1.
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer "
    b"transfer-encoding upgrade http2-settings".split()
)
# Written by the router itself. The engine must not compress what is to be read along.
_NOT_TO_ENGINES = _HOP_BY_HOP | frozenset(b"host content-length expect accept-encoding x-request-id".split())
_NOT_TO_CLIENTS = _HOP_BY_HOP | frozenset(b"content-length x-request-id".split())


def to_engine(headers: Headers) -> Headers:
    """Of a client's headers (lower-case names), those that an engine gets."""
    dropped = _NOT_TO_ENGINES | _named_by_connection(headers)
    return [(name, value) for name, value in headers if name not in dropped]


def to_client(headers: Headers) -> Headers:
    """Of an engine's headers (lower-case names), those that a client gets."""
    dropped = _NOT_TO_CLIENTS | _named_by_connection(headers)
    return [(name, value) for name, value in headers if name not in dropped]


def first(headers: Headers, name: bytes) -> bytes | None:
    """The first header of this (lower-case) name."""
    return next((value for key, value in headers if key == name), None)


def _named_by_connection(headers: Headers) -> frozenset[bytes]:
    """Headers that `connection:` says are for this hop only."""
    named: set[bytes] = set()
    for name, value in headers:
        if name == b"connection":
            named.update(token.strip().lower() for token in value.split(b","))
    return frozenset(named)
