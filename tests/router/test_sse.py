import json
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.http.sse import MAX_EVENT_BYTES, EventStream, StreamTooLong, usage_of

ROLE = {"index": 0, "delta": {"role": "assistant", "content": ""}, "logprobs": None, "finish_reason": None}


def event(**members):
    return b"data: " + json.dumps(members, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def chunk(text, ids, finish=None, **more):
    delta = {"content": text} if text is not None else {}
    choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish, **more}
    if ids != "absent":
        choice["token_ids"] = ids
    return event(id="c", choices=[choice])


def bare(text, finish=None):
    return chunk(text, "absent", finish)


FIRST = event(id="c", choices=[ROLE], prompt_token_ids=[1, 2, 3])
FIRST_BARE = event(id="c", choices=[ROLE])
USAGE = event(
    id="c",
    choices=[],
    usage={"prompt_tokens": 7, "completion_tokens": 2, "prompt_tokens_details": {"cached_tokens": 4}},
)
DONE = b"data: [DONE]\n\n"
STREAM = (
    FIRST + chunk("a", [5]) + chunk("b", [6, 7]) + chunk(None, [8]) + chunk("", [9], "stop") + USAGE + DONE
)
STREAM_BARE = FIRST_BARE + bare("a") + bare("b") + bare("", "stop") + DONE


def through(events, data, cuts=()):
    edges = sorted({0, len(data), *(cut % (len(data) + 1) for cut in cuts)})
    return b"".join(events.feed(data[a:b]) for a, b in pairwise(edges))


@given(cuts=st.lists(st.integers(min_value=0), max_size=30), crlf=st.booleans())
def test_what_the_client_did_not_ask_for_is_cut_at_any_split(cuts, crlf):
    events = EventStream()
    data = STREAM.replace(b"\n", b"\r\n") if crlf else STREAM
    assert through(events, data, cuts) == STREAM_BARE
    assert events.token_ids == [5, 6, 7, 8, 9]
    assert events.usage is not None
    assert (events.usage.prompt_tokens, events.usage.cached_tokens) == (7, 4)
    assert events.done
    assert events.error is None


@pytest.mark.parametrize(
    ("keep_ids", "keep_usage", "expected"),
    [
        (True, True, STREAM),
        (True, False, STREAM.replace(USAGE, b"")),
        (False, True, STREAM_BARE.replace(DONE, USAGE + DONE)),
    ],
)
def test_what_the_client_asked_for_stays(keep_ids, keep_usage, expected):
    events = EventStream(keep_ids=keep_ids, keep_usage=keep_usage)
    assert through(events, STREAM) == expected
    assert events.token_ids == [5, 6, 7, 8, 9]


@given(text=st.text())
def test_text_that_looks_like_token_ids_is_left_alone(text):
    text += '"token_ids":[1],"prompt_token_ids":[2] data: [DONE]\n\n"choices":[],"usage":{}'
    events = EventStream()
    assert events.feed(chunk(text, [3])) == bare(text)
    assert events.token_ids == [3]
    assert not events.done
    assert events.usage is None


@given(text=st.text(), ids=st.lists(st.integers(min_value=0, max_value=200_000), min_size=1, max_size=5))
def test_the_rest_of_an_event_is_what_it_was(text, ids):
    sent = EventStream().feed(chunk(text, ids, stop_reason=None))
    told = json.loads(sent.removeprefix(b"data: "))
    wanted = json.loads(chunk(text, "absent", stop_reason=None).removeprefix(b"data: "))
    assert told == wanted


def test_token_ids_as_first_or_only_member():
    events = EventStream()
    assert events.feed(b'data: {"token_ids":[1,2],"a":1}\n\n') == b'data: {"a":1}\n\n'
    assert events.feed(b'data: {"token_ids":[3]}\n\n') == b"data: {}\n\n"
    assert events.token_ids == [1, 2, 3]


def test_null_and_empty_ids():
    events = EventStream()
    assert events.feed(chunk("x", None)) == bare("x")
    assert events.feed(chunk("y", [])) == bare("y")
    assert events.token_ids == []


def test_several_choices_in_one_event():
    choices = [{"index": i, "text": "t", "token_ids": [i]} for i in range(3)]
    wanted = [{"index": i, "text": "t"} for i in range(3)]
    assert EventStream().feed(event(choices=choices)) == event(choices=wanted)


def test_completions_put_the_prompt_ids_into_the_choice():
    data = event(choices=[{"index": 0, "text": "t", "prompt_token_ids": [1, 2], "token_ids": [3]}])
    assert EventStream().feed(data) == event(choices=[{"index": 0, "text": "t"}])


def test_an_event_with_logprobs_is_not_empty():
    data = event(
        choices=[
            {"index": 0, "delta": {}, "logprobs": {"content": []}, "finish_reason": None, "token_ids": [1]}
        ]
    )
    assert b"logprobs" in EventStream().feed(data)


def test_an_error_and_what_follows_is_withheld():
    error = b'data: {"error": {"message": "engine died", "code": 500}}\n\n'
    events = EventStream()
    assert through(events, chunk("a", [1]) + error + DONE) == bare("a")
    assert events.error == error.removesuffix(b"\n\n")
    assert not events.done


def test_output_of_an_engine_without_token_ids_is_counted():
    events = EventStream()
    through(events, FIRST_BARE)
    assert events.events == 0
    through(events, bare("a") + bare("b"))
    assert events.events == 2


def test_comments_pass():
    assert EventStream().feed(b": keep-alive\n\n") == b": keep-alive\n\n"


def test_an_endless_event_is_refused():
    events = EventStream()
    with pytest.raises(StreamTooLong):
        events.feed(b"data: " + b"x" * MAX_EVENT_BYTES)


@pytest.mark.parametrize(
    ("sent", "passed", "ids"),
    [
        (b'data: {"a":"x","token_ids": [5, 6]}\n\n', b'data: {"a":"x"}\n\n', [5, 6]),
        (b'data: {"token_ids": null, "a": 1}\n\n', b'data: { "a": 1}\n\n', []),
        (b'data: {"token_ids":  [1]}\n\n', b'data: {"token_ids":  [1]}\n\n', []),
        (b'data: {"token_ids":"many"}\n\n', b'data: {"token_ids":"many"}\n\n', []),
        (b'data: {"their_token_ids":[1]}\n\n', b'data: {"their_token_ids":[1]}\n\n', []),
    ],
)
def test_json_that_is_not_compact_is_cut_rightly_or_left_alone(sent, passed, ids):
    events = EventStream()
    assert events.feed(sent) == passed
    assert events.token_ids == ids


def test_usage_and_done_with_other_blanks():
    events = EventStream()
    assert (
        events.feed(b'data: {"choices": [], "usage": {"prompt_tokens": 3}}\n\ndata:[DONE]\n\n')
        == b"data:[DONE]\n\n"
    )
    assert events.usage is not None
    assert events.usage.prompt_tokens == 3
    assert events.done


@pytest.mark.parametrize("count", ["-1", "1" + "0" * 400, "1.5", '"7"'])
def test_a_count_that_is_none_is_not_counted(count):
    assert usage_of(b'{"usage":{"prompt_tokens":%b}}' % count.encode()) is None
