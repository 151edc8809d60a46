"""A router before simulated engines that can be killed, stopped and told to fail, and streams through it.

`herd route` in front of simulated engines that say the same to the same prompt on every replica, so what a
stream should have said is known. Streams come at their times, whatever became of those before.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import httpx
import msgspec

from loadtests import account, contenders, generator, prompts
from loadtests.bench import Cores, ready, trusting
from loadtests.contenders import Contender, Running
from loadtests.cpu import rss_bytes
from loadtests.engines import MODEL
from loadtests.generator import Ask
from loadtests.oracle import Oracle
from workers.command import Address
from workers.engine import DEMO, EngineSpec, make_engine
from workers.process import EngineProcess

ENGINES = 4
# A step takes 15 ms, so a stream of 60 tokens takes a second, and forty a second are ten on each engine.
ENGINE_ARGS = {"step-time": "0.015,33e-6,45e-6,0", "max-num-seqs": 64, "block-size": 16}
STARTUP_S = 60.0
REPLY_S = 60.0


@dataclass(slots=True)
class Stream:
    """One stream as its client saw it. Times in seconds of the run; `gap`: the longest between two reads.

    `ttft`: until its first token, 0 without one.
    """

    began: float
    expected: str
    status: int = 0
    raw: bytes = b""
    error: str = ""
    retry_after: bool = False
    gap: float = 0.0
    ttft: float = 0.0
    ended: float = 0.0
    router_died: bool = False

    @property
    def outcome(self) -> str:
        """`whole`, `refused` (with Retry-After), `altered`, `lost` with its router, or `failed`."""
        if self.status in (429, 503) and self.retry_after:
            return "refused"
        text, done = said(self.raw)
        if self.error and self.router_died:
            return "lost"
        if self.error or self.status != 200 or not done:
            return "failed"
        return "whole" if text == self.expected else "altered"


def said(raw: bytes) -> tuple[str, bool]:
    """The text of a chunked stream of events, and whether it ended as a whole one."""
    text, done = "", False
    for line in raw.split(b"\n"):
        if line.startswith(b"data: [DONE]"):
            done = True
        elif line.startswith(b"data: {"):
            chunk = msgspec.json.decode(line[len(b"data: ") :])
            done = done and "error" not in chunk
            for choice in chunk.get("choices", ()):
                text += choice["delta"].get("content") or ""
    return text, done


@dataclass(slots=True)
class Bed:
    """A router and its engines, and the clock of one run."""

    router: Running
    engines: list[EngineProcess]
    restart: Callable[[int], None]
    began: float = 0.0
    router_deaths: list[float] = field(default_factory=list)
    notes: dict[str, str] = field(default_factory=dict)

    @property
    def admin(self) -> str:
        return f"http://127.0.0.1:{self.router.admin_port}"

    @property
    def now(self) -> float:
        return time.time() - self.began

    def signal(self, number: int, *which: int) -> None:
        """To the processes of these engines."""
        for engine in which:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.engines[engine].pid, number)

    def weigh(self) -> None:
        """Notes how much memory the router takes: at half time, and at the end."""
        told = f"{rss_bytes(self.router.pid) / 1e6:.0f}"
        self.notes["router RSS MB"] = " to ".join(filter(None, (self.notes.get("router RSS MB"), told)))

    def kill_router(self) -> None:
        """One of its processes; the others go on, and its parent starts another."""
        children = Path(f"/proc/{self.router.pid}/task/{self.router.pid}/children").read_text().split()
        os.kill(int(children[0]), signal.SIGKILL)
        self.router_deaths.append(self.now)

    async def fault(self, engine: int, **told: Any) -> None:
        """What an engine is told to do."""
        async with httpx.AsyncClient(trust_env=False) as client:
            (await client.post(f"{self.engines[engine].url}/faults", json=told)).raise_for_status()

    async def repair(self, engine: int) -> None:
        async with httpx.AsyncClient(trust_env=False) as client:
            await client.delete(f"{self.engines[engine].url}/faults")

    async def placed(self, engine: int) -> list[float]:
        """When the router sent a request to an engine, of the last it knows."""
        tried = itertools.chain.from_iterable(await account.tries(self.admin, account.MOST_DECISIONS))
        url = self.engines[engine].url
        return sorted(each["placed_at"] - self.began for each in tried if each["replica"] == url)


async def answers(url: str) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(f"{url}/health")).is_success:
                    return
            await asyncio.sleep(0.05)


@contextlib.asynccontextmanager
async def bed_of(
    cores: Cores, *flags: str, engine_args: Mapping[str, Any] = ENGINE_ARGS
) -> AsyncIterator[Bed]:
    """Engines and a router with these flags that trusts them."""
    spec = EngineSpec(engine="simulated", name=MODEL, source=DEMO, engine_args=dict(engine_args))
    engine = make_engine(spec)
    with TemporaryDirectory(prefix="herd-bench-") as folder:
        logs = [Path(folder) / f"log-{number}" for number in range(ENGINES)]
        running = await asyncio.gather(*(EngineProcess.start(engine, log, STARTUP_S) for log in logs))

        def restart(number: int) -> None:
            parts = urlsplit(running[number].url)
            address = Address(parts.hostname or "", parts.port or 0)
            running[number] = EngineProcess(engine.command(address), address, logs[number])

        try:
            herd = Contender(contenders.HERD, contenders.herd("kv_aware", *flags))
            with contenders.running(herd, [one.url for one in running], cores.router) as router:
                await ready(herd.name, router, MODEL)
                await trusting(router)
                yield Bed(router, running, restart)
        finally:
            for one in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one.pid, signal.SIGCONT)
                await one.kill()


async def send(bed: Bed, moments: Sequence[float], asks: Sequence[Ask]) -> list[Stream]:
    """Sends each request at its moment, in seconds from now on, when the bed's clock begins."""
    loop = asyncio.get_running_loop()
    bed.began, began = time.time(), loop.time()
    streams = [Stream(at, ask.expected) for at, ask in zip(moments, asks, strict=True)]

    async def one(stream: Stream, ask: Ask) -> None:
        await asyncio.sleep(began + stream.began - loop.time())
        await _ask(bed, ask.request, stream)

    await asyncio.gather(*map(one, streams, asks))
    return streams


async def _ask(bed: Bed, request: bytes, stream: Stream) -> None:
    """Sends one request and notes all that comes."""
    try:
        async with asyncio.timeout(REPLY_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", bed.router.port)
            with contextlib.closing(writer):
                writer.write(request)
                await _listen(reader, stream, bed)
    except (OSError, EOFError, TimeoutError, ValueError) as error:
        stream.error = repr(error)
    stream.ended = bed.now


async def _listen(reader: asyncio.StreamReader, stream: Stream, bed: Bed) -> None:
    head = await reader.readuntil(b"\r\n\r\n")
    stream.status = int(head.split(b" ", 2)[1])
    stream.retry_after = b"\r\nretry-after:" in head.lower()
    if (length := generator.header(head, b"content-length")) is not None:
        stream.raw = await reader.readexactly(int(length))
        return
    heard = time.time()
    while not stream.raw.endswith(b"0\r\n\r\n"):
        data = await reader.read(1 << 16)
        if not data:
            raise EOFError("the connection was closed")
        now = time.time()
        stream.gap, heard = max(stream.gap, now - heard), now
        stream.raw += data
        if not stream.ttft and generator.TOKEN in stream.raw:
            stream.ttft = bed.now - stream.began


def made(bed: Bed, oracle: Oracle, seed: str, size: int, tokens: int, *headers: str) -> Ask:
    """A request with so many characters, and what it is to be answered."""
    messages = prompts.question("You keep the herd.", prompts.text(size, seed))
    body = prompts.body(MODEL, messages, tokens, stream=True)
    return Ask(generator.message(bed.router.port, body, *headers), oracle.says(messages, tokens))
