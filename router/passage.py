"""A reply on its way from an engine to the client: read along, counted, and never ended as if it were whole.

Three ways lead there. Streams pass event by event; a reply in one piece is held until it is whole, so that
until then another replica can give it; what the router cannot read passes as it comes. Where an engine says
that it failed, the client hears nothing of it yet: another may do better.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import msgspec

from router.errors import ReplyCut, ReplyFailed, UpstreamBroken, UpstreamError
from router.http import headers
from router.http.event_watch import EventWatch
from router.http.reply_head import Head
from router.http.server import Reply
from router.http.sse import EventStream, Shortcut, StreamTooLong, Usage
from router.http.transcript import Transcript
from router.http.upstream import Exchange
from router.metrics import ModelMetrics
from router.openai_api import Call
from router.splice import Spliced

# A larger reply in one piece is passed on as it comes: text has no such length, hundreds of embeddings do.
HELD_BYTES = 4 * 1024 * 1024
# What a replica answers that fails itself; another may not.
FAILURES = frozenset({500, 502, 503, 504})
# Of a reply in one piece that the engine gave up; it looks like any other.
ABORTED = b'"finish_reason":"abort"'
EXCERPT_CHARS = 200


class _Failure(msgspec.Struct):
    code: int | None = None


class _ErrorEvent(msgspec.Struct):
    error: _Failure | None = None


class Reading(Protocol):
    """A stream that is read along (`EventStream`, `EventWatch`)."""

    done: bool
    error: bytes | None

    @property
    def events(self) -> int: ...

    @property
    def broken(self) -> bool: ...

    @property
    def between(self) -> bool: ...

    def feed(self, data: bytes) -> bytes: ...

    def shortcut(self, write: Callable[[bytes], None]) -> Shortcut | None: ...


class Passage:
    """One reply of one replica. `first_output` is called once, when the first of it was passed on. `also`:
    headers for the client beside the engine's. `rest`: it is the rest of a stream that another one began.
    `noted`: so much of a stream is kept that it can go on elsewhere."""

    def __init__(
        self,
        call: Call,
        request_id: bytes,
        reply: Reply,
        exchange: Exchange,
        metrics: ModelMetrics,
        first_output: Callable[[], None],
        also: headers.Headers,
        rest: Spliced | None = None,
        noted: bool = False,
    ) -> None:
        self._call = call
        self._request_id = request_id
        self._reply = reply
        self._exchange = exchange
        self._metrics = metrics
        self._first_output = first_output
        self._also = also
        self._rest = rest
        self._noted = noted
        self._reading: Reading | None = None
        self.response_id: str | None = None  # of a stored response, once it is known
        self.usage: Usage | None = None  # once the engine has reported it

    @property
    def error(self) -> bytes | None:
        """With what the engine ended its stream, if it was an error."""
        return self._reading.error if self._reading is not None else None

    @property
    def stream(self) -> EventStream | Spliced | None:
        """The stream of tokens that this is, as far as it has come; a rest, even if nothing of it has."""
        return self._reading if isinstance(self._reading, EventStream | Spliced) else self._rest

    @property
    def events(self) -> int:
        """Of a stream, so many that carried output: about as many tokens."""
        return self._reading.events if self._reading is not None else 0

    async def run(self) -> None:
        """Passes all of it on. Raises ReplyCut where something is missing, ReplyFailed for an error."""
        self._reply.attach(self._exchange.connection)
        try:
            await self._run()
        finally:
            self._reply.detach()
            # It holds the request, which holds this passage: a cycle would keep both until a collection.
            del self._first_output

    async def _run(self) -> None:
        call, head = self._call, self._exchange.head
        if head.status in FAILURES or (self._rest is not None and not is_event_stream(head)):
            await self._failed()
        elif self._rest is not None:
            await self._events(self._rest)
        elif call.transformed and is_event_stream(head):
            transcript = Transcript() if self._noted else None
            await self._events(EventStream(call.wants_ids, call.wants_usage, transcript))
        elif call.family.tokens or is_json(head):
            await self._whole()
        elif is_event_stream(head):
            await self._events(EventWatch(call.family.ending))
        else:
            await self._verbatim()

    def break_off(self, error: UpstreamError) -> None:
        """The client has part of the reply: say that the rest is missing."""
        self._metrics.truncated.inc()
        self._reply.close_after()
        reading = self._reading or self._rest
        if reading is None:
            self._reply.abort()
            return
        self._reply.write(self._ending(error, reading))
        self._reply.end()

    def _ending(self, error: UpstreamError, reading: Reading) -> bytes:
        """The last event of a stream that broke off: the engine's own if it said one."""
        if isinstance(error, ReplyFailed) and error.event is not None:
            return error.event.rstrip() + b"\n\n"
        said = UpstreamBroken(f"The stream broke off: {error}")
        return self._call.family.error_event(said, self._request_id.decode("ascii"), reading)

    def finish(self, ending: bytes) -> None:
        """The client has all of a stream but its ending."""
        self._reply.write(ending)
        self._reply.end()

    async def _events(self, reading: Reading) -> None:
        """A stream: first output, token ids and counts, its true end."""
        self._reading = reading
        self._begin()
        try:
            await self._exchange.body(self._sink(reading))
        except StreamTooLong as error:
            raise ReplyCut(str(error)) from None
        except ReplyCut:
            if not reading.done and reading.error is None:
                raise
        finally:
            self._note_stream(reading)
        if reading.error is not None:
            status = 400 if is_refusal(reading.error) else 500
            told = f"it failed in its stream: {_excerpt(reading.error)}"
            raise ReplyFailed(told, status, event=reading.error)
        if reading.broken:
            raise ReplyCut("the replica ended its stream without saying that it is whole")
        self._reply.end()

    def _sink(self, reading: Reading) -> Callable[[bytes], Shortcut | None]:
        awaited, shortcut = True, None

        def sink(data: bytes) -> Shortcut | None:
            nonlocal awaited, shortcut
            out = reading.feed(data)
            if out:
                self._reply.write(out)
                if awaited and reading.events:
                    awaited, shortcut = False, reading.shortcut(self._reply.chunk_writer)
                    self._first_output()
            return shortcut if reading.between else None

        return sink

    async def _whole(self) -> None:
        parts: list[bytes] = []
        held = 0

        def sink(data: bytes) -> None:
            nonlocal held
            held += len(data)
            parts.append(data)
            if held > HELD_BYTES:
                self._spill(parts)

        await self._exchange.body(sink)
        if self._reply.started:
            self._spill(parts)
            self._reply.end()
            return
        body = b"".join(parts)
        if ABORTED in body and self._call.family.tokens:
            raise ReplyFailed("it gave the request up")
        if self._exchange.head.status == 200:
            self._first_output()
            self._note_whole(body)
        self._reply.send(self._exchange.head.status, self._returned(), body)

    async def _failed(self) -> None:
        """An answer that another replica may better; kept for the client in case that none can."""
        parts: list[bytes] = []
        await self._exchange.body(parts.append)
        body, head = b"".join(parts), self._exchange.head
        message = f"it answered HTTP {head.status}: {_excerpt(body)}"
        # What another engine says of the rest of a stream is not about the client's request.
        status = head.status if self._rest is None else 503
        raise ReplyFailed(message, status, answer=(self._returned(), body))

    def _spill(self, parts: list[bytes]) -> None:
        """Passes on what was held, from the beginning."""
        if not self._reply.started:
            self._begin()
            self._first_output()
        while parts:
            self._reply.write(parts.pop(0))

    async def _verbatim(self) -> None:
        awaited = True

        def sink(data: bytes) -> None:
            nonlocal awaited
            if awaited:
                awaited = False
                self._first_output()
            self._reply.write(data)

        self._begin()
        await self._exchange.body(sink)
        self._reply.end()

    def _begin(self) -> None:
        if self._rest is not None:
            return  # the client has a head
        head = self._exchange.head
        length = None if self._reading is not None else head.length
        self._reply.start(head.status, self._returned(), length)

    def _returned(self) -> headers.Headers:
        """The engine's headers for the client, and the request's id."""
        return [*self._exchange.head.passed, (b"x-request-id", self._request_id), *self._also]

    def _note_stream(self, reading: Reading) -> None:
        family = self._call.family
        self._metrics.events.inc(reading.events)
        self._count(family.streamed_usage(reading))
        self.response_id = family.streamed_id(reading)

    def _note_whole(self, body: bytes) -> None:
        family = self._call.family
        self._count(family.usage_of(body))
        self.response_id = family.id_of(body)

    def _count(self, usage: Usage | None) -> None:
        """Adds the engine's token counts."""
        self.usage = usage
        if usage is not None:
            self._metrics.prompt_tokens.inc(usage.prompt_tokens)
            self._metrics.cached_tokens.inc(usage.cached_tokens)
            self._metrics.output_tokens.inc(usage.completion_tokens or 0)


def _excerpt(said: bytes) -> str:
    return said[:EXCERPT_CHARS].decode(errors="replace").strip()


def is_refusal(event: bytes) -> bool:
    """Whether an engine's error event is about the request, which no other replica would answer either."""
    try:
        error = msgspec.json.decode(event[event.find(b"{") :], type=_ErrorEvent).error
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
        return False
    return error is not None and 400 <= (error.code or 500) < 500


def is_event_stream(head: Head) -> bool:
    """Whether the engine streams: it may also answer a streaming request with a plain error."""
    content_type = head.header(b"content-type") or b""
    return head.status == 200 and content_type.startswith(b"text/event-stream")


def is_json(head: Head) -> bool:
    """Whether the reply is one JSON document, whole or nothing."""
    return (head.header(b"content-type") or b"").startswith(b"application/json")
