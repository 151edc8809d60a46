"""The faults benchmark: what clients notice when replicas are killed, hang, fail or are gone, under load.

`herd route` in front of simulated engines that say the same to the same prompt on every replica, so what a
stream should have said is known. Streams come at their times, whatever became of those before. Run through
`scripts/bench faults`.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import os
import signal
import time
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from urllib.parse import urlsplit

import click
import httpx
import msgspec

from loadtests import account, contenders, generator, prompts
from loadtests.bench import Cores, machine, ready, run_bench, trusting
from loadtests.contenders import Contender, Running
from loadtests.engines import MODEL
from loadtests.open_loop import arrivals
from loadtests.oracle import Oracle
from loadtests.report import table, where
from workers import demo_model
from workers.command import Address
from workers.engine import DEMO, EngineSpec, make_engine
from workers.process import EngineProcess

ENGINES = 4
RATE, TOKENS = 40.0, 60
FAULT_AT_S = 5.0
# A step takes 15 ms, so a stream takes a second and forty a second are ten on each engine.
ENGINE_ARGS = {"step-time": "0.015,33e-6,45e-6,0", "max-num-seqs": 64, "block-size": 16}
STARTUP_S = 60.0
REPLY_S = 60.0
PROMPT_SIZE = 600


@dataclass(slots=True)
class Stream:
    """One stream as its client saw it. Times in seconds of the run; `gap`: the longest between two reads."""

    began: float
    expected: str
    status: int = 0
    raw: bytes = b""
    error: str = ""
    retry_after: bool = False
    gap: float = 0.0
    ttft: float = 0.0
    ended: float = 0.0

    @property
    def outcome(self) -> str:
        """`whole`, `refused` (with Retry-After), `altered`, or `failed`."""
        if self.status in (429, 503) and self.retry_after:
            return "refused"
        text, done = said(self.raw)
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


Act = Callable[[Bed], Awaitable[None]]


async def killed(bed: Bed) -> None:
    bed.signal(signal.SIGKILL, 0)


async def stopped(bed: Bed) -> None:
    bed.signal(signal.SIGSTOP, 0)
    await asyncio.sleep(15.0)
    sent = [at for at in await bed.placed(0) if at > FAULT_AT_S + 2]
    bed.signal(signal.SIGCONT, 0)
    bed.notes["sent there after 2 s"] = str(len(sent))


async def failing(bed: Bed) -> None:
    await bed.fault(0, kind="status", status=500, times=None)
    await asyncio.sleep(8.0)
    repaired = bed.now
    await bed.repair(0)
    await asyncio.sleep(4.0)
    at = await bed.placed(0)
    last = max((t for t in at if FAULT_AT_S < t < repaired), default=FAULT_AT_S)
    back = min((t for t in at if t > repaired), default=None)
    bed.notes["out after"] = f"{last - FAULT_AT_S:.2f} s"
    bed.notes["back after"] = "never" if back is None else f"{back - repaired:.2f} s"


async def erring(bed: Bed) -> None:
    await bed.fault(0, kind="error_event", after_chunks=20, times=20)


async def gone(bed: Bed) -> None:
    everyone = range(len(bed.engines))
    bed.signal(signal.SIGKILL, *everyone)
    await asyncio.sleep(10.0)
    for engine in everyone:
        bed.restart(engine)
    await asyncio.gather(*(answers(engine.url) for engine in bed.engines))
    bed.notes["back at"] = f"{bed.now:.1f} s"


async def answers(url: str) -> None:
    async with httpx.AsyncClient(trust_env=False) as client:
        while True:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(f"{url}/health")).is_success:
                    return
            await asyncio.sleep(0.05)


@dataclass(frozen=True, slots=True)
class Fault:
    """A row of the table: what is done, and how long the load lasts (seconds)."""

    name: str
    act: Act
    seconds: float = 15.0


FAULTS = (
    Fault("kill -9", killed),
    Fault("SIGSTOP for 15 s", stopped, 28.0),
    Fault("answers 500 for 8 s", failing, 20.0),
    Fault("error event, then [DONE], 20 times", erring),
    Fault("all down for 10 s", gone, 28.0),
)


@contextlib.asynccontextmanager
async def bed_of(cores: Cores) -> AsyncIterator[Bed]:
    """Engines and a router that trusts them."""
    spec = EngineSpec(engine="simulated", name=MODEL, source=DEMO, engine_args=ENGINE_ARGS)
    engine = make_engine(spec)
    with TemporaryDirectory(prefix="herd-bench-") as folder:
        logs = [Path(folder) / f"log-{number}" for number in range(ENGINES)]
        running = await asyncio.gather(*(EngineProcess.start(engine, log, STARTUP_S) for log in logs))

        def restart(number: int) -> None:
            parts = urlsplit(running[number].url)
            address = Address(parts.hostname or "", parts.port or 0)
            running[number] = EngineProcess(engine.command(address), address, logs[number])

        try:
            herd = Contender(contenders.HERD, contenders.herd("kv_aware"))
            with contenders.running(herd, [one.url for one in running], cores.router) as router:
                await ready(herd.name, router, MODEL)
                await trusting(router)
                yield Bed(router, running, restart)
        finally:
            for one in running:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(one.pid, signal.SIGCONT)
                await one.kill()


async def ask(port: int, request: bytes, stream: Stream, bed: Bed) -> None:
    """Sends one request and notes all that comes."""
    try:
        async with asyncio.timeout(REPLY_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
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
    stream.ttft = bed.now - stream.began
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


async def load(bed: Bed, fault: Fault, oracle: Oracle) -> list[Stream]:
    """Streams at their times, and the fault at its own."""
    moments = arrivals(RATE, fault.seconds, fault.name)
    asked = [made(f"{fault.name}/{number}", bed.router.port, oracle) for number in range(len(moments))]
    bed.began, loop = time.time(), asyncio.get_running_loop()
    began = loop.time()
    streams = [Stream(at, expected) for at, (_, expected) in zip(moments, asked, strict=True)]

    async def one(stream: Stream, request: bytes) -> None:
        await asyncio.sleep(began + stream.began - loop.time())
        await ask(bed.router.port, request, stream, bed)

    async def act() -> None:
        await asyncio.sleep(FAULT_AT_S)
        await fault.act(bed)

    async with asyncio.TaskGroup() as group:
        group.create_task(act())
        for stream, (request, _) in zip(streams, asked, strict=True):
            group.create_task(one(stream, request))
    return streams


def made(seed: str, port: int, oracle: Oracle) -> tuple[bytes, str]:
    """A request, and what it is to be answered."""
    messages = prompts.question("You keep the herd.", prompts.text(PROMPT_SIZE, seed))
    body = prompts.body(MODEL, messages, TOKENS, stream=True)
    return generator.message(port, body), oracle.says(messages, TOKENS)


async def row(fault: Fault, oracle: Oracle, cores: Cores) -> list[str]:
    """One fault, on engines and a router of its own."""
    async with bed_of(cores) as bed:
        streams = await load(bed, fault, oracle)
        counted = await account.counted([bed.admin])
    outcomes = Counter(stream.outcome for stream in streams)
    for stream in itertools.islice((s for s in streams if s.outcome in ("failed", "altered")), 3):
        click.echo(f"{fault.name}: {stream.outcome}: {stream.error or stream.raw[-300:]!r}", err=True)
        if stream.outcome == "altered":
            click.echo(f"expected {stream.expected!r}, got {said(stream.raw)[0]!r}", err=True)
    whole = [stream for stream in streams if stream.outcome == "whole"]
    calm = max((s.gap for s in whole if s.ended < FAULT_AT_S), default=0.0)
    worst = max((s.gap for s in whole if s.ended >= FAULT_AT_S), default=0.0)
    late = max((s.ttft for s in whole if s.ended >= FAULT_AT_S), default=0.0)
    tries = 1 + counted["herd_retries_total"] / len(streams)
    back = [s.began for s in streams if s.outcome == "refused"]
    notes = bed.notes | ({"last refused at": f"{max(back):.1f} s"} if back else {})
    return [
        fault.name,
        str(len(streams)),
        str(outcomes["failed"]),
        str(outcomes["altered"]),
        str(outcomes["refused"]),
        str(round(counted["herd_stream_continuations_total"])),
        f"{worst - calm:.2f}",
        f"{late:.2f}",
        f"{tries:.3f}",
        "; ".join(f"{name}: {value}" for name, value in notes.items()),
    ]


async def bench(faults: Sequence[Fault], oracle: Oracle, cores: Cores) -> list[list[str]]:
    return [await row(fault, oracle, cores) for fault in faults]


HEAD = [
    "fault at 5 s", "streams", "failed", "altered", "refused", "broke and went on", "worst added gap s",
    "worst TTFT s", "tries/request", "",
]  # fmt: skip


@click.command()
@click.option("--only", default=None, help="Rows whose name contains this.")
def main(only: str | None) -> None:
    """What clients notice of faults: 40 streams a second of 60 tokens on four replicas, a fault on one."""
    faults = [fault for fault in FAULTS if only is None or only in fault.name]
    if not faults:
        raise click.BadParameter(f"no row contains {only!r}: {', '.join(fault.name for fault in FAULTS)}")
    cores = Cores.of_machine()
    oracle = Oracle(demo_model.tokenizer_dir())
    found = run_bench(bench(faults, oracle, cores), cores)
    click.echo(where(machine(cores)) + "\n\n" + table(HEAD, found))
    if any(int(cell) for cells in found for cell in cells[2:4]):
        raise click.ClickException("streams failed or were altered")


if __name__ == "__main__":
    main()
