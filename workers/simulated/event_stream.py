"""An answer on the wire as server-sent events: it ends when the client leaves, or as a fault says."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any, Protocol

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from workers.simulated import errors
from workers.simulated.faults import Faults
from workers.simulated.live import Generation


class Answer(Protocol):
    """A generation in the form of one API family."""

    generation: Generation

    def stream(self) -> AsyncIterator[bytes]:
        """The events of the stream."""

    async def whole(self) -> dict[str, Any]:
        """The body of the answer."""


class EventStream(Response):
    """Sends an answer's events as they come, and breaks off as the faults say."""

    def __init__(
        self, answer: Answer, faults: Faults, broken: Callable[[errors.ApiError], bytes] | None
    ) -> None:
        super().__init__(media_type="text/event-stream")
        del self.headers["content-length"]
        self._answer = answer
        self._faults = faults
        self._broken = broken

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with aborted_on_disconnect(receive, self._answer.generation):
            try:
                await self._send_events(send)
            except errors.ApiError as error:
                if self._broken is None:
                    raise CutError from error
                await send({"type": "http.response.body", "body": self._broken(error), "more_body": True})
        await send({"type": "http.response.body"})

    async def _send_events(self, send: Send) -> None:
        strike = self._faults.for_stream()
        sent = 0
        async for chunk in self._answer.stream():
            if (fault := await strike(sent)) is not None:
                self._answer.generation.abort()
                if fault.kind == "cut":
                    raise CutError
                raise errors.engine_dead()
            await send({"type": "http.response.body", "body": chunk, "more_body": True})
            sent += 1


class CutError(Exception):
    """Makes uvicorn close the connection in the middle of a response."""


@contextlib.asynccontextmanager
async def aborted_on_disconnect(receive: Receive, generation: Generation) -> AsyncIterator[None]:
    """Abort the generation as soon as the client is gone."""

    async def watch() -> None:
        while (await receive())["type"] != "http.disconnect":
            pass
        generation.abort()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
