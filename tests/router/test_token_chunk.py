"""The short way of a chunk gives the very bytes of the long one."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.http.framing import Chunked
from router.http.sse import EventStream
from router.http.token_chunk import MAX_BYTES, Form, take_each, without_ids


def framed(payload):
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def event(choice, **members):
    body = {"id": "c", "created": 1, "model": "m", "choices": [choice], **members}
    return b"data: " + json.dumps(body, separators=(",", ":"), ensure_ascii=False).encode() + b"\n\n"


def chat(text, ids, **more):
    return event(
        {
            "index": 0,
            "delta": {"content": text},
            "logprobs": None,
            "finish_reason": None,
            **more,
            "token_ids": ids,
        }
    )


def completion(text, ids, prompt_ids=None):
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}
    return event(choice | {"prompt_token_ids": prompt_ids, "token_ids": ids})


def the_long_way(read):
    events = EventStream()
    out = b"".join(framed(e + b"\n\n") for e in events.feed(Chunked().feed(read)).split(b"\n\n")[:-1])
    return events.token_ids, out


def ids_of(noted):
    return [int(number) for number in noted.replace(b"]", b",").split(b",") if number]


texts = st.text(min_size=1) | st.sampled_from(
    ['"token_ids":[1]', "]}]}\n\n\r\n", '"},"logprobs":null', "a\nb"]
)
token_ids = st.lists(st.integers(min_value=0, max_value=200_000), min_size=1, max_size=4)
ordinary = (
    st.builds(chat, texts, token_ids)
    | st.builds(chat, texts, token_ids, stop_reason=st.none())
    | st.builds(completion, texts, token_ids)
)


@given(ordinary)
def test_an_ordinary_chunk_takes_the_short_way(payload):
    found = without_ids(framed(payload))
    assert found is not None
    assert (ids_of(found[0]), found[1]) == the_long_way(framed(payload))


@given(ordinary, st.lists(ordinary, min_size=1, max_size=5))
def test_so_do_several_in_one_read(first, payloads):
    read = b"".join(map(framed, payloads))
    found = take_each(read, Form.of(framed(first)))
    assert found is not None
    assert (ids_of(b"".join(ids for ids, _, _ in found)), b"".join(rest for _, _, rest in found)) == (
        the_long_way(read)
    )


def said(payload):
    choice = json.loads(payload[len(b"data: ") :])["choices"][0]
    return choice["delta"]["content"] if "delta" in choice else choice["text"]


@pytest.mark.parametrize("make", [chat, completion])
@given(text=texts, ids=token_ids)
def test_of_a_chunk_of_the_streams_form_the_text_is_known(make, text, ids):
    form, payload = Form.of(framed(make("a", [5]))), make(text, ids)
    (taken,) = take_each(framed(payload), form)
    if b'"' in json.dumps(text, ensure_ascii=False).encode()[1:-1]:
        assert taken[1] is None
    else:
        assert json.loads(b'"%b"' % taken[1]) == text == said(payload)
    assert (taken[0], taken[2]) == without_ids(framed(payload))


ONE = chat("a", [5])
OTHERS = [
    b"",
    ONE,  # no chunk
    framed(ONE)[:-1],
    framed(ONE)[1:],
    framed(ONE) + b"0\r\n\r\n",
    framed(ONE + ONE),  # two events in a chunk
    framed(ONE[:-1]),
    framed(ONE.replace(b"\n", b"\r\n")),
    b"0" + framed(ONE),  # a size as others may write it
    framed(ONE).replace(b"\r\n", b";x\r\n", 1),
    framed(ONE)[: -len(b"\n\n\r\n")] + b"\n\r\n",
    framed(b"event: x\n" + ONE),
    framed(chat("x" * MAX_BYTES, [5])),
    framed(chat("a", None)),
    framed(completion("a", [5], prompt_ids=[1, 2])),
    framed(event({"delta": {}, "logprobs": None, "finish_reason": None, "token_ids": [5]})),
    framed(event({"delta": {"content": "a"}, "logprobs": None, "finish_reason": "stop", "token_ids": [5]})),
    framed(
        event({"delta": {"content": "a"}, "logprobs": None, "finish_reason": None, "token_ids": [5]}, usage=1)
    ),
    framed(ONE.replace(b"[5]", b'[5],"more":[6]')),
    framed(ONE.replace(b'"choices":[', b'"choices":[{"index":1,"token_ids":[4]},')),
    framed(ONE.replace(b'"choices":', b'"prompt_token_ids":[1],"choices":')),
    framed(b"data: [DONE]\n\n"),
]


@pytest.mark.parametrize("read", OTHERS)
def test_anything_else_is_left_to_the_long_way(read):
    assert without_ids(read) is None
    assert Form.of(framed(ONE)).take(read) is None
    assert take_each(read, Form.of(framed(ONE))) is None


@given(st.lists(ordinary, min_size=1, max_size=3), st.sampled_from(OTHERS[2:]), st.integers(0, 3))
def test_a_read_with_anything_else_in_it_too(payloads, other, at):
    chunks = list(map(framed, payloads))
    chunks.insert(at, other)
    assert take_each(b"".join(chunks), Form.of(framed(ONE))) is None


@given(cut=st.integers(min_value=1, max_value=len(framed(ONE)) - 1))
def test_a_part_of_a_chunk_is_no_chunk(cut):
    assert without_ids(framed(ONE)[:cut]) is None
    assert take_each(framed(ONE) + framed(ONE)[:cut], Form.of(framed(ONE))) is None
