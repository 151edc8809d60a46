"""The rest of a stream, as the first engine would have said it; or not at all."""

from __future__ import annotations

import json

import pytest

from router.core.continuation import Seam
from router.errors import Diverged
from router.http.transcript import Origin
from router.splice import Spliced, Told

TOLD = Told(Origin("a", 7, "m"), [1, 2, 3, 4], "1234", prompt_tokens=9, cached_tokens=8)


def chunk(text, ids, finish=None):
    choice = {"index": 0, "delta": {"content": text}, "finish_reason": finish, "token_ids": ids}
    return b"data: %b\n\n" % json.dumps({"id": "b", "created": 8, "model": "x", "choices": [choice]}).encode()


def said(out):
    events = [json.loads(event.removeprefix(b"data: ")) for event in out.split(b"\n\n")[:-1]]
    choices = [choice for event in events for choice in event["choices"]]
    text = "".join(choice["delta"].get("content") or "" for choice in choices)
    return text, [i for choice in choices for i in choice.get("token_ids", [])]


def test_what_the_client_has_is_not_said_again():
    rest = Spliced(TOLD, Seam(2, again="34"), keep_ids=True)
    out = rest.feed(chunk("3", [3]) + chunk("45", [4, 5]) + chunk("6", [6], "stop"))
    assert said(out) == ("56", [5, 6])
    assert rest.token_ids == [1, 2, 3, 4, 5, 6]
    assert rest.text == "123456"
    assert b'"id":"a","created":7,"model":"m"' in out


def test_a_second_break_forgets_no_token():
    rest = Spliced(TOLD, Seam(2, again="34"), keep_ids=True)
    assert rest.feed(chunk("3", [3])) == b""
    assert (rest.token_ids, rest.text) == ([1, 2, 3, 4], "1234")


@pytest.mark.parametrize(
    "events", [chunk("x", [9]), chunk("3", [3], "stop")], ids=["another text", "too short"]
)
def test_a_rest_that_does_not_fit_is_none(events):
    with pytest.raises(Diverged):
        Spliced(TOLD, Seam(2, again="34")).feed(events)


def test_what_the_client_lacks_comes_first():
    rest = Spliced(TOLD, Seam(4, ahead="!"), keep_ids=True)
    assert said(rest.feed(chunk("5", [5]))) == ("!5", [5])
    assert rest.text == "1234!5"
