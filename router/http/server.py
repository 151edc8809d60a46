"""Client connections: HTTP/1.1 requests in, replies out, on raw asyncio Protocols.

A request is handled as one coroutine; a reply's chunks are written by callbacks, so a streamed chunk costs
no task switch. Requests on one connection are read and answered in order, each once the one before it is
answered and its reply taken. When the client leaves, the coroutine is cancelled: that is how a disconnect
reaches the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import socket
import struct
from collections.abc import Awaitable, Callable, Iterable
from http import HTTPStatus
from itertools import takewhile
from typing import Protocol, cast

from router.errors import ApiError, BadRequest, ClientTimeout
from router.http.cors import METHODS, Cors
from router.http.framing import Chunked
from router.http.headers import Headers
from router.http.listener import BACKLOG, listen
from router.http.requests import Limits, Request, RequestReader

__all__ = ["Connection", "Handler", "Limits", "Reply", "Request", "Server"]

log = logging.getLogger(__name__)

Handler = Callable[[Request, "Reply"], Awaitable[None]]
# Writes the body of an error that the HTTP layer itself found: (error, path if known) -> JSON bytes.
ErrorBody = Callable[[ApiError, str], bytes]

# What may wait on one connection behind the request being answered. Reading must go on meanwhile, or a
# client's leaving is not seen.
MAX_WAITING_BYTES = 1024 * 1024
# What is kept unsent for a slow client before its engine is no longer read from.
HIGH_WATER_BYTES = 128 * 1024
SWEEP_S = 1.0  # how often idle and slow connections are looked for
# A client that was refused while it sends is listened to for so long: what it has not read yet would be lost
# if its bytes met a closed socket (RFC 9112, section 9.6).
LINGER_S = 2.0
# With this as SO_LINGER a socket closes by a reset (socket(7)).
RESET = struct.pack("ii", 1, 0)
_STATUS_LINES = {s.value: f"HTTP/1.1 {s.value} {s.phrase}".encode() for s in HTTPStatus}


class Flow(Protocol):
    """Something that can be told to wait: the connection that a reply's bytes come from."""

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class Reply:
    """The answer to one request. The head goes out with the first bytes of the body."""

    __slots__ = (
        "_chunked", "_connection", "_granted", "_head", "_keep_alive", "_no_body", "_old",
        "ended", "source", "started", "status",
    )  # fmt: skip

    def __init__(self, connection: Connection, request: Request, granted: Headers) -> None:
        self._connection = connection
        self._granted = granted  # headers of every reply to this request
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
        lines = [_STATUS_LINES.get(status) or b"HTTP/1.1 %d Unknown" % status]
        lines += [b": ".join(header) for header in headers]
        lines += [b": ".join(header) for header in self._granted]
        if status in (204, 304):
            self._no_body = True
        elif length is not None:
            lines.append(b"content-length: %d" % length)
        elif self._old:
            self._keep_alive = False
        else:
            self._chunked = True
            lines.append(b"transfer-encoding: chunked")
        if not self._keep_alive:
            lines.append(b"connection: close")
        elif self._old:
            lines.append(b"connection: keep-alive")
        lines.append(b"\r\n")
        self._head = b"\r\n".join(lines)

    def write(self, data: bytes) -> None:
        """Some bytes of the body."""
        if self._no_body or not data:
            return
        if self._chunked:
            data = b"%x\r\n%b\r\n" % (len(data), data)
        self._write(data)

    @property
    def chunk_writer(self) -> Callable[[bytes], None]:
        """Writes bytes that are whole chunks already, once this reply has started."""
        return self._connection.write if self._chunked else self._write_content

    def _write_content(self, chunks: bytes) -> None:
        self.write(Chunked().feed(chunks))

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

    def send(self, status: int, headers: Iterable[tuple[bytes, bytes]], body: bytes) -> None:
        """A whole reply at once."""
        self.start(status, headers, len(body))
        self._write(b"" if self._no_body else body)
        self.ended = True

    def abort(self) -> None:
        """Cut the connection, so that what was sent cannot be taken for the whole."""
        self._keep_alive = False
        self._connection.abort()

    def close_after(self) -> None:
        """Close the connection once this reply has ended."""
        self._keep_alive = False

    @property
    def ends_at_close(self) -> bool:
        """Whether an orderly close would tell the client that it has the whole."""
        return self._old and self.started

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
    """One client connection: takes its requests in turn and runs the handler on each.

    It rests, or a request is arriving, or one is being answered, or one was refused and ends it.
    """

    __slots__ = (
        "_began_at", "_reader", "_refusal", "_refused_at", "_reply", "_server", "_stuck_since", "_task",
        "_transport", "_unsent", "clogged", "write",
    )  # fmt: skip

    def __init__(self, server: Server) -> None:
        self._server = server
        self._reader = RequestReader(server.limits)
        self._transport: asyncio.Transport
        self.write: Callable[[bytes], None]  # bytes of the reply under way
        self._began_at: float | None = None  # when the request that is arriving did
        self._reply: Reply | None = None
        self._task: asyncio.Task[None] | None = None
        self._refusal: ApiError | None = None  # nothing more is read from this client
        self._refused_at: float | None = None
        self.clogged = False  # the client does not take what was written
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
        self._server.resting.pop(self, None)
        if self._task is not None:
            self.pause_writing()  # until the task hears of it, nothing can be written any more
            self._task.cancel()

    def data_received(self, data: bytes) -> None:
        if self._refusal is not None:
            return
        self._reader.feed(data)
        if self._task is None and not self.clogged:
            self._advance()
        elif self._reader.held > MAX_WAITING_BYTES:
            self._refuse(BadRequest(f"More than {MAX_WAITING_BYTES} bytes of requests wait to be answered"))

    def pause_writing(self) -> None:
        self.clogged = True
        if self._reply is not None and self._reply.source is not None:
            self._reply.source.pause_reading()

    def resume_writing(self) -> None:
        self.clogged = False
        if self._reply is not None and self._reply.source is not None:
            self._reply.source.resume_reading()
        elif self._task is None and not self._transport.is_closing():
            self._go_on()

    # -- one request after the other

    def _advance(self) -> None:
        """Begins to answer the next request, if it is there whole."""
        try:
            request = self._reader.next()
        except ApiError as error:
            self._refuse(error)
            return
        if request is None:
            self._await_rest()
            return
        self._server.resting.pop(self, None)
        self._began_at = None
        request.received_at = self._server.loop.time()
        self._reply = Reply(self, request, self._granted(request))
        if self._server.closing:
            self._reply.close_after()
        self._task = self._server.loop.create_task(self._handle(request, self._reply))

    def _await_rest(self) -> None:
        """What is there of a request is no whole one, and may be nothing."""
        if self._began_at is None and not self._reader.between:
            self._server.resting.pop(self, None)
            self._began_at = self._server.loop.time()
        if self._reader.must_continue:
            self._reader.must_continue = False
            self.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    def _granted(self, request: Request) -> Headers:
        """What every reply to a page of another origin carries."""
        origin = request.fields.get(b"origin")
        if origin is None or self._server.cors is None:
            return []
        return self._server.cors.headers(request, origin)

    async def _handle(self, request: Request, reply: Reply) -> None:
        try:
            if request.method == "OPTIONS" and self._server.cors is not None:
                reply.send(204, [(b"allow", METHODS)], b"")
            else:
                await self._server.handler(request, reply)
        except Exception:
            log.exception("The handler of %s %s failed", request.method, request.target)
            reply.close_after()
        self._done(reply)

    def _done(self, reply: Reply) -> None:
        self._task = self._reply = None
        if not reply.keeps_connection:
            self._transport.close()
        elif not self.clogged:
            self._go_on()

    def _go_on(self) -> None:
        """Nothing is being answered, and the client takes what is sent."""
        if self._refusal is not None:
            self._tell(self._refusal)
        elif not self._reader.between:
            self._advance()

    # -- endings

    def _refuse(self, error: ApiError) -> None:
        """What follows cannot be read: answer what came before it, then this error, then close."""
        self._refusal, self._began_at = error, None
        self._server.resting.pop(self, None)
        if self._task is None and not self.clogged:
            self._tell(error)

    def _tell(self, error: ApiError) -> None:
        if self._refused_at is not None:
            return
        body = self._server.error_body(error, self._reader.path)
        told = b"content-type: application/json\r\ncontent-length: %d\r\nconnection: close" % len(body)
        self.write(b"%b\r\n%b\r\n\r\n%b" % (_STATUS_LINES[error.status], told, body))
        self._transport.write_eof()
        self._refused_at = self._server.loop.time()

    def sweep(self, now: float) -> None:
        """Ends what takes too long: a client that takes nothing, a request that does not arrive."""
        if self._is_stuck(now):
            self.abort()
        elif self._refused_at is not None:
            if now - self._refused_at > LINGER_S:
                self._transport.close()
        elif self._began_at is not None:
            self._check_progress(now - self._began_at)
        elif self._task is None and not self._unsent:
            self._server.resting[self] = now

    def _check_progress(self, elapsed: float) -> None:
        limits = self._server.limits
        if elapsed > limits.receive_s + self._reader.held / limits.receive_rate:
            self._refuse(ClientTimeout(f"The request did not arrive within {elapsed:.0f} s"))

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

    def close(self) -> None:
        """Ends a connection that rests."""
        self._transport.close()

    def abort(self) -> None:
        """Cuts the connection without waiting for what is unsent."""
        if self._reply is not None and self._reply.ends_at_close and not self._transport.is_closing():
            self._transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        self._transport.abort()


class Server:
    """Listens on one port and gives every request to one handler.

    With `cors` it answers OPTIONS itself, and tells browsers which pages may read its replies.
    """

    def __init__(
        self, handler: Handler, error_body: ErrorBody, limits: Limits, cors: Cors | None = None
    ) -> None:
        self.handler = handler
        self.error_body = error_body
        self.limits = limits
        self.cors = cors
        self.connections: set[Connection] = set()
        # Those of them that wait for a request, and since when; the longest first.
        self.resting: dict[Connection, float] = {}
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
            self._look(now, idle_s)
            await asyncio.sleep(0.05)
        for connection in list(self.connections):
            connection.abort()
        self._sweeper.cancel()
        await asyncio.gather(self._sweeper, return_exceptions=True)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            self._look(self.loop.time(), self.limits.idle_s)

    def _look(self, now: float, idle_s: float) -> None:
        """Closes what has rested for so long; of thousands at rest only these are looked at."""
        for connection in list(takewhile(lambda c: self.resting[c] <= now - idle_s, self.resting)):
            connection.close()
        for connection in self.connections.difference(self.resting):
            connection.sweep(now)
