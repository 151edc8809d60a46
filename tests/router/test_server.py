import asyncio

import pytest
from router_wire import WAIT_S, client, post, serving, until

from router.errors import ListenError
from router.http.listener import listen
from router.http.server import HIGH_WATER_BYTES, MAX_WAITING_BYTES, Limits, Reply, Request, Server
from router.openai_api import refusal

CHUNKED = b"POST /p HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n"


async def echo(request: Request, reply: Reply) -> None:
    said = f"{request.method} {request.target} ".encode() + request.body
    reply.send(200, [(b"x-path", request.path.encode())], said)


async def test_one_connection_serves_many_requests():
    async with serving(echo) as (server, port), client(port) as c:
        for i in range(3):
            await c.send(post(f"/p?i={i}", b"body"))
            status, headers, body = await c.reply()
            assert (status, headers["x-path"], body) == (200, "/p", b"POST /p?i=%d body" % i)
        assert len(server.connections) == 1


async def test_a_request_in_single_bytes():
    async with serving(echo) as (_, port), client(port) as c:
        for byte in post("/p", b"body"):
            await c.send(bytes([byte]))
        assert (await c.reply())[2] == b"POST /p body"


async def test_a_chunked_request_body():
    async with serving(echo) as (_, port), client(port) as c:
        await c.send(
            b"POST /p HTTP/1.1\r\nhost: h\r\ntransfer-encoding: chunked\r\n\r\n2\r\nab\r\n1\r\nc\r\n0\r\n\r\n"
        )
        assert (await c.reply())[2] == b"POST /p abc"


async def test_expect_100_continue():
    async with serving(echo) as (_, port), client(port) as c:
        head, _, body = post("/p", b"body", "expect: 100-continue").partition(b"\r\n\r\n")
        await c.send(head + b"\r\n\r\n")
        assert await c.head() == (100, {})
        await c.send(body)
        assert (await c.reply())[2] == b"POST /p body"


async def test_pipelined_requests_are_answered_in_order():
    async def slow_first(request: Request, reply: Reply) -> None:
        if request.body == b"0":
            await asyncio.sleep(0.05)
        await echo(request, reply)

    count = 100
    async with serving(slow_first) as (_, port), client(port) as c:
        await c.send(b"".join(post("/p", b"%d" % i) for i in range(count)))
        assert [(await c.reply())[2] for _ in range(count)] == [b"POST /p %d" % i for i in range(count)]


async def test_head_has_no_body():
    async with serving(echo) as (_, port), client(port) as c:
        await c.send(b"HEAD /p HTTP/1.1\r\nhost: h\r\n\r\nGET /q HTTP/1.1\r\nhost: h\r\n\r\n")
        assert (await c.head())[1]["content-length"] == "8"
        assert (await c.reply())[2] == b"GET /q "


@pytest.mark.parametrize("version", ["1.0", "1.1"])
async def test_connection_close_is_honoured(version):
    async with serving(echo) as (_, port), client(port) as c:
        await c.send(f"GET /p HTTP/{version}\r\nhost: h\r\nconnection: close\r\n\r\n".encode())
        assert (await c.reply())[1]["connection"] == "close"
        assert await c.at_end()


async def test_a_stream_to_an_http_1_0_client_ends_with_the_connection():
    async def stream(request: Request, reply: Reply) -> None:
        reply.start(200, [])
        reply.write(b"ab")
        reply.write(b"c")
        reply.end()

    async with serving(stream) as (_, port), client(port) as c:
        await c.send(b"GET /p HTTP/1.0\r\n\r\n")
        assert "transfer-encoding" not in (await c.head())[1]
        assert await c.reader.read() == b"abc"


@pytest.mark.parametrize(
    ("chunks", "content"), [(b"1\r\nb\r\n", b"ab"), (b"1\r\nb\r\n2\r\n\r\n\r\n", b"ab\r\n")]
)
async def test_an_http_1_0_client_gets_the_content_of_whole_chunks(chunks, content):
    async def stream(request: Request, reply: Reply) -> None:
        reply.start(200, [])
        reply.write(b"a")
        reply.chunk_writer(chunks)
        reply.end()

    async with serving(stream) as (_, port), client(port) as c:
        await c.send(b"GET /p HTTP/1.0\r\n\r\n")
        await c.head()
        assert await c.reader.read() == content


async def test_a_reply_that_is_cut_does_not_end_as_if_it_were_whole():
    async def cut(request: Request, reply: Reply) -> None:
        reply.start(200, [])
        reply.write(b"ab")
        reply.abort()

    async with serving(cut) as (_, port), client(port) as c:
        await c.send(b"GET /p HTTP/1.0\r\n\r\n")
        with pytest.raises(ConnectionResetError):
            await c.reader.read()


LIMITS = Limits(head_bytes=1000, headers=20, body_bytes=100)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"nonsense\r\n\r\n", 400),
        (b"GET /p HTTP/1.1\r\nbad header: x\r\n\r\n", 400),
        (b"POST /p HTTP/1.1\r\nhost: h\r\ncontent-length: -1\r\n\r\n", 400),
        (b"POST /p HTTP/1.1\r\nhost: h\r\ncontent-length: 1\r\ntransfer-encoding: chunked\r\n\r\n", 400),
        (b"GET /p HTTP/1.1\r\n" + b"a: b\r\n" * 21 + b"\r\n", 431),
        (b"GET /p HTTP/1.1\r\na: " + b"b" * 1000 + b"\r\n\r\n", 431),
        (b"GET /p HTTP/1.1\r\na: " + b"b" * 1100, 431),
        (b"GET /" + b"p" * 1100 + b" HTTP/1.1\r\n\r\n", 414),
        (post("/p", b"x" * 101), 413),
        (CHUNKED + b"65\r\n" + b"x" * 101 + b"\r\n0\r\n\r\n", 413),
    ],
)  # fmt: skip
async def test_what_is_refused_and_how(sent, status):
    async with serving(echo, LIMITS) as (server, port), client(port) as c:
        await c.send(sent)
        told, headers, body = await c.reply()
        assert (told, headers["connection"]) == (status, "close")
        assert b'"error"' in body
        assert await c.at_end()
    await until(lambda: not server.connections)


@pytest.mark.parametrize(
    "sized", [b"content-length: 4\r\n\r\nbody", b"transfer-encoding: chunked\r\n\r\n4\r\nbody\r\n0\r\n\r\n"]
)
async def test_an_upgrade_is_not_taken_up(sized):
    asked = b"host: h\r\nconnection: Upgrade, HTTP2-Settings\r\nupgrade: h2c\r\nhttp2-settings: AA\r\n"
    async with serving(echo) as (_, port), client(port) as c:
        for _ in range(2):  # the connection goes on
            await c.send(b"POST /p HTTP/1.1\r\n" + asked + sized)
            assert (await c.reply())[2] == b"POST /p body"


async def test_an_upgrade_in_pieces():
    sent = post("/p", b"body", "connection: upgrade", "upgrade: h2c")
    for cut in range(1, len(sent)):
        async with serving(echo) as (_, port), client(port) as c:
            await c.send(sent[:cut])
            await c.send(sent[cut:])
            assert (await c.reply())[2] == b"POST /p body"


async def test_this_is_no_proxy():
    async with serving(echo) as (_, port), client(port) as c:
        await c.send(b"CONNECT h:1 HTTP/1.1\r\nhost: h\r\n\r\n")
        assert (await c.reply())[0] == 400


async def test_too_much_that_waits_is_refused_after_the_reply_under_way():
    go_on = asyncio.Event()
    half = post("/p", b"x" * (MAX_WAITING_BYTES // 2))

    async def waits(request: Request, reply: Reply) -> None:
        await go_on.wait()
        await echo(request, reply)

    async with serving(waits) as (server, port), client(port) as c:
        await c.send(post("/p", b"") + 2 * half)
        await until(lambda: any(connection._refusal for connection in server.connections))
        go_on.set()
        assert [(await c.reply())[0] for _ in range(2)] == [200, 400]


async def test_of_a_client_that_pipelines_much_and_leaves_nothing_is_left():
    began, cancelled = [], asyncio.Event()

    async def forever(request: Request, reply: Reply) -> None:
        began.append(request)
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with serving(forever) as (server, port):
        async with client(port) as c:
            await c.send(post("/p", b"x" * 1000) * 100)
            await until(lambda: bool(began))
        await asyncio.wait_for(cancelled.wait(), 10)
        await until(lambda: not server.connections)
        assert len(began) == 1


async def test_a_trailer_is_no_header():
    async def told(request: Request, reply: Reply) -> None:
        reply.send(200, [], repr(request.headers).encode())

    async with serving(told) as (_, port), client(port) as c:
        await c.send(CHUNKED + b"1\r\na\r\n0\r\nauthorization: x\r\n\r\n")
        assert b"authorization" not in (await c.reply())[2]


async def test_trailers_have_a_limit():
    async with serving(echo, LIMITS) as (server, port), client(port) as c:
        await c.send(CHUNKED + b"1\r\na\r\n0\r\n")
        await until(lambda: any(connection._reader.held for connection in server.connections))
        await c.send(b"a: " + b"b" * 1100)
        assert (await c.reply())[0] == 431


async def test_http_1_0_may_keep_its_connection():
    async with serving(echo) as (_, port), client(port) as c:
        for _ in range(2):
            await c.send(b"GET /p HTTP/1.0\r\nconnection: keep-alive\r\n\r\n")
            assert (await c.reply())[1]["connection"] == "keep-alive"


@pytest.mark.parametrize("status", [204, 304])
async def test_a_status_without_a_body(status):
    async def empty(request: Request, reply: Reply) -> None:
        reply.start(status, [], 5)
        reply.write(b"never")
        reply.end()

    async with serving(empty) as (_, port), client(port) as c:
        for _ in range(2):
            await c.send(b"GET /p HTTP/1.1\r\nhost: h\r\n\r\n")
            assert await c.head() == (status, {})


async def test_no_100_continue_before_a_refusal():
    async with serving(echo, LIMITS) as (_, port), client(port) as c:
        await c.send(b"POST /p HTTP/1.1\r\nhost: h\r\nexpect: 100-continue\r\ncontent-length: 101\r\n\r\n")
        assert (await c.reply())[0] == 413


async def test_a_handler_that_fails_ends_the_connection():
    async def fails(request: Request, reply: Reply) -> None:
        reply.start(200, [], 10)
        reply.write(b"half")
        raise RuntimeError("a bug")

    async with serving(fails) as (server, port), client(port) as c:
        await c.send(post("/p", b""))
        await c.head()
        assert await c.reader.read() == b"half"
        await until(lambda: not server.connections)


async def test_what_came_before_a_refusal_is_answered_first():
    async with serving(echo) as (_, port), client(port) as c:
        await c.send(post("/p", b"good") + b"bad\r\n\r\n")
        assert (await c.reply())[0] == 200
        assert (await c.reply())[0] == 400


async def test_two_hundred_small_headers_pass():
    async with serving(echo) as (_, port), client(port) as c:
        small = b"".join(b"h%d: v\r\n" % i for i in range(200))
        await c.send(b"GET /p HTTP/1.1\r\nhost: h\r\n" + small + b"\r\n")
        assert (await c.reply())[0] == 200


async def test_100_continue_waits_for_its_turn():
    go_on = asyncio.Event()

    async def waits(request: Request, reply: Reply) -> None:
        await go_on.wait()
        await echo(request, reply)

    async with serving(waits) as (server, port), client(port) as c:
        second = post("/q", b"body", "expect: 100-continue").removesuffix(b"body")
        await c.send(post("/p", b"") + second)
        await until(lambda: any(connection._reader.held for connection in server.connections))
        go_on.set()
        assert (await c.reply())[2] == b"POST /p "
        assert await c.head() == (100, {})
        await c.send(b"body")
        assert (await c.reply())[2] == b"POST /q body"


async def test_a_client_that_takes_no_replies_gets_no_more_of_them():
    served = []

    async def handler(request: Request, reply: Reply) -> None:
        served.append(request)
        reply.send(200, [], b"x" * (256 * HIGH_WATER_BYTES if request.path == "/large" else 1))

    async with serving(handler) as (server, port), client(port) as c, client(port) as other:
        await c.send(post("/large", b"") * 5)
        await until(lambda: any(connection.clogged for connection in server.connections))
        before = len(served)
        await c.send(post("/large", b"") * 5)
        for _ in range(20):  # the loop has had every occasion to serve more
            await other.send(post("/small", b""))
            await other.reply()
        assert len(served) - 20 == before < 5
        for _ in range(10):
            assert (await c.reply())[0] == 200


async def test_who_is_refused_while_it_sends_is_told_why():
    """The socket is not closed against its bytes: the answer would be lost with them."""
    refused = post("/p", b"").replace(b"content-length: 0", b"content-length: 10000000")
    async with serving(echo, LIMITS) as (server, port), client(port) as c:
        await c.send(refused)
        await until(lambda: any(connection._refusal for connection in server.connections))
        for _ in range(10):
            await c.send(b"x" * 1_000_000)
        assert (await c.reply())[0] == 413
        assert await c.at_end()
        await until(lambda: not server.connections)  # it does not listen for ever


async def test_a_slow_line_gets_its_time_and_a_trickle_does_not():
    limits = Limits(receive_s=10, receive_rate=1000)
    async with serving(echo, limits) as (server, port), client(port) as slow, client(port) as trickle:
        await slow.send(post("/p", b"x" * 40_000)[:-10_000])
        await trickle.send(post("/p", b"x" * 40_000)[:-39_000])
        await until(lambda: sorted(c._reader.held for c in server.connections) == [1000, 30_000])
        began = max(connection._began_at for connection in server.connections)
        for connection in list(server.connections):
            connection.sweep(began + 12)
        assert (await trickle.reply())[0] == 408
        await slow.send(b"x" * 10_000)
        assert (await slow.reply())[0] == 200


async def test_thousands_at_rest_are_not_looked_at():
    async with serving(echo, Limits(idle_s=1000)) as (server, port), client(port) as c, client(port):
        await c.send(post("/p", b""))
        await c.reply()
        await until(lambda: len(server.resting) == len(server.connections) == 2)
        await c.send(b"GET ")
        await until(lambda: len(server.resting) == 1)
        await c.send(b"/p HTTP/1.1\r\nhost: h\r\n\r\n")
        assert (await c.reply())[0] == 200
        await until(lambda: len(server.resting) == 2)


async def test_a_request_that_does_not_arrive_is_timed_out():
    async with serving(echo, Limits(receive_s=0.1)) as (_, port), client(port) as c:
        await c.send(post("/p", b"body")[:-1])
        assert (await c.reply())[0] == 408
        assert await c.at_end()


async def test_an_idle_connection_is_closed():
    async with serving(echo, Limits(idle_s=0.1)) as (_, port), client(port) as c:
        await c.send(post("/p", b""))
        await c.reply()
        assert await c.at_end()


async def test_a_client_that_leaves_cancels_its_request():
    began, cancelled = asyncio.Event(), asyncio.Event()

    async def forever(request: Request, reply: Reply) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        except asyncio.CancelledError:
            cancelled.set()
            raise

    async with serving(forever) as (server, port):
        async with client(port) as c:
            await c.send(post("/p", b""))
            await began.wait()
        await asyncio.wait_for(cancelled.wait(), 10)
        await until(lambda: not server.connections)


class Source:
    reading = True

    def pause_reading(self) -> None:
        self.reading = False

    def resume_reading(self) -> None:
        self.reading = True


async def test_a_slow_client_makes_the_source_wait():
    source = Source()
    size = 64 * HIGH_WATER_BYTES
    gone = asyncio.Event()

    async def flood(request: Request, reply: Reply) -> None:
        reply.attach(source)
        reply.start(200, [], size)
        reply.write(b"x" * size)
        await gone.wait()
        reply.end()

    async with serving(flood) as (_, port), client(port) as c:
        await c.send(post("/p", b""))
        await until(lambda: not source.reading)
        await c.head()
        assert len(await c.reader.readexactly(size)) == size
        await until(lambda: source.reading)
        gone.set()


async def test_nothing_more_is_read_for_a_client_that_left():
    """The handler hears of it a turn of the loop later; what is written in between finds no connection."""
    source, reading = Source(), asyncio.get_running_loop().create_future()

    async def endless(request: Request, reply: Reply) -> None:
        reply.attach(source)
        reply.start(200, [])
        reply.write(b"x")
        try:
            await asyncio.Event().wait()
        finally:
            reading.set_result(source.reading)

    async with serving(endless) as (_, port):
        async with client(port) as c:
            await c.send(post("/p", b""))
            await c.head()
        assert not await asyncio.wait_for(reading, WAIT_S)


async def test_stop_lets_a_reply_end_and_takes_no_more():
    began, go_on = asyncio.Event(), asyncio.Event()

    async def waits(request: Request, reply: Reply) -> None:
        began.set()
        await go_on.wait()
        reply.send(200, [], b"whole")

    server = Server(waits, refusal, Limits())
    port = await server.start("127.0.0.1", 0)
    async with client(port) as busy, client(port) as idle:
        await busy.send(post("/p", b""))
        await began.wait()
        stopping = asyncio.create_task(server.stop(10))
        assert await idle.at_end()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", port)
        go_on.set()
        assert (await busy.reply())[2] == b"whole"
        await stopping


async def test_stop_sends_what_is_unsent():
    size = 64 * HIGH_WATER_BYTES

    async def large(request: Request, reply: Reply) -> None:
        reply.send(200, [], b"x" * size)

    server = Server(large, refusal, Limits())
    port = await server.start("127.0.0.1", 0)
    async with client(port) as c:
        await c.send(post("/p", b""))
        await c.head()
        stopping = asyncio.create_task(server.stop(10))
        assert len(await c.reader.read(-1)) == size
        await stopping


async def test_a_reply_under_way_is_the_last_of_a_server_that_stops():
    began, go_on = asyncio.Event(), asyncio.Event()

    async def waits(request: Request, reply: Reply) -> None:
        began.set()
        await go_on.wait()
        await echo(request, reply)

    server = Server(waits, refusal, Limits())
    port = await server.start("127.0.0.1", 0)
    async with client(port) as c:
        await c.send(post("/p", b"first") + post("/p", b"second"))
        await began.wait()
        stopping = asyncio.create_task(server.stop(10))
        await asyncio.sleep(0)
        go_on.set()
        status, headers, body = await c.reply()
        assert (status, body, headers["connection"]) == (200, b"POST /p first", "close")
        assert await c.at_end()
        await stopping


async def test_a_request_that_arrives_while_a_server_stops_is_answered():
    """On a connection that was idle, on one that was in the middle of it, and behind a reply under way."""
    began, go_on = asyncio.Event(), asyncio.Event()

    async def streams(request: Request, reply: Reply) -> None:
        reply.start(200, [])
        reply.write(b"begun")
        began.set()
        await go_on.wait()
        reply.end()

    server = Server(streams, refusal, Limits())
    port = await server.start("127.0.0.1", 0)
    request = post("/p", b"body")
    async with client(port) as idle, client(port) as halfway, client(port) as streaming:
        await halfway.send(request[:20])
        await streaming.send(request)
        assert "connection" not in (await streaming.head())[1]
        await began.wait()
        stopping = asyncio.create_task(server.stop(10, 10))
        await until(lambda: server.closing)
        go_on.set()
        assert [chunk async for chunk in streaming.chunks()] == [b"begun"]
        await idle.send(request)
        await halfway.send(request[20:])
        await streaming.send(request)
        for c in (idle, halfway, streaming):
            status, headers, _ = await c.reply()
            assert (status, headers["connection"]) == (200, "close")
            assert await c.at_end()
        await stopping


async def test_a_server_that_stops_closes_what_stays_idle():
    server = Server(echo, refusal, Limits())
    port = await server.start("127.0.0.1", 0)
    async with client(port) as c:
        await c.send(post("/p", b""))
        await c.reply()
        began = asyncio.get_running_loop().time()
        await server.stop(10, 0.5)
        assert await c.at_end()
        assert 0.1 < asyncio.get_running_loop().time() - began < 9  # a sweep may have seen it rest before


async def test_listening_sockets_come_and_go():
    """One that is ignored keeps what is queued; one that is drained does not."""
    server = Server(echo, refusal, Limits())
    with listen("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
        await server.accept(listener)
        server.ignore(listener)
        async with client(port) as c:
            await c.send(post("/p", b"", "connection: close"))
            await asyncio.sleep(0)
            assert not server.connections
            await server.accept(listener)
            assert (await c.reply())[0] == 200
            server.ignore(listener)
        async with client(port) as queued:
            await server.accept(listener)
            await server.drain(listener)
            await queued.send(post("/p", b""))
            assert (await queued.reply())[0] == 200
            await server.stop(0)


async def test_a_client_that_takes_nothing_is_cut():
    async def large(request: Request, reply: Reply) -> None:
        reply.send(200, [], b"x" * 64 * HIGH_WATER_BYTES)

    async with serving(large, Limits(idle_s=0.1)) as (server, port), client(port) as c:
        await c.send(post("/p", b""))
        await until(lambda: bool(server.connections))
        await until(lambda: not server.connections)


async def test_stop_cuts_what_outlasts_the_grace():
    began = asyncio.Event()

    async def forever(request: Request, reply: Reply) -> None:
        began.set()
        await asyncio.Event().wait()

    server = Server(forever, refusal, Limits())
    port = await server.start("127.0.0.1", 0)
    async with client(port) as c:
        await c.send(post("/p", b""))
        await began.wait()
        await server.stop(0)
        assert await c.at_end()


async def test_a_port_in_use_is_one_sentence():
    async with serving(echo) as (_, port):
        with pytest.raises(ListenError, match=f"cannot listen on 127.0.0.1:{port}: Address already in use"):
            await Server(echo, refusal, Limits()).start("127.0.0.1", port)
