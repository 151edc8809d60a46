"""Headers as they cross the router: end-to-end ones pass, those of one hop do not."""

from __future__ import annotations

Headers = list[tuple[bytes, bytes]]

# RFC 9110, section 7.6.1.
_HOP_BY_HOP = frozenset(
    b"connection keep-alive proxy-connection proxy-authenticate proxy-authorization te trailer "
    b"transfer-encoding upgrade http2-settings".split()
)
# Written by the router itself. The engine must not compress what is to be read along.
_WRITTEN = frozenset(b"host content-length expect accept-encoding x-request-id".split())
_NOT_TO_ROUTERS = _HOP_BY_HOP | _WRITTEN
# Keys are for the router: an engine, and what it logs, has no use for them.
_NOT_TO_ENGINES = _NOT_TO_ROUTERS | frozenset((b"authorization", b"x-api-key"))
# Which pages of which origin may read a reply is for the router to say (`cors`), not for what is behind it.
_CORS = frozenset(
    b"access-control-" + name
    for name in (
        b"allow-origin allow-credentials allow-methods allow-headers allow-private-network "
        b"expose-headers max-age"
    ).split()
)
_NOT_TO_CLIENTS = _HOP_BY_HOP | _CORS | frozenset(b"content-length x-request-id".split())


def to_engine(headers: Headers) -> Headers:
    """Of a client's headers (lower-case names), those that an engine gets."""
    return _without(headers, _NOT_TO_ENGINES)


def to_router(headers: Headers) -> Headers:
    """Of a client's headers (lower-case names), those that another router gets in place of this one."""
    return _without(headers, _NOT_TO_ROUTERS)


def to_client(headers: Headers) -> Headers:
    """Of an engine's headers (lower-case names), those that a client gets."""
    return _without(headers, _NOT_TO_CLIENTS)


def first(headers: Headers, name: bytes) -> bytes | None:
    """The first header of this (lower-case) name."""
    return next((value for key, value in headers if key == name), None)


def tokens(headers: Headers, name: bytes) -> frozenset[bytes]:
    """The members, in lower case, of a header that is a list; it may be given several times."""
    values = b",".join([value for key, value in headers if key == name])
    return frozenset([token.strip() for token in values.lower().split(b",")]) if values else frozenset()


def _without(headers: Headers, dropped: frozenset[bytes]) -> Headers:
    """Those headers that are not dropped, nor named by `connection:` as for this hop only."""
    passed = [header for header in headers if header[0] not in dropped]
    named = tokens(headers, b"connection")
    return [header for header in passed if header[0] not in named] if named else passed
