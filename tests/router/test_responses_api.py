import json
import re

import pytest

from router.errors import UpstreamBroken
from router.http.event_watch import EventWatch
from router.responses_api import (
    ENDING,
    error_event,
    id_of,
    mark,
    mark_in,
    new_id,
    streamed_id,
    streamed_usage,
    usage_of,
)

BROKEN = UpstreamBroken("The stream broke off: cut")
CREATED = {
    "id": "r",
    "object": "response",
    "model": "m",
    "status": "in_progress",
    "output": [],
    "tools": [{"a": 1.5}],
}
COUNTS = {"input_tokens": 9, "output_tokens": 2, "input_tokens_details": {"cached_tokens": 8}}


def event(name, number=0, **data):
    body = {**data, "sequence_number": number, "type": name}
    return f"event: {name}\ndata: {json.dumps(body, separators=(',', ':'))}\n\n".encode()


def watched(*events):
    watch = EventWatch(ENDING)
    watch.feed(b"".join(events))
    return watch


def test_an_id_tells_its_keeper_and_nothing_else():
    ids = {new_id("http://gpu1:8000") for _ in range(100)}
    assert len(ids) == 100
    assert {mark_in(response_id) for response_id in ids} == {mark("http://gpu1:8000")}
    assert mark("http://gpu1:8000") != mark("http://gpu2:8000")
    assert all(re.fullmatch("[a-z0-9_]{4,64}", response_id) for response_id in ids)
    assert "gpu1" not in "".join(ids)


@pytest.mark.parametrize(
    "response_id",
    [
        "",
        "resp_0123456789abcdef",
        "resp_" + "0" * 32,
        "mine",
        "resp_herd_x",
        new_id("r") + "0",
        " " + new_id("r"),
    ],
)
def test_ids_that_no_router_made_carry_no_mark(response_id):
    assert mark_in(response_id) is None


def failed(watch):
    name, data = error_event(BROKEN, "req", watch).removesuffix(b"\n\n").split(b"\n")
    assert name == b"event: response.failed"
    return json.loads(data.removeprefix(b"data: "))


def test_a_stream_that_breaks_ends_with_its_response_failed():
    watch = watched(
        event("response.created", 0, response=CREATED),
        event("response.output_text.delta", 1, delta="a"),
        event("response.output_text.delta", 2, delta="b"),
    )
    assert failed(watch) == {
        "type": "response.failed",
        "sequence_number": 3,
        "response": {
            **CREATED,
            "status": "failed",
            "error": {"code": "server_error", "message": "The stream broke off: cut"},
        },
    }


@pytest.mark.parametrize("events", [(), (b"data: {}\n\n",), (b"event: x\ndata: {not json\n\n",)])
def test_also_where_the_stream_told_nothing_of_its_response(events):
    said = failed(watched(*events))
    assert (said["sequence_number"], said["response"]["status"]) == (0, "failed")


def test_the_tokens_and_the_id_of_a_stream():
    created = event("response.created", 0, response=CREATED)
    watch = watched(created, event("response.completed", 1, response={"id": "r", "usage": COUNTS}))
    usage = streamed_usage(watch)
    assert (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens) == (9, 2, 8)
    assert streamed_id(watch) == "r"
    assert streamed_usage(watched(created)) is None
    assert streamed_id(watched()) is None


@pytest.mark.parametrize(
    ("reply", "counts", "response_id"),
    [
        (json.dumps({"id": "r", "usage": COUNTS}).encode(), (9, 2, 8), "r"),
        (b'{"id":"r","status":"queued","usage":null}', None, "r"),
        (b'{"id":"r","usage":{"input_tokens":1,"output_tokens":2}}', (1, 2, 0), "r"),
        (b'{"id":"r","usage":{"output_tokens":-2}}', None, None),
        (b'{"id":7}', None, None),
        (b"[]", None, None),
        (b"\xff", None, None),
    ],
)
def test_the_tokens_and_the_id_of_a_reply(reply, counts, response_id):
    usage = usage_of(reply)
    assert (usage and (usage.prompt_tokens, usage.completion_tokens, usage.cached_tokens)) == counts
    assert id_of(reply) == response_id
