import json
from array import array

import pytest
from hypothesis import given
from hypothesis import strategies as st

from router.core.fleet import Replica, Standing
from router.errors import BadRequest, NoCapacity, UnknownModel
from router.openai_api import (
    FAMILIES,
    OTHER,
    OTHER_MESSAGES,
    STORED,
    Kept,
    error_body,
    error_event,
    family_of,
    model_cards,
    models_body,
    parse,
    parse_form,
    refusal,
    stored_id,
)

CHAT = FAMILIES["/v1/chat/completions"]
RESPONSES = FAMILIES["/v1/responses"]
MESSAGES = FAMILIES["/v1/messages"]
EMBEDDINGS = FAMILIES["/v1/embeddings"]
TRANSCRIPTIONS = FAMILIES["/v1/audio/transcriptions"]

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
        (EMBEDDINGS, STREAM, {}),
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


@pytest.mark.parametrize("family", [CHAT, RESPONSES, EMBEDDINGS])
def test_only_the_model_of_an_alias_is_rewritten(family):
    body = b'{"x": 1.50, "model": "gpt-4o", "y": {"model": "gpt-4o"}}'
    call = parse(family, body, {"gpt-4o": "llama", "other": "x"})
    assert call.model == "llama"
    assert call.upstream_body() == b'{"x":1.50,"model":"llama","y":{"model": "gpt-4o"}}'
    assert parse(family, body, {"other": "x"}).upstream_body() is body
    streamed = parse(CHAT, b'{"model":"gpt-4o","stream":true}', {"gpt-4o": "llama"})
    assert json.loads(streamed.upstream_body()) == {"model": "llama", **STREAM, **BOTH}


@pytest.mark.parametrize(
    ("members", "kept"),
    [
        ({}, Kept(None, nameless=True)),
        ({"store": True}, Kept(None, nameless=True)),
        ({"store": None, "request_id": None}, Kept(None, nameless=True)),
        ({"store": False}, Kept(None)),
        ({"request_id": "mine"}, Kept(None)),
        ({"previous_response_id": "resp_1"}, Kept("resp_1", nameless=True)),
        ({"previous_response_id": "resp_1", "store": False}, Kept("resp_1")),
    ],
)
def test_what_a_response_has_to_do_with_stored_ones(members, kept):
    assert parse(RESPONSES, json.dumps({"model": "m", **members}).encode()).kept == kept
    assert parse(CHAT, json.dumps({"model": "m", **members}).encode()).kept is None


def test_a_response_is_given_its_id():
    call = parse(RESPONSES, b'{"model": "m", "temperature": 0.50}')
    assert call.upstream_body("resp_1") == b'{"model":"m","temperature":0.50,"request_id":"resp_1"}'
    assert call.upstream_body() is call.body


IDS = array("I", [1, 70000, 3]).tobytes()


@pytest.mark.parametrize(
    ("family", "changed"),
    [
        (CHAT, {"kv_transfer_params": {"prompt_token_ids": [1, 70000, 3]}}),
        (FAMILIES["/v1/completions"], {"prompt": [1, 70000, 3]}),
        (MESSAGES, {}),
        (RESPONSES, {}),
        (EMBEDDINGS, {}),
    ],
)
def test_token_ids_stand_for_the_prompt_where_engines_take_them(family, changed):
    body = {"model": "m", "prompt": "a", "messages": [], "x": 1}
    call = parse(family, json.dumps(body).encode())
    assert json.loads(call.upstream_body(prompt_ids=IDS)) == {**body, **changed}
    streamed = parse(CHAT, b'{"model":"m","stream":true}').upstream_body(prompt_ids=IDS)
    assert json.loads(streamed).keys() == {"model", "kv_transfer_params", *STREAM, *BOTH}


@pytest.mark.parametrize("family", [CHAT, FAMILIES["/v1/completions"], MESSAGES, RESPONSES, OTHER])
def test_what_clients_say_of_transfers_is_dropped_unless_they_may(family):
    body = b'{"model":"m","kv_transfer_params":{"prompt_token_ids":[1]},"x":1.50}'
    call = parse(family, body)
    assert "kv_transfer_params" not in call.fields
    assert call.upstream_body() == b'{"model":"m","x":1.50}'
    assert parse(family, body, allow_transfer=True).upstream_body() is body


@pytest.mark.parametrize("field", ["previous_response_id", "request_id"])
def test_ids_of_responses_are_text(field):
    with pytest.raises(BadRequest) as raised:
        parse(RESPONSES, json.dumps({"model": "m", field: 1}).encode())
    assert raised.value.param == field


FORM = b'--b\r\nContent-Disposition: form-data; name="model"\r\n\r\n%b\r\n--b--\r\n'


def test_a_form_is_read_and_rewritten_where_it_names_its_model():
    body = FORM % b"whisper-1"
    call = parse_form(TRANSCRIPTIONS, b"multipart/form-data; boundary=b", body)
    assert (call.model, call.upstream_body()) == ("whisper-1", body)
    aliased = parse_form(TRANSCRIPTIONS, b"multipart/form-data; boundary=b", body, {"whisper-1": "large"})
    assert (aliased.model, aliased.upstream_body()) == ("large", FORM % b"large")


@pytest.mark.parametrize("model", [b"", b"\xff"])
def test_a_form_without_a_model_is_refused(model):
    with pytest.raises(BadRequest) as raised:
        parse_form(TRANSCRIPTIONS, b"multipart/form-data; boundary=b", FORM % model)
    assert raised.value.param == "model"


@pytest.mark.parametrize(
    ("method", "path", "family"),
    [
        ("POST", "/v1/chat/completions", CHAT),
        ("GET", "/v1/chat/completions", CHAT),  # to be told that it takes POST
        ("POST", "/rerank", FAMILIES["/rerank"]),
        ("POST", "/v1/audio/translations", FAMILIES["/v1/audio/translations"]),
        ("POST", "/v1/messages/count_tokens", FAMILIES["/v1/messages/count_tokens"]),
        ("POST", "/v1/images/generations", OTHER),
        ("POST", "/v1/chat/completions/render", OTHER),
        ("POST", "/v1/responses/compact", OTHER),
        ("POST", "/v1/audio/v1.5/speech", OTHER),
        ("POST", "/v1/messages/batches", OTHER_MESSAGES),
        ("GET", "/v1/responses/resp_1", STORED),
        ("DELETE", "/v1/responses/resp_1", STORED),
        ("GET", "/v1/responses/resp_1/input_items", STORED),
        ("POST", "/v1/responses/my.id:7~-/cancel", STORED),
        ("GET", "/v1/images/generations", None),
        ("PUT", "/v1/responses/resp_1", None),
        ("GET", "/v1/responses/", None),
        ("GET", "/v1/responses/..", None),
        ("GET", "/v1/responses/a%2Fb", None),
        ("POST", "/v1/models", None),
        ("POST", "/v1/load_lora_adapter", None),
        ("POST", "/v1/unload_lora_adapter", None),
        ("POST", "/v1/load_lora_adapter/", None),
        ("POST", "/v1/../reset_prefix_cache", None),
        ("POST", "/v1/x/../load_lora_adapter", None),
        ("POST", "/v1//load_lora_adapter", None),
        ("POST", "/v1/load%5Flora_adapter", None),
        ("POST", "/v1/", None),
        ("POST", "/v1", None),
        ("POST", "/v1/x\n", None),
        ("POST", "/reset_prefix_cache", None),
        ("POST", "/metrics", None),
        ("GET", "/health", None),
    ],
)
def test_which_requests_go_to_engines(method, path, family):
    assert family_of(method, path) is family


def test_the_id_in_a_path():
    assert stored_id("/v1/responses/resp_1") == stored_id("/v1/responses/resp_1/cancel") == "resp_1"


@pytest.mark.parametrize(
    ("path", "anthropic"),
    [
        ("/v1/messages", True),
        ("/v1/messages/x", True),
        ("/v1/chat/completions", False),
        ("", False),
        ("/x", False),
    ],
)
def test_refusals_of_the_http_layer_have_the_shape_of_their_path(path, anthropic):
    told = json.loads(refusal(BadRequest("no"), path))
    assert told["error"]["type"] == "invalid_request_error"
    assert ("param" not in told["error"], told.get("type") == "error") == (anthropic, anthropic)


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
    listed = json.loads(models_body(model_cards(("promised", "a"), [standing], created=5)))
    assert listed["object"] == "list"
    assert [(m["id"], m["max_model_len"], m["created"]) for m in listed["data"]] == [
        ("a", 10, 5),
        ("b", 10, 5),
        ("promised", None, 5),
    ]


def test_aliases_are_listed_with_the_model_behind_them():
    standing = Standing(Replica(id="r", url="http://r", models=("llama", "gpt-4o"), max_model_len=10))
    listed = json.loads(models_body(model_cards((), [standing], 5, {"gpt-4o": "llama", "o1": "gone"})))[
        "data"
    ]
    assert [(m["id"], m.get("root"), m.get("parent"), m["max_model_len"]) for m in listed] == [
        ("gpt-4o", "llama", "llama", 10),
        ("llama", None, None, 10),
        ("o1", "gone", "gone", None),
    ]
