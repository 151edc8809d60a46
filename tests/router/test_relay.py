import asyncio
import gc
import json

import pytest
from router_wire import LAST_CHUNK, WAIT_S, client, engine, post, relaying, reply, says, stream, until

from router.core.fleet import State
from router.core.placement import round_robin
from router.http.requests import Request
from router.http.upstream import IDLE_S

CHAT = "/v1/chat/completions"
ROLE = (
    b'data: {"id":"c","choices":[{"index":0,"delta":{"role":"assistant","content":""},"finish_reason":null}]'
    b',"prompt_token_ids":[1]}\n\n'
)
TEXT = (
    b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"a"},"finish_reason":null'
    b',"token_ids":[5]}]}\n\n'
)
USAGE = (
    b'data: {"id":"c","choices":[],"usage":{"prompt_tokens":7,"completion_tokens":1,'
    b'"prompt_tokens_details":{"cached_tokens":4}}}\n\n'
)
DONE = b"data: [DONE]\n\n"
ROLE_OUT = ROLE.replace(b',"prompt_token_ids":[1]', b"")
TEXT_OUT = TEXT.replace(b',"token_ids":[5]', b"")
WHOLE = stream(ROLE, TEXT, USAGE, DONE) + LAST_CHUNK


def chat(*headers, **members):
    return post(CHAT, json.dumps({"model": "m", **members}).encode(), *headers)


def sent_body(request):
    return json.loads(request.partition(b"\r\n\r\n")[2])


def metric(relay, name, **labels):
    return relay._metrics.registry.get_sample_value(name, labels)


async def answered(port, message):
    async with client(port) as c:
        await c.send(message)
        return await c.reply()


@pytest.mark.parametrize("answer", [reply(b"{}"), WHOLE], ids=["whole", "stream"])
async def test_an_answered_request_is_gone_without_the_garbage_collector(answer):
    """In a cycle it would stay, with its body, until a collection; and each costs the collector time."""
    asked = chat(stream=True) if answer is WHOLE else chat()

    def requests():
        return sum(type(thing) is Request for thing in gc.get_objects())

    async with engine(says(answer)) as (_, url), relaying(url) as (_, _, port), client(port) as c:
        await c.send(asked)
        await c.reply()
        gc.collect()
        gc.disable()
        try:
            before = requests()
            for _ in range(5):
                await c.send(asked)
                assert (await c.reply())[0] == 200
            assert requests() == before
        finally:
            gc.enable()


async def test_a_whole_reply_passes_with_its_headers():
    body = b'{"id":"x","usage":{"prompt_tokens":5,"completion_tokens":2}}'
    async with engine(says(reply(body))) as (it, url), relaying(url) as (relay, _, port):
        status, headers, told = await answered(
            port, chat("x-request-id: mine", "traceparent: 00-1", "connection: x-hop", "x-hop: 1", odd=[1.50])
        )
        assert (status, told, headers["x-request-id"]) == (200, body, "mine")
        assert headers["content-type"] == "application/json"
        request = it.requests[0].lower()
        assert b"x-request-id: mine\r\n" in request
        assert b"traceparent: 00-1\r\n" in request
        assert b"x-hop" not in request
        assert b'"odd": [1.5]' in request  # a body that needs no change is sent as it came
        assert metric(relay, "herd_output_tokens_total", model="m") == 2
        assert metric(relay, "herd_requests_total", model="m", path=CHAT, code="200") == 1


async def test_a_stream_is_asked_for_more_than_the_client_gets():
    async with engine(says(WHOLE)) as (it, url), relaying(url) as (relay, fleet, port):
        status, headers, body = await answered(port, chat(stream=True, custom={"a": [1]}))
        assert (status, body) == (200, ROLE_OUT + TEXT_OUT + DONE)
        assert headers["content-type"] == "text/event-stream; charset=utf-8"
        assert sent_body(it.requests[0]) == {
            "model": "m",
            "stream": True,
            "custom": {"a": [1]},
            "return_token_ids": True,
            "stream_options": {"include_usage": True},
        }
        assert metric(relay, "herd_cached_tokens_total", model="m") == 4
        assert metric(relay, "herd_time_to_first_token_seconds_count", model="m") == 1
        assert fleet.get("r0").in_flight == 0


async def test_a_client_that_asked_gets_everything():
    options = {"include_usage": True, "continuous_usage_stats": False}
    async with engine(says(WHOLE)) as (it, url), relaying(url) as (_, _, port):
        _, _, body = await answered(port, chat(stream=True, return_token_ids=True, stream_options=options))
        assert body == ROLE + TEXT + USAGE + DONE
        assert sent_body(it.requests[0])["stream_options"] == options


async def test_events_are_passed_on_as_they_come():
    go_on = asyncio.Event()

    async def script(request, reader, writer):
        writer.write(stream(ROLE, TEXT))
        await writer.drain()
        await go_on.wait()
        writer.write(b"e\r\n" + DONE + b"\r\n" + LAST_CHUNK)

    async with engine(script) as (_, url), relaying(url) as (_, fleet, port), client(port) as c:
        await c.send(chat(stream=True))
        await c.head()
        chunks = c.chunks()
        assert (await anext(chunks)).startswith(ROLE_OUT)
        await until(lambda: fleet.get("r0").awaiting_first_token == 0)
        assert (fleet.get("r0").in_flight, fleet.get("r0").awaiting_first_token) == (1, 0)
        go_on.set()
        assert [chunk async for chunk in chunks][-1] == DONE


async def test_an_engine_gets_the_origin_form():
    sent = chat().replace(CHAT.encode(), b"http://herd.example:8000" + CHAT.encode() + b"?a=b", 1)
    async with engine(says(reply(b"{}"))) as (it, url), relaying(url) as (_, _, port):
        assert (await answered(port, sent))[0] == 200
        assert it.requests[0].startswith(b"POST /v1/chat/completions?a=b HTTP/1.1\r\nhost: 127.0.0.1:")


async def test_connections_to_an_engine_are_used_again():
    async with engine(says(reply(b"{}"))) as (it, url), relaying(url) as (_, _, port):
        for _ in range(3):
            assert (await answered(port, chat()))[0] == 200
        assert (len(it.requests), it.connections) == (3, 1)


async def test_an_engine_that_closed_a_kept_connection_is_not_blamed():
    async with engine(says(reply(b"{}"), close=True)) as (it, url), relaying(url) as (_, fleet, port):
        for _ in range(3):
            assert (await answered(port, chat()))[0] == 200
        assert it.connections == 3
        assert fleet.get("r0").state is State.READY


def test_idle_connections_are_given_up_before_vllm_closes_them():
    assert IDLE_S < 5.0


async def test_a_dead_replica_gets_nothing_after_its_first_failed_connect():
    async with engine(says(reply(b"{}"))) as (dead, dead_url), engine(says(reply(b"{}"))) as (alive, url):
        await dead.stop()
        async with relaying(dead_url, url, policy=round_robin) as (relay, fleet, port):
            for _ in range(4):
                assert (await answered(port, chat()))[0] == 200
            assert len(alive.requests) == 4
            assert fleet.get("r0").state is State.DOWN
            assert fleet.get("r0").failures == 1
            assert metric(relay, "herd_retries_total", model="m", reason="connect") == 1


@pytest.mark.parametrize("part", [b"", b"HTTP/1.1 200 OK\r\n", WHOLE[:120], reply(b"{}")[:-1]])
async def test_a_reply_cut_before_anything_was_passed_on_is_asked_elsewhere(part):
    async with (
        engine(says(part, close=True)) as (_, bad_url),
        engine(says(WHOLE)) as (_, url),
        relaying(bad_url, url) as (_, fleet, port),
    ):
        status, _, body = await answered(port, chat(stream=True))
        assert (status, body) == (200, ROLE_OUT + TEXT_OUT + DONE)
        assert [s.in_flight for s in fleet] == [0, 0]


async def test_a_stream_that_breaks_ends_in_an_error_and_not_in_done():
    async with engine(says(stream(ROLE, TEXT), close=True)) as (_, url), relaying(url) as (relay, _, port):
        async with client(port) as c:
            await c.send(chat(stream=True))
            _, _, body = await c.reply()
            assert body.startswith(ROLE_OUT + TEXT_OUT + b'data: {"error":{"message":"The stream broke off')
            assert b"[DONE]" not in body
            assert await c.at_end()
        assert metric(relay, "herd_streams_truncated_total", model="m") == 1


async def test_a_stream_that_ends_without_done_is_not_taken_for_whole():
    async with engine(says(stream(ROLE, TEXT) + LAST_CHUNK)) as (_, url), relaying(url) as (_, _, port):
        _, _, body = await answered(port, chat(stream=True))
        assert b'"error"' in body


async def test_an_error_event_of_the_engine_is_the_last_thing_said():
    error = b'data: {"error": {"message": "EngineCore died", "code": 500}}\n\n'
    async with (
        engine(says(stream(ROLE, error, DONE) + LAST_CHUNK)) as (_, url),
        relaying(url) as (_, _, port),
    ):
        _, _, body = await answered(port, chat(stream=True))
        assert body == ROLE_OUT + error


async def test_an_engines_refusal_passes_as_it_is():
    refusal = reply(b'{"error":{"message":"too long","code":400}}', status="400 Bad Request")
    async with engine(says(refusal)) as (it, url), relaying(url) as (_, _, port):
        status, _, body = await answered(port, chat(stream=True))
        assert (status, body) == (400, b'{"error":{"message":"too long","code":400}}')
        assert len(it.requests) == 1


async def test_no_replica_left_is_502_and_none_at_all_503():
    async with engine(says(b"", close=True)) as (_, url), relaying(url) as (_, fleet, port):
        assert (await answered(port, chat()))[0] == 502
        fleet.failed("r0", now=0.0)
        status, headers, body = await answered(port, chat())
        assert (status, headers["retry-after"]) == (503, "1")
        assert json.loads(body)["error"]["code"] == "no_capacity"


@pytest.mark.parametrize("sent_first", [b"", stream(ROLE, TEXT)])
async def test_a_client_that_leaves_aborts_at_the_engine(sent_first):
    async def script(request, reader, writer):
        writer.write(sent_first)
        await writer.drain()
        await reader.readexactly(1)  # returns only when the router closes

    async with engine(script) as (it, url), relaying(url) as (relay, fleet, port):
        async with client(port) as c:
            await c.send(chat(stream=True))
            await until(lambda: bool(it.requests))
            if sent_first:
                await c.head()
        await asyncio.wait_for(it.disconnected.wait(), WAIT_S)
        await until(lambda: fleet.get("r0").in_flight == 0)
        assert metric(relay, "herd_client_disconnects_total", model="m") == 1


async def test_a_client_that_does_not_read_holds_the_engine_back():
    event = b'data: {"choices":[{"index":0,"text":"' + b"x" * 65536 + b'","token_ids":[1]}]}\n\n'
    total = 1000
    sent = 0

    async def script(request, reader, writer):
        nonlocal sent
        writer.write(stream())
        for _ in range(total):
            writer.write(b"%x\r\n%b\r\n" % (len(event), event))
            await writer.drain()
            sent += 1
        writer.write(b"e\r\n" + DONE + b"\r\n" + LAST_CHUNK)

    async with engine(script) as (_, url), relaying(url) as (_, _, port), client(port) as c:
        await c.send(chat(stream=True))
        await c.head()
        before = -1
        while sent != before:  # until nothing moves any more
            before = sent
            await asyncio.sleep(0.2)
        assert sent < total
        size = sum([len(chunk) async for chunk in c.chunks()])
        assert size == total * (len(event) - len(b',"token_ids":[1]')) + len(DONE)


@pytest.mark.parametrize(
    ("sent", "status", "code", "param"),
    [
        (post(CHAT, b"{"), 400, None, None),
        (post(CHAT, b"[]"), 400, None, None),
        (post(CHAT, b""), 400, None, None),
        (post(CHAT, b'{"model": "\xff"}'), 400, None, "model"),
        (post(CHAT, b'{"model": "m", "deep": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"), 400, None, None),
        (post(CHAT, b"{}"), 400, None, "model"),
        (post(CHAT, b'{"model": 1}'), 400, None, "model"),
        (post(CHAT, b'{"model": "m", "stream": "yes"}'), 400, None, "stream"),
        (post(CHAT, b'{"model": "m", "stream_options": 1}'), 400, None, "stream_options"),
        (post(CHAT, b'{"model": "other"}'), 404, "model_not_found", "model"),
        (b"GET /v1/chat/completions HTTP/1.1\r\nhost: h\r\n\r\n", 405, "method_not_allowed", None),
        (b"GET /nothing HTTP/1.1\r\nhost: h\r\n\r\n", 404, "unknown_url", None),
        (post("/v1/models", b"{}"), 405, "method_not_allowed", None),
    ],
)  # fmt: skip
async def test_bad_requests_get_openai_errors(sent, status, code, param):
    async with engine(says(reply(b"{}"))) as (it, url), relaying(url) as (_, _, port):
        told, headers, body = await answered(port, sent)
        error = json.loads(body)["error"]
        assert (told, error["code"], error["param"]) == (status, code, param)
        assert error["message"]
        assert headers["x-request-id"]
        assert not it.requests


@pytest.mark.parametrize(
    ("sent", "allowed"),
    [
        (b"GET /v1/chat/completions HTTP/1.1\r\nhost: h\r\n\r\n", "POST"),
        (post("/v1/models", b"{}"), "GET, HEAD"),
    ],
)
async def test_a_wrong_method_is_told_the_right_ones(sent, allowed):
    async with relaying() as (_, _, port):
        status, headers, _ = await answered(port, sent)
        assert (status, headers["allow"]) == (405, allowed)


async def test_models_health_ready():
    async with engine(says(reply(b"{}"))) as (_, url), relaying(url) as (_, fleet, port), client(port) as c:

        async def get(path):
            await c.send(f"GET {path} HTTP/1.1\r\nhost: h\r\n\r\n".encode())
            status, _, body = await c.reply()
            return status, json.loads(body)

        status, models = await get("/v1/models")
        assert (status, [m["id"] for m in models["data"]], models["data"][0]["max_model_len"]) == (
            200,
            ["m"],
            100,
        )
        assert await get("/v1/models/m") == (200, models["data"][0])
        status, error = await get("/v1/models/org%2Fother")
        assert (status, error["error"]["code"]) == (404, "model_not_found")
        assert "'org/other'" in error["error"]["message"]
        assert (await get("/health"))[0] == (await get("/ready"))[0] == 200
        fleet.failed("r0", now=0.0)
        assert (await get("/health"))[0] == 200
        assert (await get("/ready"))[0] == 503


async def test_headers_of_one_hop_do_not_come_back():
    hops = b"connection: x-hop\r\nx-hop: 1\r\nx-end: 2\r\nkeep-alive: 5\r\ncontent-length: 2"
    sent = b"HTTP/1.1 200 OK\r\n" + hops + b"\r\n\r\n{}"
    async with engine(says(sent)) as (_, url), relaying(url) as (_, _, port):
        _, headers, _ = await answered(port, chat())
        assert headers["x-end"] == "2"
        assert not {"x-hop", "keep-alive", "connection"} & headers.keys()


@pytest.mark.parametrize("given", ["x" * 129, "caf\xe9", "a\tb"])
async def test_a_request_id_that_is_none_is_replaced(given):
    async with engine(says(reply(b"{}"))) as (it, url), relaying(url) as (_, _, port), client(port) as c:
        await c.send(chat().replace(b"host: herd", b"host: herd\r\nx-request-id: " + given.encode("latin-1")))
        headers = (await c.reply())[1]
        assert len(headers["x-request-id"]) == 32
        assert given.encode("latin-1") not in it.requests[0]


@pytest.mark.parametrize(
    "body",
    [b"not json", b'{"usage":{"prompt_tokens":null}}', b'{"usage":{"prompt_tokens":1.5}}', b'{"x":NaN}'],
)
async def test_a_good_reply_is_not_lost_for_want_of_counts(body):
    async with engine(says(reply(body))) as (_, url), relaying(url) as (_, _, port):
        status, _, told = await answered(port, chat())
        assert (status, told) == (200, body)


async def test_a_stream_cut_behind_its_done_was_whole():
    async with (
        engine(says(stream(ROLE, TEXT, DONE), close=True)) as (_, url),
        relaying(url) as (relay, _, port),
    ):
        _, _, body = await answered(port, chat(stream=True))
        assert body == ROLE_OUT + TEXT_OUT + DONE
        assert metric(relay, "herd_streams_truncated_total", model="m") == 0


async def test_before_any_replica_has_joined():
    async with relaying() as (relay, _, port):
        assert (await answered(port, chat()))[0] == 503
        assert metric(relay, "herd_requests_total", model="", path=CHAT, code="503") == 1
