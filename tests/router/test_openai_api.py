import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.fleet import Replica, Standing
from router.errors import BadRequest, NoCapacity, UnknownModel
from router.openai_api import FAMILIES, error_body, error_event, models_body, parse

CHAT = FAMILIES["/v1/chat/completions"]
RESPONSES = FAMILIES["/v1/responses"]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=10,
)


USAGE = {"stream_options": {"include_usage": True}}
BOTH = {"return_token_ids": True, **USAGE}
STREAM = {"stream": True}


@pytest.mark.parametrize(
    ("family", "members", "changed"),
    [
        (CHAT, {}, {}),
        (CHAT, {"stream": False}, {}),
        (CHAT, {"stream": None}, {}),
        (RESPONSES, STREAM, {}),
        (CHAT, STREAM, BOTH),
        (CHAT, {**STREAM, "return_token_ids": False}, BOTH),
        (CHAT, {**STREAM, "return_token_ids": True}, USAGE),
        (CHAT, {**STREAM, "stream_options": {"include_usage": False, "x": 1}}, BOTH),
        (CHAT, {**STREAM, "stream_options": {"include_usage": True, "x": 1}}, {"return_token_ids": True}),
        (CHAT, {**STREAM, **BOTH}, {}),
    ],
)
def test_what_engines_are_asked_for(family, members, changed):
    body = {"model": "m", **members}
    assert json.loads(parse(family, json.dumps(body).encode()).upstream_body()) == {**body, **changed}


@given(fields=st.dictionaries(st.text(), json_values, max_size=5))
def test_unknown_members_pass_untouched(fields):
    known = {"model": "m", "stream": True, "return_token_ids": True, "stream_options": None}
    sent = json.loads(parse(CHAT, json.dumps({**fields, **known}).encode()).upstream_body())
    assert sent == {**fields, **known, "stream_options": {"include_usage": True}}


def test_a_body_that_needs_no_change_is_the_same_bytes():
    body = b'{ "model" : "m", "x": 1.0e2, "x": 2 }'
    assert parse(CHAT, body).upstream_body() is body


@pytest.mark.parametrize("model", [b"null", b'""', b"3", b"[]"])
def test_the_model_is_a_name(model):
    with pytest.raises(BadRequest) as raised:
        parse(CHAT, b'{"model": ' + model + b"}")
    assert raised.value.param == "model"


@given(body=st.binary(max_size=60))
def test_bytes_that_are_not_a_request_are_refused(body):
    with pytest.raises(BadRequest, match=r"JSON object|'model'"):
        parse(CHAT, body)


def test_errors_have_openais_shape():
    error = UnknownModel('no "x"', param="model")
    told = json.loads(error_body(error))
    assert told == {
        "error": {
            "message": 'no "x"',
            "type": "invalid_request_error",
            "param": "model",
            "code": "model_not_found",
        }
    }
    event = error_event(NoCapacity("full"))
    assert event.startswith(b'data: {"error":{"message":"full"')
    assert event.endswith(b"}}\n\n")


def test_models_are_listed_from_the_registry():
    standing = Standing(Replica(id="r", url="http://r", models=("b", "a"), max_model_len=10))
    listed = json.loads(models_body(("promised", "a"), [standing], created=5))
    assert listed["object"] == "list"
    assert [(m["id"], m["max_model_len"], m["created"]) for m in listed["data"]] == [
        ("a", 10, 5),
        ("b", 10, 5),
        ("promised", None, 5),
    ]
