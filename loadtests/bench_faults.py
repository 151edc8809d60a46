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
from dataclasses import dataclass, field, replace
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
from loadtests.cpu import rss_bytes
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
# A connection that a dying process had not accepted yet is its own as well.
ACCEPTING_S = 0.2
BAD = ("failed", "altered")


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


async def half_routed(bed: Bed) -> None:
    bed.kill_router()


async def churn(bed: Bed) -> None:
    """One fault after the other, each on the next engine, which is whole again before its turn comes anew."""
    for number in itertools.count():
        engine = number % len(bed.engines)
        kind = number % 5
        if kind == 0:
            bed.signal(signal.SIGKILL, engine)
            await bed.engines[engine].wait()
            bed.restart(engine)
        elif kind == 1:
            bed.signal(signal.SIGSTOP, engine)
            await asyncio.sleep(4.0)
            bed.signal(signal.SIGCONT, engine)
        elif kind == 2:
            await bed.fault(engine, kind="error_event", after_chunks=20, times=5)
        elif kind == 3:
            await bed.fault(engine, kind="cut", after_chunks=9, times=5)
        else:
            bed.kill_router()
        await answers(bed.engines[engine].url)
        await asyncio.sleep(1.5)


@dataclass(frozen=True, slots=True)
class Fault:
    """A row of the table: what is done, and how long the load lasts (seconds). `routers`: its processes."""

    name: str
    act: Act
    seconds: float = 15.0
    routers: int = 1


FAULTS = (
    Fault("kill -9", killed),
    Fault("SIGSTOP for 15 s", stopped, 28.0),
    Fault("answers 500 for 8 s", failing, 20.0),
    Fault("error event, then [DONE], 20 times", erring),
    Fault("all down for 10 s", gone, 28.0),
    Fault("one of two router processes killed", half_routed, routers=2),
)
CHURN = Fault("churn", churn, routers=2)


@contextlib.asynccontextmanager
async def bed_of(routers: int, cores: Cores) -> AsyncIterator[Bed]:
    """Engines and a router that trusts them, of so many processes."""
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
            processes = ("--processes", str(routers)) if routers > 1 else ()
            herd = Contender(contenders.HERD, contenders.herd("kv_aware", *processes))
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

    acting = asyncio.create_task(act())
    await asyncio.gather(
        *(one(*sent) for sent in zip(streams, (request for request, _ in asked), strict=True))
    )
    if acting.done():
        acting.result()
    acting.cancel()
    for stream in streams:
        first, last = stream.began - ACCEPTING_S, stream.ended + ACCEPTING_S
        stream.router_died = any(first < died < last for died in bed.router_deaths)
    return streams


def made(seed: str, port: int, oracle: Oracle) -> tuple[bytes, str]:
    """A request, and what it is to be answered."""
    messages = prompts.question("You keep the herd.", prompts.text(PROMPT_SIZE, seed))
    body = prompts.body(MODEL, messages, TOKENS, stream=True)
    return generator.message(port, body), oracle.says(messages, TOKENS)


@dataclass(frozen=True, slots=True)
class Result:
    """What became of a run's streams. `counted`: what a router of one process counted."""

    fault: Fault
    streams: list[Stream]
    counted: Counter[str] | None
    notes: dict[str, str]

    @property
    def outcomes(self) -> Counter[str]:
        return Counter(stream.outcome for stream in self.streams)


async def run(fault: Fault, oracle: Oracle, cores: Cores) -> Result:
    """One fault, on engines and a router of its own."""
    async with bed_of(fault.routers, cores) as bed:
        half = asyncio.get_running_loop().call_later(fault.seconds / 2, bed.weigh)
        streams = await load(bed, fault, oracle)
        half.cancel()
        bed.weigh()
        # Of several router processes none counts for the others, and the killed ones are forgotten.
        counted = await account.counted([bed.admin]) if fault.routers == 1 else None
    return Result(fault, streams, counted, bed.notes)


def row(result: Result) -> list[str]:
    """Of the table; the first failures are told on standard error."""
    fault, streams, outcomes, counted = result.fault, result.streams, result.outcomes, result.counted
    for stream in itertools.islice((s for s in streams if s.outcome in BAD), 3):
        told = stream.error or stream.raw[-300:]
        click.echo(
            f"{fault.name}: {stream.outcome} at {stream.began:.2f} to {stream.ended:.2f} s: {told!r}",
            err=True,
        )
    whole = [stream for stream in streams if stream.outcome == "whole"]
    before = [stream for stream in whole if stream.ended < FAULT_AT_S]
    behind = [stream for stream in whole if stream.ended >= FAULT_AT_S]
    gap = max(s.gap for s in behind) - max(s.gap for s in before)
    refused = [s.began for s in streams if s.outcome == "refused"]
    notes = result.notes | ({"last refused at": f"{max(refused):.1f} s"} if refused else {})
    return [
        fault.name,
        str(len(streams)),
        *(str(outcomes[outcome]) for outcome in (*BAD, "refused", "lost")),
        str(round(counted["herd_stream_continuations_total"])) if counted else "-",
        f"{gap:.2f}",
        f"{max(s.ttft for s in behind):.2f}",
        f"{1 + counted['herd_retries_total'] / len(streams):.3f}" if counted else "-",
        "; ".join(f"{name}: {value}" for name, value in notes.items()),
    ]


async def bench(faults: Sequence[Fault], oracle: Oracle, cores: Cores) -> list[Result]:
    return [await run(fault, oracle, cores) for fault in faults]


HEAD = [
    "fault at 5 s", "streams", "failed", "altered", "refused", "lost with their router", "broke and went on",
    "worst added gap s", "worst TTFT s", "tries/request", "",
]  # fmt: skip


@click.command()
@click.option("--only", default=None, help="Rows whose name contains this.")
@click.option("--churn", "seconds", type=float, help="In place of the rows: one fault after the other.")
def main(only: str | None, seconds: float | None) -> None:
    """What clients notice of faults: 40 streams a second of 60 tokens on four replicas, a fault on one."""
    faults = [fault for fault in FAULTS if only is None or only in fault.name]
    if seconds is not None:
        faults = [replace(CHURN, seconds=seconds)]
    if not faults:
        raise click.BadParameter(f"no row contains {only!r}: {', '.join(fault.name for fault in FAULTS)}")
    cores = Cores.of_machine()
    oracle = Oracle(demo_model.tokenizer_dir())
    found = run_bench(bench(faults, oracle, cores), cores)
    click.echo(where(machine(cores)) + "\n\n" + table(HEAD, map(row, found)))
    if any(result.outcomes[outcome] for result in found for outcome in BAD):
        raise click.ClickException("streams failed or were altered")


if __name__ == "__main__":
    main()
