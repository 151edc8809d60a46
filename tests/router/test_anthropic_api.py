import json

import pytest

from router.anthropic_api import ENDING, error_body, error_event, streamed_usage, usage_of
from router.errors import (
    ApiError,
    BadRequest,
    ClientTimeout,
    MethodNotAllowed,
    NoCapacity,
    TooLarge,
    UnknownModel,
    UpstreamBroken,
)
from router.http.event_watch import EventWatch


class TooMany(ApiError):
    status = 429


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (BadRequest("x", param="model"), "invalid_request_error"),
        (UnknownModel("x"), "not_found_error"),
        (MethodNotAllowed("x", "POST"), "invalid_request_error"),
        (ClientTimeout("x"), "timeout_error"),
        (TooLarge("x"), "request_too_large"),
        (TooMany("x"), "rate_limit_error"),
        (ApiError("x"), "api_error"),
        (UpstreamBroken("x"), "api_error"),
        (NoCapacity("x"), "overloaded_error"),
    ],
)
def test_errors_are_named_as_anthropic_names_them(error, kind):
    said = {"type": "error", "error": {"type": kind, "message": error.message}, "request_id": "req"}
    assert json.loads(error_body(error, "req")) == said
    name, data = error_event(error, "req", EventWatch(ENDING)).removesuffix(b"\n\n").split(b"\n")
    assert name == b"event: error"
    assert json.loads(data.removeprefix(b"data: ")) == said


def event(name, **data):
    return f"event: {name}\ndata: {json.dumps({'type': name, **data}, separators=(',', ':'))}\n\n".encode()


def start(**usage):
    return event("message_start", message={"id": "m", "usage": usage})


def delta(**usage):
    return event("message_delta", delta={"stop_reason": "end_turn"}, usage=usage)


@pytest.mark.parametrize(
    ("events", "counts"),
    [
        # vLLM tells the input again at the end, with what of it was cached.
        (
            (
                start(input_tokens=20, output_tokens=0),
                delta(
                    input_tokens=3,
                    output_tokens=7,
                    cache_creation_input_tokens=1,
                    cache_read_input_tokens=16,
                ),
            ),
            (20, 7, 16),
        ),
        # Anthropic tells it at the start only.
        (
            (
                start(input_tokens=4, output_tokens=1, cache_read_input_tokens=16),
                delta(output_tokens=3),
                delta(output_tokens=7),
            ),
            (20, 7, 16),
        ),
        ((start(input_tokens=20, output_tokens=0),), (20, 0, 0)),
        ((event("message_start", message={"usage": None}),), (0, 0, 0)),
        ((event("message_start", message={"usage": {"input_tokens": "many"}}),), (0, 0, 0)),
    ],
)
def test_the_tokens_of_a_stream(events, counts):
    watch = EventWatch(ENDING)
    watch.feed(b"".join(events))
    usage = streamed_usage(watch)
    assert (usage.prompt_tokens, usage.completion_tokens or 0, usage.cached_tokens) == counts


def test_a_stream_that_told_nothing_counts_nothing():
    assert streamed_usage(EventWatch(ENDING)) is None


@pytest.mark.parametrize(
    ("reply", "counts"),
    [
        (b'{"usage":{"input_tokens":3,"output_tokens":7,"cache_read_input_tokens":16}}', (19, 7, 16)),
        (b'{"usage":{"input_tokens":3,"output_tokens":7}}', (3, 7, 0)),
        (b'{"input_tokens":3}', None),  # count_tokens
        (b"not json", None),
        (b'{"usage":{"input_tokens":1.5}}', None),
        (b'{"usage":{"input_tokens":-1}}', None),
    ],
)
def test_the_tokens_of_a_reply(reply, counts):
    usage = usage_of(reply)
    told = usage and (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)
    assert told == counts
