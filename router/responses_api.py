"""What is the Responses API's own: ids that name their keeper, the end of a stream, token counts. No I/O.

A stored response lives in one engine. Routers share nothing on the request path, so which engine that is must
stand in the response's id: engines take the id from the request's `request_id` (vLLM's protocol.py,
`ResponsesRequest.request_id`; its X-Request-Id does not enter into it).
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Callable
from functools import lru_cache
from hashlib import blake2b
from typing import Any

import msgspec

from router.errors import ApiError
from router.http.event_watch import Ending, EventWatch, data_of
from router.http.sse import Count, PromptTokensDetails, Usage

_WHOLE = frozenset({b"response.completed", b"response.incomplete"})
_FAILED = frozenset({b"response.failed", b"error"})
ENDING = Ending(
    whole=_WHOLE,
    failed=_FAILED,
    output=b".delta",
    counts=_WHOLE | _FAILED,
    aborted=b'"status":"cancelled"',
    named=True,
)

# 64 bits: among a million replicas two would share a mark with a chance of 1 in 37 million.
_MARK_BYTES = 8
_MARKED = re.compile(r"resp_herd_([0-9a-f]{16})_[0-9a-f]{20}(?:_[0-9a-f]{16})?")

# Of an id what only the tenant it was made for can tell.
Seal = Callable[[str], str]


@lru_cache(maxsize=4096)
def mark(replica_id: str) -> str:
    """The short name of a replica in the ids of what it keeps."""
    return blake2b(replica_id.encode(), digest_size=_MARK_BYTES).hexdigest()


def new_id(replica_id: str, seal: Seal | None = None) -> str:
    """The id of a response that this replica will keep. Engines' own, `resp_` and 16 or 32 digits, differ."""
    made = f"resp_herd_{mark(replica_id)}_{secrets.token_hex(10)}"
    return made if seal is None else f"{made}_{seal(made)}"


def is_sealed(response_id: str, seal: Seal) -> bool:
    """Whether the id was made with this seal."""
    made, _, sealed = response_id.rpartition("_")
    return hmac.compare_digest(sealed.encode(), seal(made).encode())


def mark_in(response_id: str) -> str | None:
    """The mark that an id carries; None if no router made it."""
    found = _MARKED.fullmatch(response_id)
    return found[1] if found else None


class _Details(msgspec.Struct):
    cached_tokens: Count | None = None


class _Counts(msgspec.Struct):
    input_tokens: Count = 0
    output_tokens: Count = 0
    input_tokens_details: _Details | None = None


class _Response(msgspec.Struct):
    id: str | None = None
    usage: _Counts | None = None


class _Event(msgspec.Struct):
    response: _Response | None = None


class _Started(msgspec.Struct):
    response: dict[str, Any] = {}


class _Numbered(msgspec.Struct):
    sequence_number: int


_decode_response = msgspec.json.Decoder(_Response).decode
_decode_event = msgspec.json.Decoder(_Event).decode
_decode_started = msgspec.json.Decoder(_Started).decode
_decode_numbered = msgspec.json.Decoder(_Numbered).decode
_UNREADABLE = (msgspec.MsgspecError, ValueError, RecursionError)


def usage_of(reply: bytes) -> Usage | None:
    """The token counts of a whole response, where it tells them."""
    try:
        return _usage(_decode_response(reply))
    except _UNREADABLE:
        return None


def streamed_usage(watch: EventWatch) -> Usage | None:
    """The token counts of a stream, which its last event tells."""
    response = _response_in(watch.counts[-1]) if watch.counts else None
    return _usage(response) if response else None


def id_of(reply: bytes) -> str | None:
    """The id of a whole response."""
    try:
        return _decode_response(reply).id
    except _UNREADABLE:
        return None


def streamed_id(watch: EventWatch) -> str | None:
    """The id of a streamed response, which its first event tells."""
    response = _response_in(watch.first)
    return response.id if response else None


def error_event(error: ApiError, request_id: str | None, watch: EventWatch) -> bytes:
    """An error as the last event of a stream: the response as it began, failed."""
    event = {
        "type": "response.failed",
        "sequence_number": _number_after(watch),
        "response": {
            **_started(watch),
            "status": "failed",
            "error": {"code": "server_error", "message": error.message},
        },
    }
    return b"event: response.failed\ndata: " + msgspec.json.encode(event) + b"\n\n"


def _started(watch: EventWatch) -> dict[str, Any]:
    """The response as `response.created` told it; at least what every response has."""
    bare = {"id": None, "object": "response", "output": []}
    try:
        return _decode_started(data_of(watch.first)).response or bare
    except _UNREADABLE:
        return bare


def _number_after(watch: EventWatch) -> int:
    try:
        return _decode_numbered(data_of(watch.last)).sequence_number + 1
    except _UNREADABLE:
        return 0


def _response_in(event: bytes) -> _Response | None:
    try:
        return _decode_event(data_of(event)).response
    except _UNREADABLE:
        return None


def _usage(response: _Response) -> Usage | None:
    counts = response.usage
    if counts is None:
        return None
    details = counts.input_tokens_details
    cached = details.cached_tokens if details else None
    return Usage(counts.input_tokens, counts.output_tokens, PromptTokensDetails(cached))
