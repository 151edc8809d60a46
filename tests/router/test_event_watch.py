import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router import anthropic_api, responses_api
from router.http.event_watch import CHUNKS, UNKNOWN, Ending, EventWatch
from router.http.sse import MAX_EVENT_BYTES, StreamTooLong

MESSAGES, RESPONSES = anthropic_api.ENDING, responses_api.ENDING


def named(name, **data):
    return b"event: %b\n" % name.encode() + unnamed(type=name, **data)


def unnamed(**data):
    return b"data: " + json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
CRASH = b'data: {"error": {"message": "EngineCore died", "code": 500}}\n\n'
MESSAGE = (
    named("message_start", message={"id": "m", "stop_reason": None, "usage": {"input_tokens": 9}}),
    named("content_block_start", index=0),
    named("ping"),
    named("content_block_delta", index=0, delta={"type": "text_delta", "text": "a"}),
    named("content_block_delta", index=0, delta={"type": "text_delta", "text": "b"}),
    named("content_block_stop", index=0),
    named("message_delta", delta={"stop_reason": "end_turn"}, usage={"output_tokens": 2}),
    named("message_stop"),
)
RESPONSE = (
    named("response.created", response={"id": "r", "status": "in_progress"}, sequence_number=0),
    named("response.output_text.delta", delta="a", sequence_number=1),
    named("response.function_call_arguments.delta", delta="{", sequence_number=2),
    named("response.output_text.done", text="a", sequence_number=3),
    named("response.completed", response={"id": "r", "status": "completed"}, sequence_number=4),
)
CHUNKED = (
    unnamed(choices=[{"delta": {"content": "a"}}]),
    unnamed(choices=[{"delta": {"content": "b"}}]),
    DONE,
)
STREAMS = [(MESSAGES, MESSAGE), (RESPONSES, RESPONSE), (CHUNKS, CHUNKED)]


def watched(ending, *events, cuts=()):
    watch, data = EventWatch(ending), b"".join(events)
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return watch, b"".join(watch.feed(data[a:b]) for a, b in pairwise(edges))


@given(
    stream=st.sampled_from(STREAMS), cuts=st.lists(st.integers(min_value=0), max_size=30), crlf=st.booleans()
)
def test_a_whole_stream_passes_at_any_split(stream, cuts, crlf):
    ending, events = stream
    sent = [event.replace(b"\n", b"\r\n") for event in events] if crlf else events
    watch, out = watched(ending, *sent, cuts=cuts)
    assert out == b"".join(events)
    assert (watch.done, watch.error, watch.broken, watch.events) == (True, None, False, 2)
    assert (watch.first, watch.last) == (events[0], events[-1])


@given(stream=st.sampled_from(STREAMS), size=st.integers(min_value=0))
def test_a_stream_that_stops_anywhere_before_its_end_is_broken(stream, size):
    ending, events = stream
    data = b"".join(events)
    watch, out = watched(ending, data[: size % len(data)])
    assert watch.broken
    assert not watch.done
    assert data.startswith(out)
    assert out.endswith(b"\n\n") or not out  # never a part of an event


@pytest.mark.parametrize(
    ("ending", "events"),
    [
        (CHUNKS, (CHUNKED[0], CRASH, DONE)),
        (UNKNOWN, (CHUNKED[0], CRASH, DONE)),
        (MESSAGES, (MESSAGE[0], named("error", error={}), MESSAGE[-1])),
        (MESSAGES, (MESSAGE[0], CRASH, DONE)),
        (MESSAGES, (MESSAGE[0], unnamed(type="error", error={}), MESSAGE[-1])),
        (RESPONSES, (RESPONSE[0], named("error", message="x"), RESPONSE[-1], DONE)),
        (RESPONSES, (RESPONSE[0], named("response.failed", response={}), DONE)),
        (RESPONSES, (RESPONSE[0], CRASH, DONE)),
    ],
)
def test_an_error_and_what_follows_is_withheld(ending, events):
    watch, out = watched(ending, *events)
    assert out == events[0]
    assert watch.error == events[1]
    assert not watch.done
    assert not watch.broken  # it is known what is the matter


@pytest.mark.parametrize(
    ("ending", "events", "passed"),
    [
        (MESSAGES, (MESSAGE[0], named("message_delta", delta={"stop_reason": None}), MESSAGE[-1]), 2),
        (RESPONSES, (RESPONSE[0], named("response.completed", response={"status": "cancelled"}), DONE), 1),
    ],
)
def test_a_request_that_the_engine_gave_up_is_not_whole(ending, events, passed):
    watch, out = watched(ending, *events)
    assert out == b"".join(events[:passed])
    assert watch.broken


@pytest.mark.parametrize("last", ["response.incomplete", "response.completed"])
def test_responses_may_go_on_after_their_end(last):
    watch, out = watched(RESPONSES, RESPONSE[0], named(last, response={}), DONE)
    assert out.endswith(DONE)
    assert watch.done


@pytest.mark.parametrize(
    "end",
    [
        b"event:message_stop\ndata:{}\n\n",
        b'data: {"type":"message_stop"}\n\n',
        b'data: {"index":0, "type": "message_stop"}\n\n',
        b"id: 7\nevent: message_stop\ndata: {}\n\n",
        b": a comment\nevent: message_stop\ndata: {}\n\n",
    ],
)
def test_an_end_that_is_written_otherwise(end):
    watch, _ = watched(MESSAGES, MESSAGE[0], end)
    assert watch.done


@given(text=st.text())
def test_text_that_looks_like_an_end_is_none(text):
    text += '\nevent: message_stop\ndata: [DONE]\n\ndata: {"error": 1}\n\n"stop_reason":null'
    watch, out = watched(MESSAGES, delta := named("content_block_delta", delta={"text": text}))
    assert out == delta
    assert (watch.events, watch.done, watch.error) == (1, False, None)


@pytest.mark.parametrize(
    "data", [b": ping\n\n", b"data: {not json\n\n", b"data: {}\n\n", b"retry: 3\n\n", b"\n\n"]
)
def test_what_is_no_event_of_the_family_passes_and_counts_for_nothing(data):
    watch, out = watched(MESSAGES, data)
    assert out == data
    assert (watch.events, watch.first, watch.broken) == (0, b"", True)


def test_a_stream_of_an_unknown_kind_ends_where_it_ends():
    watch, _ = watched(UNKNOWN, named("x"), CHUNKED[0])
    assert not watch.broken
    half, _ = watched(UNKNOWN, CHUNKED[0][:-1])
    assert half.broken


def test_an_endless_event_is_refused():
    watch = EventWatch(Ending())
    with pytest.raises(StreamTooLong):
        watch.feed(b"data: " + b"x" * MAX_EVENT_BYTES)
