import asyncio

import pytest
from router_wire import LAST_CHUNK, WAIT_S, engine, reply, says, stream, until

from router.errors import ConnectFailed, ReplyCut
from router.http import upstream as module
from router.http.upstream import Upstream

REQUEST = b"POST /p HTTP/1.1\r\nhost: h\r\ncontent-length: 0\r\n\r\n"
OK = b"HTTP/1.1 200 OK\r\n"


async def body_of(upstream):
    parts = []
    with await upstream.exchange(REQUEST) as exchange:
        await exchange.body(parts.append)
        return exchange.head.status, b"".join(parts)


@pytest.mark.parametrize(
    ("sent", "closes", "body"),
    [
        (reply(b"whole"), False, b"whole"),
        (reply(b""), False, b""),
        (stream(b"a", b"bc") + LAST_CHUNK, False, b"abc"),
        (OK + b"\r\nuntil close", True, b"until close"),
        (b"HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nab", True, b"ab"),
        (b"HTTP/1.1 100 Continue\r\n\r\n" + reply(b"after"), False, b"after"),
        (b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n" * 2000 + reply(b"after"), False, b"after"),
    ],
)
async def test_bodies_however_they_are_delimited(sent, closes, body):
    async with engine(says(sent, close=closes)) as (_, url):
        upstream = Upstream(url)
        assert await body_of(upstream) == (200, body)
        upstream.close()


@pytest.mark.parametrize("status", ["204 No Content", "304 Not Modified"])
async def test_a_status_without_a_body(status):
    async with engine(says(f"HTTP/1.1 {status}\r\ncontent-length: 9\r\n\r\n".encode())) as (it, url):
        upstream = Upstream(url)
        for _ in range(2):
            assert await body_of(upstream) == (int(status[:3]), b"")
        assert it.connections == 1
        upstream.close()


@pytest.mark.parametrize(
    "sent",
    [
        b"nonsense\r\n\r\n",
        b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n",
        OK + b"transfer-encoding: gzip, chunked\r\n\r\n",
        OK + b"content-length: 1\r\ntransfer-encoding: chunked\r\n\r\n",
        OK + b"content-length: x\r\n\r\n",
        OK + b"a: " + b"b" * module.MAX_HEAD_BYTES,
        OK + b"content-length: 3\r\n\r\nab",
        stream(b"ab"),
        stream(b"ab") + b"nonsense\r\n",
    ],
)
async def test_a_broken_reply_is_cut(sent):
    async with engine(says(sent, close=True)) as (_, url):
        with pytest.raises(ReplyCut):
            await asyncio.wait_for(body_of(Upstream(url)), WAIT_S)


async def test_nobody_there():
    async with engine(says()) as (it, url):
        await it.stop()
        with pytest.raises(ConnectFailed, match=f"no connection to 127.0.0.1:{it.port}"):
            await body_of(Upstream(url))


@pytest.mark.parametrize(
    "sent",
    [
        reply(b"ab") + b"more",
        reply(b"") + b"more",
        stream(b"a") + LAST_CHUNK + b"more",
        b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n",
    ],
)
async def test_a_connection_that_is_not_clean_is_not_used_again(sent):
    async with engine(says(sent)) as (it, url):
        upstream = Upstream(url)
        for _ in range(2):
            assert (await body_of(upstream))[0] == 200
        assert it.connections == 2
        upstream.close()


async def test_bytes_that_nobody_asked_for_end_the_connection():
    async def chatty(request, reader, writer):
        writer.write(reply(b"ab"))
        await writer.drain()
        asked.set()
        await speak.wait()
        writer.write(reply(b"smuggled"))

    asked, speak = asyncio.Event(), asyncio.Event()
    async with engine(chatty) as (it, url):
        upstream = Upstream(url)
        assert await body_of(upstream) == (200, b"ab")
        speak.set()
        await asyncio.wait_for(it.disconnected.wait(), WAIT_S)
        assert await body_of(upstream) == (200, b"ab")
        assert it.connections == 2
        upstream.close()


async def test_a_request_goes_out_twice_at_most():
    deliveries = 0

    async def script(request, reader, writer):
        nonlocal deliveries
        if poisoned:
            deliveries += 1
            raise ConnectionResetError
        waiting.append(None)
        await until(lambda: len(waiting) == 5)
        writer.write(reply(b"ok"))

    poisoned, waiting = False, []
    async with engine(script) as (_, url):
        upstream = Upstream(url)
        await asyncio.gather(*(body_of(upstream) for _ in range(5)))  # five kept connections
        poisoned = True
        with pytest.raises(ReplyCut):
            await body_of(upstream)
        assert deliveries == 2
        upstream.close()


async def test_a_sink_that_fails_gets_no_more():
    got = []

    def sink(data):
        got.append(data)
        raise ValueError("enough")

    async with engine(says(stream(b"a"), *[b"1\r\nb\r\n"] * 5)) as (it, url):
        upstream = Upstream(url)
        exchange = await upstream.exchange(REQUEST)
        with pytest.raises(ValueError, match="enough"), exchange:
            await exchange.body(sink)
        assert len(got) == 1
        await asyncio.wait_for(it.disconnected.wait(), WAIT_S)


async def test_leaving_an_exchange_early_closes_its_connection():
    async with engine(says(stream(b"a"))) as (it, url):
        upstream = Upstream(url)
        with await upstream.exchange(REQUEST) as exchange:
            assert exchange.head.status == 200
        await asyncio.wait_for(it.disconnected.wait(), WAIT_S)


async def test_idle_connections_end_after_a_while(monkeypatch):
    async with engine(says(reply(b"ok"))) as (it, url):
        upstream = Upstream(url)
        await body_of(upstream)
        monkeypatch.setattr(module, "IDLE_S", -1.0)
        await body_of(upstream)
        await asyncio.wait_for(it.disconnected.wait(), WAIT_S)
        assert it.connections == 2
        upstream.close()


async def test_close_ends_idle_connections_at_once_and_others_with_their_exchange():
    go_on = asyncio.Event()

    async def script(request, reader, writer):
        if b"slow" in request:
            await go_on.wait()
        writer.write(reply(b"ok"))

    async with engine(script) as (it, url):
        upstream = Upstream(url)
        slow = asyncio.create_task(upstream.exchange(REQUEST.replace(b"/p", b"/slow")))
        await until(lambda: it.connections == 1)
        await body_of(upstream)
        upstream.close()
        await asyncio.wait_for(it.disconnected.wait(), WAIT_S)
        it.disconnected.clear()
        go_on.set()
        with await slow as exchange:
            await exchange.body(lambda data: None)
        await asyncio.wait_for(it.disconnected.wait(), WAIT_S)


@pytest.mark.parametrize("url", ["https://h", "h:80", "http://"])
def test_only_plain_http(url):
    with pytest.raises(ValueError, match="is not an http:// URL"):
        Upstream(url)
