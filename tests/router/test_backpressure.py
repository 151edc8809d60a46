"""Clients that hardly read, engines that flood: what waits, waits in sockets and not in the router."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack

import pytest
from router_wire import VLLM_PAGES, answering, client, engine, post, until
from support import Server, Start, router

from loadtests.cpu import rss_bytes
from router.http.server import HIGH_WATER_BYTES
from router.passage import HELD_BYTES

STREAMS = 16
# uvloop reads at most this much at once; what was read when the client's buffer passed its mark is kept too.
READ_BYTES = 256 * 1024
CHAT = "/v1/chat/completions"


def chunk(payload: bytes) -> bytes:
    return b"%x\r\n%b\r\n" % (len(payload), payload)


def head(content_type: str, framing: str = "transfer-encoding: chunked") -> bytes:
    return f"HTTP/1.1 200 OK\r\ncontent-type: {content_type}\r\n{framing}\r\n\r\n".encode()


TOKEN = (
    b'data: {"id":"c","choices":[{"index":0,"delta":{"content":"a"},"logprobs":null,"finish_reason":null'
    b',"token_ids":[5]}]}\n\n'
)
DELTA = b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta","delta":"a"}\n\n'
KINDS = [
    pytest.param(CHAT, head("text/event-stream"), chunk(TOKEN) * 300, id="tokens"),
    pytest.param(CHAT, head("text/event-stream"), chunk(TOKEN * 300), id="large chunks"),
    pytest.param("/v1/responses", head("text/event-stream"), chunk(DELTA) * 300, id="events"),
    pytest.param("/v1/audio/speech", head("audio/wav"), chunk(b"x" * 65536), id="verbatim"),
    pytest.param(CHAT, head("application/json"), chunk(b"x" * 65536), id="one piece"),
]


class Flood:
    """An engine that sends without end; `sent` counts what its socket took."""

    def __init__(self, beginning: bytes, piece: bytes) -> None:
        self._beginning, self._piece = beginning, piece
        self.sent = 0

    async def __call__(
        self, request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        if request.startswith(b"GET"):
            await answering(VLLM_PAGES)(request, reader, writer)
            return
        writer.write(self._beginning)
        while True:
            writer.write(self._piece)
            await writer.drain()
            self.sent += len(self._piece)


async def settled(count: Callable[[], int]) -> int:
    """Waits until a count has moved and moves no more."""
    seen, same = 0, 0
    async with asyncio.timeout(60):
        while same < 10:
            await asyncio.sleep(0.05)
            same = same + 1 if count() == seen and seen else 0
            seen = count()
    return seen


@pytest.mark.parametrize(("path", "beginning", "piece"), KINDS)
async def test_a_slow_client_costs_the_router_little(start: Start, path, beginning, piece):
    flood = Flood(beginning, piece)
    async with engine(flood) as (it, url), AsyncExitStack() as stack:
        route = await asyncio.to_thread(
            router, start, Server(None, url), flags=("--policy", "least_requests")
        )
        pid, port = route.running.process.pid, int(route.url.rpartition(":")[2])
        before = rss_bytes(pid)
        clients = [await stack.enter_async_context(client(port)) for _ in range(STREAMS)]
        for c in clients:
            await c.send(post(path, b'{"model":"m","stream":true}'))
        await settled(lambda: flood.sent)
        for c in clients:  # a byte a look is as good as none
            assert await c.reader.readexactly(1) == b"H"
        await settled(lambda: flood.sent)
        grown = (rss_bytes(pid) - before) / STREAMS
        held = HELD_BYTES if b"json" in beginning else 0
        assert grown < held + HIGH_WATER_BYTES + 4 * READ_BYTES
        # All of it is there for a client that reads on.
        await asyncio.wait_for(clients[0].reader.readexactly(16 * HIGH_WATER_BYTES), 30)
        await stack.aclose()
        await asyncio.to_thread(route.running.stop)
        await until(lambda: it.open == 0)
