"""Streams that begin when their time has come, whatever became of those before: as those of many users do."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Iterable, Sequence
from random import Random

from loadtests.generator import TOKEN, Ask, BrokenReply, check, header

REPLY_S = 60.0

Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class Connections:
    """Kept connections to one port: a request takes an idle one or opens another."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._idle: list[Connection] = []

    async def ask(self, ask: Ask) -> float:
        """Seconds until the first token of a stream that was whole; raises BrokenReply for any other."""
        connection = reader, writer = await self._connection()
        began = time.perf_counter()
        writer.write(ask.request)
        try:
            async with asyncio.timeout(REPLY_S):
                raw, first_at = await _whole(reader)
            check(raw, ask.expected, stream=True)
        except BaseException as error:
            writer.transport.abort()
            if isinstance(error, OSError | EOFError | TimeoutError):
                raise BrokenReply(f"no whole reply: {error!r}") from None
            raise
        self._idle.append(connection)
        return first_at - began

    def close(self) -> None:
        """Ends those that are idle."""
        for _, writer in self._idle:
            writer.transport.abort()

    async def _connection(self) -> Connection:
        while self._idle:
            reader, writer = self._idle.pop()
            if not reader.at_eof():  # else the server has closed it meanwhile
                return reader, writer
        return await asyncio.open_connection("127.0.0.1", self._port)


async def _whole(reader: asyncio.StreamReader) -> tuple[bytes, float]:
    """A reply as it came, and when its first token was there."""
    raw = await reader.readuntil(b"\r\n\r\n")
    if (length := header(raw, b"content-length")) is not None:
        return raw + await reader.readexactly(int(length)), time.perf_counter()
    first_at: float | None = None
    while not raw.endswith(b"\r\n0\r\n\r\n"):
        if not (data := await reader.read(1 << 16)):
            raise EOFError("the connection was closed")
        raw += data
        if first_at is None and TOKEN in raw:
            first_at = time.perf_counter()
    return raw, first_at or time.perf_counter()


def arrivals(rate: float, seconds: float, seed: str) -> list[float]:
    """Moments of a Poisson process: as many as `rate` brings in so many seconds on average."""
    chance, moments, now = Random(seed), [], 0.0
    for _ in range(round(rate * seconds)):
        now += chance.expovariate(rate)
        moments.append(now)
    return moments


async def run(asks: Iterable[Ask], moments: Sequence[float], port: int) -> list[float]:
    """Sends each request at its moment, in seconds from now: their times to first token in that order.

    Raises BrokenReply.
    """
    loop = asyncio.get_running_loop()
    connections = Connections(port)
    began = loop.time()

    async def one(ask: Ask, moment: float) -> float:
        await asyncio.sleep(began + moment - loop.time())
        return await connections.ask(ask)

    with contextlib.closing(connections):
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [group.create_task(one(*sent)) for sent in zip(asks, moments, strict=True)]
        except ExceptionGroup as errors:
            raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
