"""Pooled connections to replicas.

`Upstream.exchange` sends one request and returns with the head of the reply; the body then flows into a
callback, with no task switch per read. Closing an exchange that is not done aborts the request at the engine.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import Callable
from types import TracebackType
from typing import cast
from urllib.parse import urlsplit

from router.errors import ConnectFailed, ReplyCut
from router.http.framing import Framing, FramingError, UntilClose
from router.http.reply_head import MAX_HEAD_BYTES, Head, read_head
from router.http.sse import Shortcut

# Takes a piece of the body. It may return a shortcut: where the next read begins a chunk, that gets it first.
Sink = Callable[[bytes], Shortcut | None]

# On one network a connection takes milliseconds; a host that takes seconds is gone or drowning.
CONNECT_TIMEOUT_S = 2.0
# Below the keep-alive of a vLLM that was started with its default (5 s: VLLM_HTTP_TIMEOUT_KEEP_ALIVE).
IDLE_S = 4.0


class Connection(asyncio.Protocol):
    """One connection to a replica, for one exchange at a time."""

    def __init__(self, pool: Upstream) -> None:
        self._pool = pool
        self._loop = asyncio.get_running_loop()
        self._transport: asyncio.Transport
        self.exchanges = 0
        self.idle_since = 0.0
        self._lost = False
        self._reset = False  # lost, and not by an orderly close
        self._clear()

    def _clear(self) -> None:
        self._pool.busy.discard(self)
        self.paused = False
        self.received_any = False
        self._buffer = b""
        self._head: asyncio.Future[Head] | None = None
        self._end: asyncio.Future[None] | None = None
        self._framing: Framing | None = None
        self._sink: Sink | None = None
        self._shortcut: Shortcut | None = None
        self._keep_alive = False

    # -- one exchange

    async def request(self, message: bytes) -> Head:
        """Sends the request; the head of the reply. Raises ReplyCut."""
        if self._lost:
            raise ReplyCut("the connection was closed")
        self.exchanges += 1
        self._pool.busy.add(self)
        self._head = self._loop.create_future()
        self._transport.write(message)
        return await self._head

    async def body(self, sink: Sink) -> None:
        """Gives every piece of the body to the sink, from the transport's callback; returns at its end.

        Raises ReplyCut when the replica closes first, and whatever the sink raises.
        """
        assert self._framing is not None
        self._end, self._sink = self._loop.create_future(), sink
        pending, self._buffer = self._buffer, b""
        if self._framing.done:
            self._framing.rest = pending
            self._finish(None)
        elif pending:
            self._feed(pending)
        if self._lost:
            self._closed_early()
        await self._end

    def close(self) -> None:
        """Ends the exchange: a whole one leaves the connection for the next, an unfinished one aborts it."""
        whole = self._framing is not None and self._framing.done and not self._framing.rest
        reusable = whole and self._keep_alive and not self._lost
        self._clear()
        if reusable:
            self.resume_reading()
            self._pool.keep(self)
        else:
            self.drop()

    def drop(self) -> None:
        """Ends the connection; whatever it was at is aborted."""
        self._transport.abort()

    def cut(self) -> None:
        """The same, and what it was at is not whole, even if its end would be the connection's."""
        self._reset = True
        self.drop()

    def pause_reading(self) -> None:
        """The client is slow: let the engine's bytes wait in its socket."""
        self.paused = True
        if not self._transport.is_closing():
            self._transport.pause_reading()

    def resume_reading(self) -> None:
        self.paused = False
        if not self._transport.is_closing():
            self._transport.resume_reading()

    # -- the transport's callbacks

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's does not derive from it

    def data_received(self, data: bytes) -> None:
        self._pool.heard = True
        shortcut = self._shortcut
        if shortcut is not None and shortcut(data):
            return
        if self._sink is not None:
            self._feed(data)
            return
        self.received_any = True
        self._buffer += data
        if self._framing is None:
            self._read_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._lost, self._reset = True, self._reset or exc is not None
        self._pool.forget(self)
        if self._head is not None and not self._head.done():
            self._head.set_exception(ReplyCut("the replica closed the connection before it replied"))
        elif self._end is not None:
            self._closed_early()

    # -- reading

    def _read_head(self) -> None:
        if self._head is None or self._head.done():  # bytes that nobody asked for
            self._transport.abort()
            return
        try:
            head = self._take_head()
            while head is not None and head.status < 200:  # 100 Continue, early hints: the reply follows
                head = self._take_head()
        except FramingError as error:
            self._fail(ReplyCut(f"the reply is not HTTP: {error}"))
            return
        if head is None:
            return
        self._framing, self._keep_alive = head.framing(), head.keep_alive
        self._head.set_result(head)

    def _take_head(self) -> Head | None:
        """The head that the buffer begins with, if all of it has come."""
        end = self._buffer.find(b"\r\n\r\n") + 4
        if end < 4:
            if len(self._buffer) > MAX_HEAD_BYTES:
                raise FramingError("its head has no end")
            return None
        raw, self._buffer = self._buffer[:end], self._buffer[end:]
        return read_head(raw)

    def _feed(self, data: bytes) -> None:
        assert self._framing is not None and self._sink is not None
        if self._end is None or self._end.done():  # failed, or bytes behind the end: not to be used again
            self._framing.rest = data
            return
        try:
            payload = self._framing.feed(data)
            shortcut = self._sink(payload) if payload else None
        except FramingError as error:
            self._finish(ReplyCut(f"the reply is broken: {error}"))
        except Exception as error:
            self._finish(error)
        else:
            self._shortcut = shortcut if self._framing.between_chunks else None
            if self._framing.done:
                self._finish(None)

    def _closed_early(self) -> None:
        assert self._framing is not None
        whole = self._framing.eof() and not (self._reset and isinstance(self._framing, UntilClose))
        self._finish(None if whole else ReplyCut("the replica closed the connection within its reply"))

    def _finish(self, error: Exception | None) -> None:
        if self._end is None or self._end.done():
            return
        self._shortcut = None
        if error is None:
            self._end.set_result(None)
        else:
            self._end.set_exception(error)

    def _fail(self, error: ReplyCut) -> None:
        if self._head is not None and not self._head.done():
            self._head.set_exception(error)
        self._transport.abort()


class Exchange:
    """A request under way at a replica, its head received; closes its connection rightly when left."""

    def __init__(self, connection: Connection, head: Head) -> None:
        self.connection = connection
        self.head = head

    async def body(self, sink: Sink) -> None:
        """See Connection.body."""
        await self.connection.body(sink)

    def __enter__(self) -> Exchange:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.connection.close()


class Upstream:
    """The connections to one replica; idle ones are used again, the latest first.

    `busy`: those in use. `heard`: something came from the replica since somebody set this to False.
    """

    def __init__(self, url: str) -> None:
        parts = urlsplit(url)
        if parts.scheme != "http" or not parts.hostname:
            raise ValueError(f"{url!r} is not an http:// URL")
        self.host = parts.hostname
        self.port = parts.port or 80
        self.authority = parts.netloc.encode("ascii")
        self._idle: list[Connection] = []  # the latest used last
        self.busy: set[Connection] = set()
        self.heard = False
        self._cuts = 0
        self._closed = False

    async def exchange(self, message: bytes) -> Exchange:
        """Sends one whole request. Raises ConnectFailed if it did not get there, else ReplyCut.

        A kept connection may have been closed by the engine meanwhile, which says nothing of the engine:
        the request then goes out once more on a new one.
        """
        if (connection := self._take()) is not None:
            cuts = self._cuts
            try:
                return await self._send(connection, message)
            except ReplyCut:
                if connection.received_any or self._cuts > cuts:
                    raise
        return await self._send(await self._connect(), message)

    async def _send(self, connection: Connection, message: bytes) -> Exchange:
        try:
            return Exchange(connection, await connection.request(message))
        except BaseException:
            connection.close()
            raise

    def _take(self) -> Connection | None:
        self._expire()
        return self._idle.pop() if self._idle else None

    def _expire(self) -> None:
        """Closes what has been idle for too long."""
        oldest = asyncio.get_running_loop().time() - IDLE_S
        while self._idle and self._idle[0].idle_since < oldest:
            self._idle.pop(0).drop()

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                _, connection = await loop.create_connection(
                    lambda: Connection(self), self.host, self.port, family=socket.AF_UNSPEC
                )
        except (OSError, TimeoutError) as error:
            raise ConnectFailed(f"no connection to {self.host}:{self.port}: {error or 'timed out'}") from None
        return connection

    def keep(self, connection: Connection) -> None:
        """An exchange is over and its connection can serve another."""
        if self._closed:
            connection.drop()
            return
        self._expire()
        connection.idle_since = asyncio.get_running_loop().time()
        self._idle.append(connection)

    def forget(self, connection: Connection) -> None:
        """A connection is gone."""
        with contextlib.suppress(ValueError):
            self._idle.remove(connection)

    @property
    def listening(self) -> bool:
        """Whether what the replica says would be heard: not while all clients are slow."""
        return not all(connection.paused for connection in self.busy)

    def cut(self) -> None:
        """Ends all connections now: nothing more is expected of the replica."""
        self._cuts += 1
        for connection in (*self.busy, *self._idle):
            connection.cut()

    def close(self) -> None:
        """Ends idle connections now, those in use with their exchange."""
        self._closed = True
        while self._idle:
            self._idle.pop().drop()


class Upstreams:
    """The connections to every replica, by URL."""

    def __init__(self) -> None:
        self._upstreams: dict[str, Upstream] = {}

    def at(self, url: str) -> Upstream:
        """The connections to the replica at this URL."""
        upstream = self._upstreams.get(url)
        if upstream is None:
            upstream = self._upstreams[url] = Upstream(url)
        return upstream

    def known(self, url: str) -> Upstream | None:
        """The connections to the replica at this URL, if there ever were any."""
        return self._upstreams.get(url)

    def cut(self, url: str) -> None:
        """Nothing more is expected of the replica at this URL."""
        if (upstream := self._upstreams.get(url)) is not None:
            upstream.cut()

    def drop(self, url: str) -> None:
        """The replica at this URL left the fleet."""
        if (upstream := self._upstreams.pop(url, None)) is not None:
            upstream.close()

    def close(self) -> None:
        """Ends idle connections to every replica."""
        for url in list(self._upstreams):
            self.drop(url)
