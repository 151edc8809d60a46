"""What a load test takes for an answer, and what it does not."""

from __future__ import annotations

import pytest

from loadtests.answer import Answer, BrokenStream

ERROR = b'{"error":{"message":"out of memory","code":500}}'
CHUNK = b'{"choices":[{"delta":{"content":"sheep"}}]}'


@pytest.mark.parametrize("body", [ERROR, b"{}", b'{"choices":[]}'])
def test_a_reply_without_an_answer_is_none(body):
    with pytest.raises(BrokenStream, match="no answer"):
        Answer(0.0).read_whole(body)


@pytest.mark.parametrize(
    ("events", "why"),
    [
        ([b"[DONE]"], "no answer"),
        ([b'{"choices":[],"usage":{"prompt_tokens":3}}', b"[DONE]"], "no answer"),
        ([CHUNK], "without"),
        ([CHUNK, ERROR, b"[DONE]"], "out of memory"),
    ],
)
def test_a_stream_that_says_nothing_or_breaks_off_is_none(events, why):
    with pytest.raises(BrokenStream, match=why):
        Answer(0.0).read(iter(events))


def test_an_answer_is_read():
    answer, whole = Answer(0.0), Answer(0.0)
    answer.read(iter([CHUNK, b"[DONE]"]))
    whole.read_whole(b'{"choices":[{"message":{"content":"sheep"}}]}')
    assert (answer.text, whole.text) == ("sheep", "sheep")
