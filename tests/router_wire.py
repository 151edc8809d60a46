"""Real sockets for the router's tests: a scripted engine, and a client that says exactly what it is told."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from typing import Any

from router.caches import Caches
from router.config import RouterConfig
from router.core.fleet import Fleet, Replica
from router.core.placement import least_requests
from router.decisions import AS_USUAL, DecisionsConfig
from router.front import FrontDoor
from router.health import Watch
from router.http.cors import Cors
from router.http.requests import Limits
from router.http.server import Handler, Server
from router.http.upstream import Upstreams
from router.line import AdmissionConfig
from router.metrics import Metrics
from router.openai_api import Aliases, refusal
from router.relay import Relay
from router.slo import Slo
from router.tenants import Tenants, TenantsConfig
from router.warmup import Warmup

OPEN = TenantsConfig()
WAIT_S = 10.0  # a test that waits longer has failed

Script = Callable[[bytes, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]


def reply(body: bytes, status: str = "200 OK", content_type: str = "application/json") -> bytes:
    head = f"HTTP/1.1 {status}\r\ncontent-type: {content_type}\r\ncontent-length: {len(body)}\r\n\r\n"
    return head.encode() + body


def stream(*events: bytes) -> bytes:
    """The bytes of a chunked event stream, without its last chunk."""
    head = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
    head += b"transfer-encoding: chunked\r\n\r\n"
    return head + b"".join(b"%x\r\n%b\r\n" % (len(event), event) for event in events)


LAST_CHUNK = b"0\r\n\r\n"


async def read_message(reader: asyncio.StreamReader) -> bytes:
    """One HTTP message with a content-length (or without a body), head included."""
    head = await reader.readuntil(b"\r\n\r\n")
    length = 0
    for line in head.lower().split(b"\r\n"):
        if line.startswith(b"content-length:"):
            length = int(line.partition(b":")[2])
    return head + (await reader.readexactly(length) if length else b"")


class Engine:
    """A server that answers each request by a script."""

    def __init__(self, script: Script) -> None:
        self.requests: list[bytes] = []
        self.connections = 0  # ever
        self.open = 0  # now
        self.disconnected = asyncio.Event()
        self._script = script
        self._writers: set[asyncio.StreamWriter] = set()

    async def start(self, port: int = 0) -> str:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", port)
        self.port = self._server.sockets[0].getsockname()[1]
        return f"http://127.0.0.1:{self.port}"

    async def stop(self) -> None:
        """As when its process ends: nobody listens, and open connections are cut."""
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()
        await self._server.wait_closed()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self.open += 1
        self._writers.add(writer)
        try:
            while True:
                request = await read_message(reader)
                self.requests.append(request)
                await self._script(request, reader, writer)
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            self.disconnected.set()
        finally:
            self.open -= 1
            self._writers.discard(writer)
            writer.close()


def says(*parts: bytes, close: bool = False) -> Script:
    """A script that sends these bytes to every request."""

    async def script(request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for part in parts:
            writer.write(part)
            await writer.drain()
        if close:
            raise ConnectionResetError

    return script


MODELS = (
    b'{"data":[{"id":"m","max_model_len":4096,"root":"/models/m","parent":null},'
    b'{"id":"lora","max_model_len":null,"root":"/adapters/lora","parent":"m"}]}'
)
VLLM_METRICS = (
    b'# TYPE vllm:cache_config_info gauge\nvllm:cache_config_info{block_size="32",num_gpu_blocks="64"} 1.0\n'
)
SOURCES = b'{"0":{"endpoint":"tcp://*:5557","replay_endpoint":"tcp://*:5558"}}'
# What the router asks of an engine before it sends requests there.
VLLM_PAGES = {
    b"/v1/models": reply(MODELS),
    b"/metrics": reply(VLLM_METRICS, content_type="text/plain"),
    b"/kv_event_sources": reply(SOURCES),
    b"/health": reply(b""),
}


def answering(pages: dict[bytes, bytes]) -> Script:
    """A script that answers each path with its page; the pages may change meanwhile."""

    async def script(request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(pages.get(request.split(b" ")[1], reply(b"{}", status="404 Not Found")))

    return script


@contextlib.asynccontextmanager
async def engine(script: Script) -> AsyncIterator[tuple[Engine, str]]:
    it = Engine(script)
    url = await it.start()
    try:
        yield it, url
    finally:
        await it.stop()


@contextlib.asynccontextmanager
async def serving(
    handler: Handler, limits: Limits | None = None, cors: Cors | None = None
) -> AsyncIterator[tuple[Server, int]]:
    server = Server(handler, refusal, limits or Limits(), cors)
    port = await server.start("127.0.0.1", 0)
    try:
        yield server, port
    finally:
        await server.stop(0)


@contextlib.asynccontextmanager
async def relaying(
    *urls: str,
    policy=least_requests,
    models: Sequence[str] = (),
    aliases: Aliases | None = None,
    decisions: DecisionsConfig = AS_USUAL,
    tenants: TenantsConfig = OPEN,
    admission: AdmissionConfig | None = None,
    slos: dict[str, Slo] | None = None,
) -> AsyncIterator[tuple[Relay, Fleet, int]]:
    """A relay in front of these engines; ids are r0, r1, ... Each serves its one of `models`, else `m`."""
    fleet = Fleet()
    for i, url in enumerate(urls):
        model = models[i] if models else "m"
        fleet.joined(Replica(id=f"r{i}", url=url, models=(model,), max_model_len=100), now=0.0)
    metrics = Metrics()
    upstreams = Upstreams()
    config = RouterConfig(
        policy=policy.__name__,
        aliases=aliases or {},
        decisions=decisions,
        admission=admission or AdmissionConfig(),
        slos=slos or {},
    )
    caches = Caches(config, fleet, metrics)
    watch = Watch(fleet, metrics, caches)
    warmup = Warmup(config.warmup, fleet, metrics, routers=lambda: 1, pressed=lambda model: False)
    known = Tenants(tenants, metrics)
    relay = Relay(config, fleet, metrics, watch, caches, upstreams, known, warmup, placed=len)
    async with serving(relay) as (_, port):
        try:
            yield relay, fleet, port
        finally:
            upstreams.close()
            await caches.tokenizers.stop()


@contextlib.asynccontextmanager
async def front_door(**settings: Any) -> AsyncIterator[FrontDoor]:
    """A whole router process for model `m`, on free ports; replicas are announced to it by the test."""
    usual = {"host": "127.0.0.1", "port": 0, "admin_port": 0, "policy": "least_requests"}
    config = RouterConfig(**usual | settings)
    front = FrontDoor(config, promised=("m",))
    await front.start()
    await front.open()
    try:
        yield front
    finally:
        await front.stop(0)


class Client:
    """A socket to the router."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    async def head(self) -> tuple[int, dict[str, str]]:
        raw = await asyncio.wait_for(self.reader.readuntil(b"\r\n\r\n"), WAIT_S)
        lines = raw.decode("latin-1").split("\r\n")[:-2]
        pairs = (line.split(": ", 1) for line in lines[1:])
        return int(lines[0].split(" ")[1]), dict(pairs)

    async def reply(self) -> tuple[int, dict[str, str], bytes]:
        """A whole reply, of known length or chunked."""
        status, headers = await self.head()
        if "content-length" in headers:
            body = await asyncio.wait_for(self.reader.readexactly(int(headers["content-length"])), WAIT_S)
        else:
            body = b"".join([chunk async for chunk in self.chunks()])
        return status, headers, body

    async def chunks(self) -> AsyncIterator[bytes]:
        while True:
            line = await asyncio.wait_for(self.reader.readline(), WAIT_S)
            size = int(line, 16)
            data = await asyncio.wait_for(self.reader.readexactly(size + 2), WAIT_S)
            if size == 0:
                return
            yield data[:-2]

    async def at_end(self) -> bool:
        """Waits until the peer closes; False if it sent something instead."""
        try:
            return await asyncio.wait_for(self.reader.read(1), WAIT_S) == b""
        except ConnectionResetError:
            return True


@contextlib.asynccontextmanager
async def client(port: int) -> AsyncIterator[Client]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        yield Client(reader, writer)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()


async def said(port: int, message: bytes) -> tuple[int, dict[str, str], bytes]:
    """The reply to a message on a connection of its own."""
    async with client(port) as c:
        await c.send(message)
        return await c.reply()


async def get(port: int, path: str, *headers: str) -> tuple[int, dict[str, str], bytes]:
    """What is at this path."""
    return await said(port, "\r\n".join([f"GET {path} HTTP/1.1", "host: h", *headers, "", ""]).encode())


def post(path: str, body: bytes, *headers: str) -> bytes:
    lines = [f"POST {path} HTTP/1.1", "host: herd", f"content-length: {len(body)}", *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


async def until(condition: Callable[[], bool]) -> None:
    """Returns once the condition holds; the event loop runs meanwhile."""
    async with asyncio.timeout(WAIT_S):
        while not condition():
            await asyncio.sleep(0.005)


async def one_connection(port: int, request: bytes, expected: bytes) -> str:
    """Connects, sends one request, reads the reply, closes: `answered`, or how it went instead."""
    try:
        async with asyncio.timeout(WAIT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.closing(writer):
                writer.write(request)
                reply = await read_message(reader)
                return "answered" if expected in reply else f"answered {reply!r}"
    except (OSError, asyncio.IncompleteReadError) as error:
        return type(error).__name__


async def connections(
    port: int, request: bytes, expected: bytes, per_second: int, ended: asyncio.Event
) -> Counter[str]:
    """So many new connections a second until the event, whether or not earlier ones have ended."""
    loop, tasks = asyncio.get_running_loop(), []
    began = loop.time()
    while not ended.is_set():
        for _ in range(int((loop.time() - began) * per_second) - len(tasks)):
            tasks.append(loop.create_task(one_connection(port, request, expected)))
        await asyncio.sleep(0.002)
    return Counter(await asyncio.gather(*tasks))


async def during(
    work: Callable[[], object], *traffic: Callable[[asyncio.Event], Awaitable[Counter[str]]]
) -> list[Counter[str]]:
    """What each kind of traffic counts that runs while this works in a thread."""
    ended = asyncio.Event()
    running = [asyncio.ensure_future(one(ended)) for one in traffic]
    try:
        await asyncio.to_thread(work)
    finally:
        ended.set()
    return await asyncio.gather(*running)
