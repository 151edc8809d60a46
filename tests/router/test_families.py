"""What families beside chat have of their own: errors, ends of streams, counts, keepers, forms, names."""

import json

import pytest
from router_wire import LAST_CHUNK, client, engine, post, relaying, reply, says, serving, stream, until

from router.core.placement import round_robin
from router.http.server import Limits
from router.responses_api import mark, mark_in, new_id

MESSAGES, RESPONSES = "/v1/messages", "/v1/responses"
TRANSCRIPTIONS, UNHEARD_OF = "/v1/audio/transcriptions", "/v1/unheard/of"


def event(name, **data):
    body = json.dumps({**data, "type": name}, separators=(",", ":"))
    return f"event: {name}\ndata: {body}\n\n".encode()


def chunk(text):
    return b'data: {"choices":[{"delta":{"content":"%b"}}]}\n\n' % text


DONE = b"data: [DONE]\n\n"
CRASH = b'data: {"error": {"message": "EngineCore died", "code": 500}}\n\n'
START = event("message_start", message={"id": "m", "usage": {"input_tokens": 20, "output_tokens": 0}})
DELTA = event("content_block_delta", index=0, delta={"type": "text_delta", "text": "a"})
LAST = event(
    "message_delta",
    delta={"stop_reason": "end_turn"},
    usage={"input_tokens": 4, "output_tokens": 7, "cache_read_input_tokens": 16},
)
STOP = event("message_stop")
CREATED = event("response.created", response={"id": "r", "status": "in_progress"}, sequence_number=0)
TEXT = event("response.output_text.delta", delta="a", sequence_number=1)
COUNTS = {"input_tokens": 20, "output_tokens": 7, "input_tokens_details": {"cached_tokens": 16}}
COMPLETED = event(
    "response.completed", response={"id": "r", "status": "completed", "usage": COUNTS}, sequence_number=2
)
# path: what has come when the stream breaks, its end, and an error as the engine says it.
STREAMS = {
    MESSAGES: ((START, DELTA), (LAST, STOP), event("error", error={"type": "internal_error"})),
    RESPONSES: ((CREATED, TEXT), (COMPLETED,), event("error", message="x", sequence_number=2)),
    TRANSCRIPTIONS: ((chunk(b"a"), chunk(b"b")), (DONE,), CRASH),
    UNHEARD_OF: ((chunk(b"a"), chunk(b"b")), (DONE,), CRASH),
}
WITH_END = [MESSAGES, RESPONSES, TRANSCRIPTIONS]


def asks(path, *headers, **members):
    return post(path, json.dumps({"model": "m", **members}).encode(), *headers)


async def answered(port, message):
    async with client(port) as c:
        await c.send(message)
        return await c.reply()


def sent_body(request):
    return json.loads(request.partition(b"\r\n\r\n")[2])


def metric(relay, name, **labels):
    return relay._metrics.registry.get_sample_value(name, labels or {"model": "m"})


def last_words(path, told):
    """The error that a broken stream ends with, checked for its family's form; and what came before it."""
    before, _, data = told.removesuffix(b"\n\n").rpartition(b"data: ")
    said = json.loads(data)
    if path == MESSAGES:
        before = before.removesuffix(b"event: error\n")
        assert (said["type"], said["error"]["type"]) == ("error", "api_error")
        assert said["request_id"]
        return before, said["error"]["message"]
    if path == RESPONSES:
        before = before.removesuffix(b"event: response.failed\n")
        assert (said["type"], said["sequence_number"]) == ("response.failed", 2)
        assert (said["response"]["id"], said["response"]["status"]) == ("r", "failed")
        assert said["response"]["error"]["code"] == "server_error"
        return before, said["response"]["error"]["message"]
    assert (said["error"]["type"], said["error"]["code"]) == ("server_error", "upstream_error")
    return before, said["error"]["message"]


@pytest.mark.parametrize("path", STREAMS)
async def test_a_whole_stream_passes_as_it_is(path):
    begun, end, _ = STREAMS[path]
    async with (
        engine(says(stream(*begun, *end) + LAST_CHUNK)) as (_, url),
        relaying(url) as (relay, fleet, port),
    ):
        status, headers, told = await answered(port, asks(path, stream=True))
        assert (status, headers["content-type"]) == (200, "text/event-stream; charset=utf-8")
        assert told == b"".join((*begun, *end))
        assert metric(relay, "herd_streams_truncated_total") == 0
        assert metric(relay, "herd_time_to_first_token_seconds_count") == 1
        assert fleet.get("r0").in_flight == 0


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("half", [b"", b'event: x\ndata: {"a'])
async def test_a_stream_that_is_cut_ends_in_its_familys_error(path, half):
    begun, _, _ = STREAMS[path]
    async with (
        engine(says(stream(*begun, *([half] if half else [])), close=True)) as (_, url),
        relaying(url) as (relay, _, port),
        client(port) as c,
    ):
        await c.send(asks(path, stream=True))
        before, message = last_words(path, (await c.reply())[2])
        assert before == b"".join(begun)
        assert message.startswith("The stream broke off: the replica closed the connection")
        assert await c.at_end()
        assert metric(relay, "herd_streams_truncated_total") == 1


@pytest.mark.parametrize("path", WITH_END)
async def test_a_stream_that_ends_without_its_end_is_not_taken_for_whole(path):
    begun, _, _ = STREAMS[path]
    async with engine(says(stream(*begun) + LAST_CHUNK)) as (_, url), relaying(url) as (relay, _, port):
        before, message = last_words(path, (await answered(port, asks(path, stream=True)))[2])
        assert before == b"".join(begun)
        assert "without saying that it is whole" in message
        assert metric(relay, "herd_streams_truncated_total") == 1


async def test_a_stream_of_an_unknown_kind_may_end_as_it_likes():
    async with (
        engine(says(stream(chunk(b"a")) + LAST_CHUNK)) as (_, url),
        relaying(url) as (relay, _, port),
    ):
        assert (await answered(port, asks(UNHEARD_OF, stream=True)))[2] == chunk(b"a")
        assert metric(relay, "herd_streams_truncated_total") == 0


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize("cut", [False, True])
async def test_an_engines_own_error_is_the_last_thing_said(path, cut):
    begun, end, error = STREAMS[path]
    sent = stream(*begun, error) if cut else stream(*begun, error, *end[-1:], DONE) + LAST_CHUNK
    async with (
        engine(says(sent, close=cut)) as (_, url),
        relaying(url) as (relay, _, port),
        client(port) as c,
    ):
        await c.send(asks(path, stream=True))
        assert (await c.reply())[2] == b"".join((*begun, error))
        assert await c.at_end()
        assert metric(relay, "herd_streams_truncated_total") == 1


async def test_a_message_that_the_engine_aborted_is_not_whole():
    """vLLM that gets SIGTERM ends its streams with a null stop_reason and as if all were well."""
    given_up = event("message_delta", usage={"output_tokens": 1}).replace(
        b"{", b'{"delta":{"stop_reason":null},', 1
    )
    sent = stream(START, DELTA, given_up, STOP) + LAST_CHUNK
    async with engine(says(sent)) as (_, url), relaying(url) as (_, _, port):
        before, _ = last_words(MESSAGES, (await answered(port, asks(MESSAGES, stream=True)))[2])
        assert before == START + DELTA + given_up


@pytest.mark.parametrize("path", STREAMS)
@pytest.mark.parametrize(
    "part", [b"", b"HTTP/1.1 200 OK\r\n", stream(), stream(b"event: x\nda"), reply(b"{}")[:-1]]
)
async def test_a_reply_cut_before_anything_was_passed_on_is_asked_elsewhere(path, part):
    begun, end, _ = STREAMS[path]
    async with (
        engine(says(part, close=True)) as (bad, bad_url),
        engine(says(stream(*begun, *end) + LAST_CHUNK)) as (_, url),
        relaying(bad_url, url) as (relay, fleet, port),
    ):
        status, _, told = await answered(port, asks(path, stream=True))
        assert (status, told, len(bad.requests)) == (200, b"".join((*begun, *end)), 1)
        assert [s.in_flight for s in fleet] == [0, 0]
        assert metric(relay, "herd_retries_total", model="m", reason="cut") == 1


@pytest.mark.parametrize("path", ["/v1/embeddings", "/rerank", "/tokenize", MESSAGES, RESPONSES, UNHEARD_OF])
async def test_a_whole_reply_is_held_until_it_is_whole(path):
    body = b'{"id": "x"}'
    async with (
        engine(says(reply(body)[:-4], close=True)) as (_, bad_url),
        engine(says(reply(body))) as (_, url),
        relaying(bad_url, url) as (_, _, port),
    ):
        status, headers, told = await answered(port, asks(path))
        assert (status, told, headers["content-type"]) == (200, body, "application/json")


async def test_a_reply_that_is_neither_json_nor_events_flows_and_is_cut_if_it_breaks():
    speech = b"HTTP/1.1 200 OK\r\ncontent-type: audio/mpeg\r\ncontent-length: 8\r\n\r\n"
    async with engine(says(speech + b"ID3 abcd")) as (_, url), relaying(url) as (_, _, port):
        assert (await answered(port, asks("/v1/audio/speech")))[2] == b"ID3 abcd"
    async with (
        engine(says(speech + b"ID3 ", close=True)) as (_, url),
        relaying(url) as (_, _, port),
        client(port) as c,
    ):
        await c.send(asks("/v1/audio/speech"))
        await c.head()
        assert await c.reader.read() == b"ID3 "


TOLD = {
    MESSAGES: {"input_tokens": 4, "output_tokens": 7, "cache_read_input_tokens": 16},
    RESPONSES: COUNTS,
    "/v1/embeddings": {"prompt_tokens": 20, "total_tokens": 20, "completion_tokens": 0},
}


@pytest.mark.parametrize(
    ("path", "sent", "output", "cached"),
    [
        (MESSAGES, stream(START, DELTA, LAST, STOP) + LAST_CHUNK, 7, 16),
        (RESPONSES, stream(CREATED, TEXT, COMPLETED) + LAST_CHUNK, 7, 16),
        *[
            (path, reply(json.dumps({"usage": told}).encode()), told.get("output_tokens", 0), cached)
            for (path, told), cached in zip(TOLD.items(), (16, 16, 0), strict=True)
        ],
    ],
)
async def test_tokens_are_counted_where_they_are_told(path, sent, output, cached):
    async with engine(says(sent)) as (_, url), relaying(url) as (relay, _, port):
        assert (await answered(port, asks(path, stream=sent.endswith(LAST_CHUNK))))[0] == 200
        assert metric(relay, "herd_prompt_tokens_total") == 20
        assert metric(relay, "herd_output_tokens_total") == output
        assert metric(relay, "herd_cached_tokens_total") == cached


# -- errors before any stream


@pytest.mark.parametrize("path", [MESSAGES, "/v1/messages/count_tokens", "/v1/messages/batches"])
@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [(b"{", 400, "invalid_request_error"), (b"{}", 400, "invalid_request_error"),
     (b'{"model":"other"}', 404, "not_found_error"), (b'{"model":"m"}', 503, "overloaded_error")],
)  # fmt: skip
async def test_messages_get_anthropics_errors(path, body, status, kind):
    async with relaying("http://127.0.0.1:1") as (_, fleet, port):
        fleet.failed("r0", now=0.0)
        told, headers, said = await answered(port, post(path, body, "x-request-id: mine"))
        error = json.loads(said)
        assert (told, error["type"], error["error"]["type"]) == (status, "error", kind)
        assert error["request_id"] == headers["x-request-id"] == "mine"
        assert ("retry-after" in headers) == (status == 503)


async def test_messages_that_fail_everywhere_or_ask_otherwise():
    async with engine(says(b"", close=True)) as (_, url), relaying(url) as (_, _, port):
        status, _, said = await answered(port, asks(MESSAGES))
        assert (status, json.loads(said)["error"]["type"]) == (502, "api_error")
        status, _, said = await answered(port, b"GET /v1/messages HTTP/1.1\r\nhost: h\r\n\r\n")
        assert (status, json.loads(said)["error"]["type"]) == (405, "invalid_request_error")


async def test_what_the_http_layer_refuses_has_the_shape_of_the_path():
    async with relaying() as (relay, _, _), serving(relay, Limits(body_bytes=10)) as (_, port):
        status, _, said = await answered(port, asks(MESSAGES))
        assert (status, json.loads(said)["error"]["type"]) == (413, "request_too_large")
        status, _, said = await answered(port, asks("/v1/embeddings"))
        assert (status, json.loads(said)["error"]["code"]) == (413, "request_too_large")


@pytest.mark.parametrize("path", [MESSAGES, RESPONSES, "/rerank"])
async def test_an_engines_refusal_passes_as_it_is(path):
    refusal = b'{"type":"error","error":{"type":"BadRequestError","message":"too long"}}'
    async with (
        engine(says(reply(refusal, status="400 Bad Request"))) as (it, url),
        relaying(url) as (_, _, port),
    ):
        status, _, said = await answered(port, asks(path, stream=True))
        assert (status, said, len(it.requests)) == (400, refusal, 1)


# -- stored responses


def naming(given=None):
    """An engine that names its responses as the request says, or as it likes."""

    async def script(request, reader, writer):
        body = sent_body(request) if request.startswith(b"POST /v1/responses ") else {}
        name = given or body.get("request_id") or "resp_0"
        if body.get("stream"):
            created = event("response.created", response={"id": name}, sequence_number=0)
            writer.write(stream(created, COMPLETED) + LAST_CHUNK)
        else:
            writer.write(reply(json.dumps({"id": name}).encode()))

    return script


async def id_of_new(port, **members):
    return json.loads((await answered(port, asks(RESPONSES, **members)))[2])["id"]


async def test_a_response_is_named_after_its_keeper_and_goes_on_there():
    async with (
        engine(naming()) as (a, a_url),
        engine(naming()) as (b, b_url),
        relaying(a_url, b_url, policy=round_robin) as (_, fleet, port),
    ):
        first, second = [await id_of_new(port, input="x") for _ in range(2)]
        assert [mark_in(first), mark_in(second)] == [mark("r0"), mark("r1")]
        for before, keeper, other in ((first, a, b), (second, b, a)):
            keeper.requests.clear()
            other.requests.clear()
            for _ in range(3):
                before = await id_of_new(port, previous_response_id=before)
            assert (len(keeper.requests), len(other.requests)) == (3, 0)
        fleet.left("r0")
        status, _, said = await answered(port, asks(RESPONSES, previous_response_id=first, stream=True))
        error = json.loads(said)["error"]
        assert (status, error["code"], error["param"]) == (
            404,
            "previous_response_not_found",
            "previous_response_id",
        )
        assert "lost: the replica that kept it has left the fleet" in error["message"]
        assert await id_of_new(port, previous_response_id=second)


@pytest.mark.parametrize(
    ("method", "path"), [("GET", ""), ("GET", "?stream=true"), ("DELETE", ""), ("POST", "/cancel")]
)
async def test_a_stored_response_is_asked_of_its_keeper(method, path):
    def about(response_id):
        line = f"{method} {RESPONSES}/{response_id}{path} HTTP/1.1"
        return line, f"{line}\r\nhost: h\r\ncontent-length: 0\r\n\r\n".encode()

    async with (
        engine(naming()) as (a, a_url),
        engine(naming()) as (b, b_url),
        relaying(a_url, b_url, policy=round_robin) as (relay, fleet, port),
    ):
        line, request = about(new_id("r1"))
        for _ in range(2):
            assert (await answered(port, request))[0] == 200
        assert [sent.split(b"\r\n")[0].decode() for sent in b.requests] == [line, line]
        assert not a.requests
        label = {"model": "m", "path": "/v1/responses/{id}", "code": "200"}
        assert metric(relay, "herd_requests_total", **label) == 2
        status, _, said = await answered(port, about("resp_nobodys")[1])
        assert (status, json.loads(said)["error"]["code"]) == (404, "response_not_found")
        fleet.left("r1")
        status, _, said = await answered(port, request)
        assert (status, json.loads(said)["error"]["param"]) == (404, "response_id")


async def test_a_keeper_that_is_down_is_waited_for_and_no_other_is_asked():
    async with (
        engine(says(b"", close=True)) as (a, a_url),
        engine(naming()) as (b, b_url),
        relaying(a_url, b_url) as (_, fleet, port),
    ):
        request = asks(RESPONSES, previous_response_id=new_id("r0"))
        status, _, said = await answered(port, request)
        assert (status, json.loads(said)["error"]["code"]) == (502, "upstream_error")
        await a.stop()
        for _ in range(2):  # when it is found out, and after
            status, headers, _ = await answered(port, request)
            assert (status, headers["retry-after"]) == (503, "1")
        fleet.recovered("r0", now=0.0)
        assert not b.requests


async def test_every_attempt_has_an_id_of_its_own():
    async with (
        engine(says(b"", close=True)) as (bad, bad_url),
        engine(naming()) as (good, url),
        relaying(bad_url, url) as (_, _, port),
    ):
        assert mark_in(await id_of_new(port)) == mark("r1")
        ids = [sent_body(it.requests[0])["request_id"] for it in (bad, good)]
        assert [mark_in(response_id) for response_id in ids] == [mark("r0"), mark("r1")]


@pytest.mark.parametrize("streamed", [False, True])
@pytest.mark.parametrize("members", [{"request_id": "mine"}, {}])
async def test_an_id_that_the_router_did_not_make_is_learnt_from_the_reply(members, streamed):
    name = None if members else "resp_of_an_engine_that_takes_none"
    async with (
        engine(naming(name)) as (a, a_url),
        engine(naming(name)) as (b, b_url),
        relaying(a_url, b_url, policy=round_robin) as (_, _, port),
    ):
        assert (await answered(port, asks(RESPONSES, stream=streamed, **members)))[0] == 200
        if members:
            assert sent_body(a.requests[0])["request_id"] == "mine"
        for _ in range(3):
            await answered(port, asks(RESPONSES, previous_response_id=name or "mine", store=False))
        assert (len(a.requests), len(b.requests)) == (4, 0)


async def test_what_is_not_stored_is_sent_as_it_came():
    body = b'{"model": "m",  "store": false}'
    async with engine(says(reply(b"{}"))) as (it, url), relaying(url) as (_, _, port):
        await answered(port, post(RESPONSES, body))
        assert it.requests[0].endswith(b"\r\n\r\n" + body)


# -- forms


def form(model, boundary=b"b0und"):
    parts = [
        b'name="file"; filename="a.wav"\r\nContent-Type: audio/wav\r\n\r\nRIFF' + bytes(range(256)) * 4000
    ]
    if model is not None:
        parts.append(b'name="model"\r\n\r\n' + model)
    head = b"--%b\r\nContent-Disposition: form-data; " % boundary
    return b"\r\n".join(head + part for part in parts) + b"\r\n--%b--\r\n" % boundary


def upload(path, body, boundary="b0und"):
    return post(path, body, f"content-type: multipart/form-data; boundary={boundary}")


@pytest.mark.parametrize("path", [TRANSCRIPTIONS, "/v1/audio/translations", "/v1/images/edits"])
async def test_a_form_goes_by_its_model_and_arrives_as_it_was(path):
    async with (
        engine(says(reply(b'{"text":"hello"}'))) as (other, other_url),
        engine(says(reply(b'{"text":"hello"}'))) as (it, url),
        relaying(other_url, url, models=("m", "whisper"), aliases={"whisper-1": "whisper"}) as (_, _, port),
    ):
        for model in (b"whisper", b"whisper-1"):
            assert (await answered(port, upload(path, form(model))))[2] == b'{"text":"hello"}'
        assert {request.partition(b"\r\n\r\n")[2] for request in it.requests} == {form(b"whisper")}
        assert b"content-type: multipart/form-data; boundary=b0und\r\n" in it.requests[0]
        assert not other.requests


@pytest.mark.parametrize(
    ("sent", "status", "param"),
    [
        (upload(TRANSCRIPTIONS, form(None)), 400, "model"),
        (upload(TRANSCRIPTIONS, form(b"other")), 404, "model"),
        (upload(TRANSCRIPTIONS, form(b"m"), boundary="another"), 400, None),
        (post(TRANSCRIPTIONS, form(b"m")), 400, None),
        (upload("/v1/chat/completions", form(b"m")), 400, None),
        (asks(UNHEARD_OF, model=None), 400, "model"),
        (asks("/unheard/of"), 404, None),
    ],
)
async def test_what_names_no_model_that_is_served_is_refused(sent, status, param):
    async with engine(says(reply(b"{}"))) as (it, url), relaying(url) as (_, _, port):
        told, _, said = await answered(port, sent)
        assert (told, json.loads(said)["error"]["param"]) == (status, param)
        assert not it.requests


# -- several models, other names


async def test_each_request_goes_to_its_model():
    async with (
        engine(says(reply(b'{"from":"a"}'))) as (_, a_url),
        engine(says(reply(b'{"from":"b"}'))) as (_, b_url),
        relaying(a_url, b_url, models=("a", "b"), aliases={"gpt-4o": "b"}) as (relay, fleet, port),
    ):
        for path in ("/v1/chat/completions", "/v1/embeddings", MESSAGES, UNHEARD_OF):
            for model, served in (("a", "a"), ("b", "b"), ("gpt-4o", "b")):
                told = (await answered(port, asks(path, model=model)))[2]
                assert json.loads(told) == {"from": served}
        assert metric(relay, "herd_requests_total", model="b", path=MESSAGES, code="200") == 2
        assert metric(relay, "herd_requests_total", model="gpt-4o", path=MESSAGES, code="200") is None

        status, _, said = await answered(port, asks("/v1/embeddings", model="c"))
        assert (status, json.loads(said)["error"]["code"]) == (404, "model_not_found")
        assert "this fleet serves a, b, gpt-4o" in json.loads(said)["error"]["message"]
        listed = json.loads((await answered(port, b"GET /v1/models HTTP/1.1\r\nhost: h\r\n\r\n"))[2])
        assert [(m["id"], m.get("root")) for m in listed["data"]] == [
            ("a", None),
            ("b", None),
            ("gpt-4o", "b"),
        ]

        fleet.failed("r1", now=0.0)
        for model in ("b", "gpt-4o"):
            status, headers, _ = await answered(port, asks("/v1/embeddings", model=model))
            assert (status, headers["retry-after"]) == (503, "1")
        assert (await answered(port, asks("/v1/embeddings", model="a")))[0] == 200


async def test_a_client_that_leaves_a_stream_of_any_family_aborts_at_the_engine():
    async def script(request, reader, writer):
        writer.write(stream(START, DELTA))
        await writer.drain()
        await reader.readexactly(1)  # returns only when the router closes

    async with engine(script) as (it, url), relaying(url) as (relay, fleet, port):
        async with client(port) as c:
            await c.send(asks(MESSAGES, stream=True))
            await c.head()
            assert fleet.get("r0").in_flight == 1
        await until(it.disconnected.is_set)
        await until(lambda: fleet.get("r0").in_flight == 0)
        assert metric(relay, "herd_client_disconnects_total") == 1
