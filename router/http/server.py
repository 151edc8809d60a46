"""Client connections: HTTP/1.1 requests in, replies out, on raw asyncio Protocols.

A request is handled as one coroutine; a reply's chunks are written by callbacks, so a streamed chunk costs
no task switch. Requests on one connection are answered in order. When the client leaves, the coroutine is
cancelled: that is how a disconnect reaches the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
from collections import deque
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from http import HTTPStatus
from typing import Annotated, Protocol, cast

import httptools
from pydantic import BaseModel, ConfigDict, Field

from router.errors import ApiError, BadRequest, ClientTimeout, HeadTooLarge, TooLarge
from router.http.headers import Headers, first
from router.http.listener import BACKLOG, listen

log = logging.getLogger(__name__)

Handler = Callable[["Request", "Reply"], Awaitable[None]]
# Writes the body of an error that the HTTP layer itself found: (error, path if known) -> JSON bytes.
ErrorBody = Callable[[ApiError, str], bytes]

# Requests that may wait on one connection. Reading must go on beyond it, or a client's leaving is not seen.
MAX_PIPELINED = 32
# What is kept unsent for a slow client before its engine is no longer read from.
HIGH_WATER_BYTES = 128 * 1024
SWEEP_S = 1.0  # how often idle and slow connections are looked for
_REASONS = {status.value: status.phrase.encode() for status in HTTPStatus}


class Limits(BaseModel):
    """What a client may send, and how slowly. Bytes and seconds."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    head_bytes: Annotated[int, Field(gt=0)] = 64 * 1024
    headers: Annotated[int, Field(gt=0)] = 256
    body_bytes: Annotated[int, Field(gt=0)] = 64 * 1024 * 1024
    receive_s: Annotated[float, Field(gt=0)] = 60.0
    idle_s: Annotated[float, Field(gt=0)] = 120.0


@dataclass(slots=True)
class Request:
    """One whole request. Header names are in lower case; `target` is as the client sent it."""

    method: str
    target: str
    headers: Headers
    body: bytes
    keep_alive: bool
    version: str
    received_at: float

    @property
    def path(self) -> str:
        return self.target.partition("?")[0]

    def header(self, name: bytes) -> bytes | None:
        """The first header of this (lower-case) name."""
        return first(self.headers, name)


class Flow(Protocol):
    """Something that can be told to wait: the connection that a reply's bytes come from."""

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Reply:
    """The answer to one request. The head goes out with the first bytes of the body."""

    def __init__(self, connection: Connection, request: Request) -> None:
        self._connection = connection
        self._no_body = request.method == "HEAD"
        self._keep_alive = request.keep_alive
        self._old = request.version == "1.0"
        self._head = b""
        self._chunked = False
        self.source: Flow | None = None
        self.status = 0
        self.started = False  # bytes have been sent: it is too late for another status
        self.ended = False

    def start(self, status: int, headers: Iterable[tuple[bytes, bytes]], length: int | None = None) -> None:
        """The status and headers; a body of unknown length is chunked, or ends with the connection (1.0)."""
        self.status, self._chunked = status, False
        lines = [b"HTTP/1.1 %d %b\r\n" % (status, _REASONS.get(status, b"Unknown"))]
        lines += [b"%b: %b\r\n" % pair for pair in headers]
        if status in (204, 304):
            self._no_body = True
        elif length is not None:
            lines.append(b"content-length: %d\r\n" % length)
        elif self._old:
            self._keep_alive = False
        else:
            self._chunked = True
            lines.append(b"transfer-encoding: chunked\r\n")
        if not self._keep_alive:
            lines.append(b"connection: close\r\n")
        elif self._old:
            lines.append(b"connection: keep-alive\r\n")
        lines.append(b"\r\n")
        self._head = b"".join(lines)

    def write(self, data: bytes) -> None:
        """Some bytes of the body."""
        if self._no_body or not data:
            return
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._write(data)

    @property
    def chunk_writer(self) -> Callable[[bytes], None]:
        """Writes bytes that are one chunk already, once this reply has started."""
        return self._connection.write if self._chunked else self._write_content

    def _write_content(self, chunk: bytes) -> None:
        self.write(chunk[chunk.index(b"\n") + 1 : -2])

    def end(self) -> None:
        """The body is whole; the connection takes the next request."""
        self._write(b"0\r\n\r\n" if self._chunked and not self._no_body else b"")
        self.ended = True

    def attach(self, source: Flow) -> None:
        """From now on the source waits whenever the client does not keep up."""
        self.source = source
        if self._connection.clogged:
            source.pause_reading()

    def detach(self) -> None:
        """The source has given all it had."""
        self.source = None

    def send(self, status: int, headers: Headers, body: bytes) -> None:
        """A whole reply at once."""
        self.start(status, headers, len(body))
        self.write(body)
        self.end()

    def abort(self) -> None:
        """Cut the connection, so that what was sent cannot be taken for the whole."""
        self._keep_alive = False
        self._connection.abort()

    def close_after(self) -> None:
        """Close the connection once this reply has ended."""
        self._keep_alive = False

    @property
    def keeps_connection(self) -> bool:
        return self._keep_alive and self.ended

    def _write(self, data: bytes) -> None:
        if self._head:
            data, self._head = self._head + data, b""
            self.started = True
        if data:
            self._connection.write(data)


class Connection(asyncio.Protocol):
    """One client connection: parses requests, runs the handler on each in turn."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._loop = server.loop
        self._parser = httptools.HttpRequestParser(self)
        self._waiting: deque[Request] = deque()
        self._reply: Reply | None = None
        self._task: asyncio.Task[None] | None = None
        self._refusal: ApiError | None = None
        self._deaf = False  # nothing more is read from this client
        self.clogged = False  # the client does not take what was written
        # The request being received, and since when; or since when none is.
        self._target = b""
        self._headers: Headers = []
        self._body = bytearray()
        self._unspent = 0  # bytes received since the last that was payload
        self._in_head = False
        self._began_at: float | None = None
        self._quiet_since: float | None = self._loop.time()
        # How much is unsent, and since when nothing of it was taken.
        self._unsent = 0
        self._stuck_since = 0.0

    # -- the transport's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not derive from it
        self._transport.set_write_buffer_limits(high=HIGH_WATER_BYTES)
        self.write = self._transport.write
        self._server.connections.add(self)

    def connection_lost(self, exc: Exception | None) -> None:
        self._server.connections.discard(self)
        self._waiting.clear()
        if self._task is not None:
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        if self._deaf:
            return
        self._unspent += len(data)
        self._feed(data)
        # A head, or trailers: the parser keeps what has no end yet.
        if self._unspent > self._server.limits.head_bytes and not self._deaf:
            self._refuse(HeadTooLarge("The request's headers are over the limit"))

    def pause_writing(self) -> None:
        self.clogged = True
        if self._reply is not None and self._reply.source is not None:
            self._reply.source.pause_reading()

    def resume_writing(self) -> None:
        self.clogged = False
        if self._reply is not None and self._reply.source is not None:
            self._reply.source.resume_reading()

    # -- the parser's callbacks

    def on_message_begin(self) -> None:
        self._target = b""
        self._headers = []
        self._body = bytearray()
        self._in_head = True
        self._began_at, self._quiet_since = self._loop.time(), None

    def on_url(self, url: bytes) -> None:
        self._target += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._in_head:
            return  # a trailer, which must not pass for a header
        self._headers.append((name.lower(), value))
        if len(self._headers) > self._server.limits.headers:
            raise HeadTooLarge(f"More than {self._server.limits.headers} headers")

    def on_headers_complete(self) -> None:
        self._in_head = False
        size = len(self._target) + sum(len(name) + len(value) + 4 for name, value in self._headers)
        if size > self._server.limits.head_bytes:
            raise HeadTooLarge("The request's headers are over the limit")
        self._unspent = 0
        length = first(self._headers, b"content-length")
        if length is not None and int(length) > self._server.limits.body_bytes:
            raise self._too_large()
        if self._task is None and self._expects_continue():
            self._transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def on_body(self, body: bytes) -> None:
        self._unspent = 0
        self._body += body
        if len(self._body) > self._server.limits.body_bytes:
            raise self._too_large()

    def on_message_complete(self) -> None:
        self._unspent, self._began_at = 0, None
        if self._parser.should_upgrade():
            return  # read again by _decline_upgrade
        if len(self._waiting) == MAX_PIPELINED:
            raise BadRequest(f"More than {MAX_PIPELINED} requests wait on this connection")
        self._waiting.append(
            Request(
                method=self._parser.get_method().decode("ascii"),
                target=self._target.decode("latin-1"),
                headers=self._headers,
                body=bytes(self._body),
                keep_alive=self._parser.should_keep_alive(),
                version=self._parser.get_http_version(),
                received_at=self._loop.time(),
            )
        )
        if self._task is None:
            self._next()

    def _expects_continue(self) -> bool:
        expected = first(self._headers, b"expect")
        new = self._parser.get_http_version() != "1.0"
        return new and expected is not None and expected.lower() == b"100-continue"

    def _too_large(self) -> TooLarge:
        return TooLarge(f"The body is over the limit of {self._server.limits.body_bytes} bytes")

    # -- reading

    def _feed(self, data: bytes) -> None:
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserUpgrade as upgrade:
            self._decline_upgrade(data[upgrade.args[0] :])
        except httptools.HttpParserError as error:
            # llhttp wraps what a callback raised; our own refusals say what is wrong.
            cause = error.__context__
            self._refuse(cause if isinstance(cause, ApiError) else BadRequest(f"Malformed HTTP: {error}"))

    def _decline_upgrade(self, rest: bytes) -> None:
        """Reads the request again as if it had not asked: the parser skips the body of one that does."""
        method = self._parser.get_method()
        if method == b"CONNECT":
            self._refuse(BadRequest("This is no proxy"))
            return
        asked = (b"connection", b"upgrade", b"http2-settings")
        lines = [b"%b %b HTTP/1.1" % (method, self._target)]
        lines += [b"%b: %b" % header for header in self._headers if header[0] not in asked]
        self._parser = httptools.HttpRequestParser(self)
        self._feed(b"\r\n".join(lines) + b"\r\n\r\n" + rest)

    # -- one request after the other

    def _next(self) -> None:
        request = self._waiting.popleft()
        self._reply = Reply(self, request)
        if self._server.closing:
            self._reply.close_after()
        self._task = self._loop.create_task(self._handle(request, self._reply))

    async def _handle(self, request: Request, reply: Reply) -> None:
        try:
            await self._server.handler(request, reply)
        except Exception:
            log.exception("The handler of %s %s failed", request.method, request.target)
            reply.close_after()
        self._done(reply)

    def _done(self, reply: Reply) -> None:
        self._task = self._reply = None
        if not reply.keeps_connection:
            self._transport.close()
        elif self._waiting:
            self._next()
        elif self._refusal is not None:
            self._tell(self._refusal)
        else:
            self._rest()

    def _rest(self) -> None:
        """Nothing is being answered; the client may send its next request, for a while."""
        if self._began_at is None:
            self._quiet_since = self._loop.time()

    def _refuse(self, error: ApiError) -> None:
        """What follows cannot be read: answer what came before it, then this error, then close."""
        self._refusal, self._deaf = error, True
        self._began_at = self._quiet_since = None
        if self._task is None:
            self._tell(error)

    def _tell(self, error: ApiError) -> None:
        body = self._server.error_body(error, self._target.decode("latin-1").partition("?")[0])
        head = b"HTTP/1.1 %d %b\r\n" % (error.status, _REASONS[error.status])
        head += b"content-type: application/json\r\ncontent-length: %d\r\n" % len(body)
        head += b"connection: close\r\n\r\n"
        self._transport.write(head + body)
        self._transport.close()

    def sweep(self, now: float) -> None:
        """Refuses a request that takes too long to arrive, closes what is idle, cuts who takes nothing."""
        limits = self._server.limits
        if self._is_stuck(now):
            self._transport.abort()
        elif self._began_at is not None and now - self._began_at > limits.receive_s:
            self._refuse(ClientTimeout(f"The request did not arrive within {limits.receive_s:g} s"))
        else:
            self.close_idle(now, limits.idle_s)

    def _is_stuck(self, now: float) -> bool:
        """Whether the client has taken nothing of what is unsent for as long as it may idle."""
        unsent = self._transport.get_write_buffer_size()
        if not unsent or unsent < self._unsent or not self._unsent:
            self._stuck_since = now
        self._unsent = unsent
        return unsent > 0 and now - self._stuck_since > self._server.limits.idle_s

    def finish(self) -> None:
        """The server is leaving: the reply under way says so, unless its head is out already."""
        if self._reply is not None and not self._reply.status:
            self._reply.close_after()

    def close_idle(self, now: float, idle_s: float) -> None:
        """Closes the connection if there was no request for so long."""
        if self._quiet_since is not None and now - self._quiet_since >= idle_s:
            self._transport.close()

    def abort(self) -> None:
        """Cuts the connection without waiting for what is unsent."""
        self._transport.abort()


class Server:
    """Listens on one port and gives every request to one handler."""

    def __init__(self, handler: Handler, error_body: ErrorBody, limits: Limits) -> None:
        self.handler = handler
        self.error_body = error_body
        self.limits = limits
        self.connections: set[Connection] = set()
        self.closing = False
        self._accepting: dict[socket.socket, asyncio.Server] = {}
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self, host: str, port: int) -> int:
        """Binds and listens on a port of its own; the port as bound. Raises ListenError with one sentence."""
        with listen(host, port) as listener:
            await self.accept(listener)
            bound: int = listener.getsockname()[1]
        return bound

    async def accept(self, listener: socket.socket) -> None:
        """Takes connections from this socket too. It stays the caller's, who may hand it on or close it."""
        self.loop = asyncio.get_running_loop()
        if self._sweeper is None:
            self._sweeper = self.loop.create_task(self._sweep())
        self._accepting[listener] = await self.loop.create_server(
            lambda: Connection(self), sock=listener.dup(), backlog=BACKLOG
        )

    def ignore(self, listener: socket.socket) -> None:
        """Takes no more connections from this socket; what is queued there stays queued."""
        if (accepting := self._accepting.pop(listener, None)) is not None:
            accepting.close()

    async def drain(self, listener: socket.socket) -> None:
        """Takes what is queued at this socket, and then no more."""
        self.ignore(listener)
        with contextlib.suppress(BlockingIOError):
            while True:
                accepted, _ = listener.accept()
                await self.loop.connect_accepted_socket(lambda: Connection(self), accepted)

    async def stop(self, grace_s: float, idle_s: float = 0.0) -> None:
        """Takes no more connections, lets replies under way end within `grace_s`, closes everything.

        A client that sends its next request while its connection is being closed would lose it. So a
        connection ends with a reply that says so, or once there was no request on it for `idle_s`.
        """
        if self._sweeper is None:
            return
        self.closing = True
        for listener in list(self._accepting):
            self.ignore(listener)
        for connection in list(self.connections):
            connection.finish()
        deadline = self.loop.time() + grace_s
        while self.connections and (now := self.loop.time()) < deadline:
            for connection in list(self.connections):
                connection.close_idle(now, idle_s)
            await asyncio.sleep(0.05)
        for connection in list(self.connections):
            connection.abort()
        self._sweeper.cancel()
        await asyncio.gather(self._sweeper, return_exceptions=True)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            now = self.loop.time()
            for connection in list(self.connections):
                connection.sweep(now)
