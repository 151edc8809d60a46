"""What is Anthropic's own in the messages family: errors, the end of a stream, token counts. No I/O."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import msgspec

from router.errors import ApiError
from router.http.event_watch import Ending, EventWatch, data_of
from router.http.sse import Count, PromptTokensDetails, Usage

ENDING = Ending(
    whole=frozenset({b"message_stop"}),
    output=b"block_delta",
    counts=frozenset({b"message_start", b"message_delta"}),
    aborted=b'"delta":{"stop_reason":null',  # vLLM's finish_reason "abort"
    named=True,
)
# https://platform.claude.com/docs/en/api/errors; its own 529 is what others call 503.
TYPES: Mapping[int, str] = MappingProxyType(
    {
        401: "authentication_error",
        403: "permission_error",
        404: "not_found_error",
        408: "timeout_error",
        413: "request_too_large",
        429: "rate_limit_error",
        503: "overloaded_error",
        504: "timeout_error",
    }
)


def error_body(error: ApiError, request_id: str | None = None) -> bytes:
    """An error as JSON."""
    said = {"type": "error", "error": {"type": error_type(error.status), "message": error.message}}
    return msgspec.json.encode({**said, "request_id": request_id})


def error_type(status: int) -> str:
    """Anthropic's name for what an HTTP status says."""
    return TYPES.get(status, "api_error" if status >= 500 else "invalid_request_error")


def error_event(error: ApiError, request_id: str | None, watch: EventWatch) -> bytes:
    """An error as the last event of a stream; no `message_stop` follows."""
    return b"event: error\ndata: " + error_body(error, request_id) + b"\n\n"


class _Counts(msgspec.Struct):
    """Anthropic counts what was read from the cache or written to it apart from other input."""

    input_tokens: Count | None = None
    output_tokens: Count | None = None
    cache_creation_input_tokens: Count | None = None
    cache_read_input_tokens: Count | None = None


class _Message(msgspec.Struct):
    usage: _Counts | None = None


class _Event(msgspec.Struct):
    usage: _Counts | None = None
    message: _Message | None = None


_decode_message = msgspec.json.Decoder(_Message).decode
_decode_event = msgspec.json.Decoder(_Event).decode


def usage_of(reply: bytes) -> Usage | None:
    """The token counts of a whole reply, where it tells them."""
    try:
        counts = _decode_message(reply).usage
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return None
    return _usage(counts) if counts else None


def streamed_usage(watch: EventWatch) -> Usage | None:
    """The token counts of a stream: `message_start` tells the input, `message_delta` what is so far."""
    total = _Counts()
    for event in watch.counts:
        for name, count in _told(event).items():
            setattr(total, name, count)
    return _usage(total) if watch.counts else None


def _told(event: bytes) -> dict[str, int]:
    try:
        told = _decode_event(data_of(event))
    except (msgspec.MsgspecError, ValueError, RecursionError):
        return {}
    counts = told.usage or (told.message and told.message.usage) or _Counts()
    return {name: count for name, count in msgspec.structs.asdict(counts).items() if count is not None}


def _usage(counts: _Counts) -> Usage:
    cached = counts.cache_read_input_tokens or 0
    prompt = (counts.input_tokens or 0) + cached + (counts.cache_creation_input_tokens or 0)
    return Usage(prompt, counts.output_tokens, PromptTokensDetails(cached))
