"""A stream that an engine forgot, while all else there goes well."""

from __future__ import annotations

import asyncio
import json

from router_wire import LAST_CHUNK, client, engine, post, relaying, says, stream

from router.core.step_model import TELLING

CHAT = "/v1/chat/completions"
DONE = b"data: [DONE]\n\n"
WHOLE = stream(b'data: {"choices":[{"delta":{"content":"a"}}]}\n\n', DONE) + LAST_CHUNK
REQUEST = post(CHAT, json.dumps({"model": "m", "stream": True}).encode())


async def test_a_request_of_which_nothing_comes_is_taken_elsewhere() -> None:
    """Its replica is well, and not busy: its step model has seen enough to know."""
    forever = asyncio.Event()

    async def lost(request: bytes, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await forever.wait()

    async with engine(lost) as (it, silent), engine(says(WHOLE)) as (_, well):
        async with relaying(silent, well) as (relay, fleet, port):
            for standing in fleet:
                for _ in range(TELLING):
                    standing.steps.prefill.observe(1.0, 1.0)
            async with asyncio.timeout(60):
                while not it.requests:
                    async with client(port) as c:
                        await c.send(REQUEST)
                        assert (await c.reply())[2].endswith(DONE)
            assert relay._metrics.of("m").retries["cut"].value == 1
        forever.set()
