"""Load for measuring routers: many connections that send request after request and check every reply.

Raw asyncio Protocols, so that the generator costs less than what it measures. While a reply arrives its
events are only counted; once it has ended it is read as a whole, and one lost, altered or unfinished reply
shows in the sample. Runs between two moments of steady load, so that start and end are not in the figures.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import itertools
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import msgspec

# vLLM's first event names the role, with empty content; a token's event begins like this.
TOKEN = b'"delta":{"content":"'
# What is left to finish once no new request is sent.
TAIL_S = 30.0
# A percentile needs two. A busy machine may run nothing of ours for half a second, so that a short window
# goes on until they are there.
LEAST_REPLIES = 2
LOOK_S = 0.05


class BrokenReply(Exception):
    """A reply is not what the engines sent."""


class Ask(NamedTuple):
    """One request, and the text that its reply holds."""

    request: bytes
    expected: str


@dataclass(frozen=True, slots=True)
class Load:
    """One kind of load: these requests on so many connections, which start one by one over `ramp_s`."""

    asks: Iterator[Ask]
    connections: int
    ramp_s: float
    stream: bool


@dataclass(frozen=True, slots=True)
class Sample:
    """What one router did under one load, in a window of steady load."""

    seconds: float
    cpu_s: float
    events: int
    requests: int
    first_p50_ms: float  # from the request's write to the first token (streams) or the whole reply
    first_p99_ms: float
    broken: list[str]  # faults of replies, the first few of them


@dataclass(slots=True)
class Tally:
    """What all connections have counted so far."""

    events: int = 0
    requests: int = 0
    first_s: list[float] = field(default_factory=list)
    broken: list[str] = field(default_factory=list)
    stopping: bool = False


def request(port: int, model: str, stream: bool) -> bytes:
    """A small chat request as a client library sends it."""
    body = msgspec.json.encode(
        {
            "model": model,
            "messages": [
                {"role": "system", "content": "You are a helpful assistant."},
                {"role": "user", "content": "Name eight letters of the Greek alphabet."},
            ],
            "temperature": 0,
            **({"stream": True} if stream else {"max_tokens": 1}),
        }
    )
    return message(port, body)


def message(port: int, body: bytes, *headers: str) -> bytes:
    """A chat request as a client library sends it, from its body; with more headers."""
    head = (
        f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1:{port}\r\nAccept: application/json\r\n"
        "Content-Type: application/json\r\nUser-Agent: herd-bench\r\nAuthorization: Bearer sk-bench\r\n"
        f"Content-Length: {len(body)}\r\n"
    )
    head += "".join(f"{header}\r\n" for header in headers) + "\r\n"
    return head.encode() + body


def same(request: bytes, expected: str, connections: int, ramp_s: float, stream: bool) -> Load:
    """The load of one request, over and over."""
    return Load(itertools.repeat(Ask(request, expected)), connections, ramp_s, stream)


async def run(load: Load, ports: Sequence[int], seconds: float, cpu: Callable[[], float]) -> Sample:
    """Puts the load on ports of this machine and measures for at least so long; raises BrokenReply.

    `cpu`: CPU seconds used so far.
    """
    loop = asyncio.get_running_loop()
    tally = Tally()
    clients = [Client(load, tally) for _ in range(load.connections)]
    for client, port in zip(clients, itertools.cycle(ports), strict=False):
        await loop.create_connection(lambda client=client: client, "127.0.0.1", port)
    for n, client in enumerate(clients):
        loop.call_later(n / load.connections * load.ramp_s, client.send)
    await asyncio.sleep(load.ramp_s)
    before, cpu_before, began = _snapshot(tally), cpu(), time.perf_counter()
    await _window(tally, seconds)
    after, cpu_after, ended = _snapshot(tally), cpu(), time.perf_counter()
    tally.stopping = True
    await _finish(clients, tally)
    first_ms = [1000 * s for s in tally.first_s[before[2] : after[2]]]
    if len(first_ms) < LEAST_REPLIES:
        raise BrokenReply(f"{len(first_ms)} requests were answered in {ended - began:.1f} s; {tally.broken}")
    return Sample(
        seconds=ended - began,
        cpu_s=cpu_after - cpu_before,
        events=after[0] - before[0],
        requests=after[1] - before[1],
        first_p50_ms=statistics.median(first_ms),
        first_p99_ms=statistics.quantiles(first_ms, n=100, method="inclusive")[98],
        broken=tally.broken[:5],
    )


async def _window(tally: Tally, seconds: float) -> None:
    """So long, and on until enough was answered to measure; no longer once a reply was broken."""
    enough = len(tally.first_s) + LEAST_REPLIES
    await asyncio.sleep(seconds)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(TAIL_S):
            while len(tally.first_s) < enough and not tally.broken:
                await asyncio.sleep(LOOK_S)


def _snapshot(tally: Tally) -> tuple[int, int, int]:
    return tally.events, tally.requests, len(tally.first_s)


async def _finish(clients: list[Client], tally: Tally) -> None:
    """Requests under way may end; what then hangs is broken."""
    await asyncio.wait([client.done for client in clients], timeout=TAIL_S)
    for client in clients:
        if not client.done.done():
            tally.broken.append(f"no end within {TAIL_S:g} s")
        client.close()


class Client(asyncio.Protocol):
    """One kept connection: the next request goes out when the reply to the last one is whole."""

    def __init__(self, load: Load, tally: Tally) -> None:
        self._load = load
        self._tally = tally
        self.done = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.Transport) -> None:
        self._transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self._stop("the connection was closed within a reply")

    def send(self) -> None:
        """The next request goes out."""
        self._parts: list[bytes] = []
        self._tail = b""
        self._length: int | None = None  # of the whole reply, where its head tells
        self._first = False
        request, self._expected = next(self._load.asks)
        self._sent_at = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._tally.events += data.count(b"\n\n")
        self._parts.append(data)
        if not self._first:
            self._look(b"".join(self._parts))
        self._tail = (self._tail + data)[-5:] if len(data) < 5 else data[-5:]
        if self._length is None:
            ended = self._tail == b"0\r\n\r\n"
        else:
            ended = sum(map(len, self._parts)) >= self._length
        if ended:
            self._complete(b"".join(self._parts))

    def close(self) -> None:
        """Ends the connection, whatever is under way."""
        self._transport.abort()

    def _look(self, received: bytes) -> None:
        """The beginning of a reply: where its end will be, and whether its first token is there."""
        head, blank, rest = received.partition(b"\r\n\r\n")
        if blank and (length := header(head, b"content-length")) is not None:
            self._length = len(head) + 4 + int(length)
        if TOKEN in rest or (not self._load.stream and blank):
            self._first = True
            self._tally.first_s.append(time.perf_counter() - self._sent_at)

    def _complete(self, raw: bytes) -> None:
        self._tally.requests += 1
        try:
            check(raw, self._expected, self._load.stream)
        except BrokenReply as error:
            self._stop(str(error))
            return
        if self._tally.stopping:
            self._stop(None)
        else:
            self.send()

    def _stop(self, fault: str | None) -> None:
        if fault is not None:
            self._tally.broken.append(fault)
        self.done.set_result(None)


def check(raw: bytes, expected: str, stream: bool) -> None:
    """A whole reply as it came from the socket; raises BrokenReply if it is not what the engine said."""
    head, _, body = raw.partition(b"\r\n\r\n")
    if not head.startswith(b"HTTP/1.1 200 "):
        raise BrokenReply(f"{head[:40]!r} {body[:200]!r}")
    if header(head, b"transfer-encoding") is not None:
        body = unchunked(body)
    said = streamed_text(body) if stream else _content(body, "message")
    if said != expected:
        raise BrokenReply(f"{len(said)} characters that begin {said[:40]!r} instead of {len(expected)}")


@functools.lru_cache(maxsize=8)  # a router that alters nothing sends the same bytes every time
def streamed_text(body: bytes) -> str:
    """The text of a stream of chat chunks; raises BrokenReply unless it ends as it should."""
    *events, done, end = body.split(b"\n\n")
    if (done, end) != (b"data: [DONE]", b""):
        raise BrokenReply(f"the stream ends with {body[-80:]!r}")
    said = (event for event in events if not event.startswith(b":"))  # a comment, which keeps a stream alive
    return "".join(_content(event.removeprefix(b"data:"), "delta") for event in said)


def _content(json: bytes, holder: str) -> str:
    try:
        choices: list[dict[str, Any]] = msgspec.json.decode(json)["choices"]
        return "".join(choice[holder].get("content") or "" for choice in choices)
    except (msgspec.DecodeError, KeyError, TypeError) as error:
        raise BrokenReply(f"{json[:200]!r}: {error!r}") from None


def unchunked(body: bytes) -> bytes:
    """The payload of a chunked body; raises BrokenReply."""
    parts: list[bytes] = []
    at = 0
    try:
        while size := int(body[at : (end := body.index(b"\r\n", at))], 16):
            parts.append(body[end + 2 : end + 2 + size])
            at = end + 2 + size + 2
    except ValueError as error:
        raise BrokenReply(f"not chunks: {error}") from None
    return b"".join(parts)


def header(head: bytes, name: bytes) -> bytes | None:
    """The value of a header (lower-case name) in a reply's head."""
    for line in head.split(b"\r\n")[1:]:
        key, _, value = line.partition(b":")
        if key.lower() == name:
            return value.strip()
    return None
