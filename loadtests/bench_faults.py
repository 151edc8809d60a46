"""The faults benchmark: what clients notice when replicas are killed, hang, fail or are gone, under load.

A row for each fault, and twice the load that the fleet sustains for a minute. Run through
`scripts/bench faults`.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import click

from loadtests import account, overload
from loadtests.bed import Bed, Stream, answers, bed_of, made, send
from loadtests.bench import Cores, machine, run_bench
from loadtests.open_loop import arrivals
from loadtests.oracle import Oracle
from loadtests.report import table, where
from workers import demo_model

RATE, TOKENS = 40.0, 60
PROMPT_SIZE = 600
FAULT_AT_S = 5.0
# A connection that a dying process had not accepted yet is its own as well.
ACCEPTING_S = 0.2
BAD = ("failed", "altered")

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


async def load(bed: Bed, fault: Fault, oracle: Oracle) -> list[Stream]:
    """Streams at their times, and the fault at its own."""
    moments = arrivals(RATE, fault.seconds, fault.name)
    seeds = [f"{fault.name}/{number}" for number in range(len(moments))]
    asks = [made(bed, oracle, seed, PROMPT_SIZE, TOKENS) for seed in seeds]

    async def act() -> None:
        await asyncio.sleep(FAULT_AT_S)
        await fault.act(bed)

    acting = asyncio.create_task(act())
    streams = await send(bed, moments, asks)
    if acting.done():
        acting.result()
    acting.cancel()
    for stream in streams:
        first, last = stream.began - ACCEPTING_S, stream.ended + ACCEPTING_S
        stream.router_died = any(first < died < last for died in bed.router_deaths)
    return streams


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
    processes = ("--processes", str(fault.routers)) if fault.routers > 1 else ()
    async with bed_of(cores, *processes) as bed:
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


HEAD = [
    "fault at 5 s", "streams", "failed", "altered", "refused", "lost with their router", "broke and went on",
    "worst added gap s", "worst TTFT s", "tries/request", "",
]  # fmt: skip


async def bench(faults: Sequence[Fault], overload_s: float, oracle: Oracle, cores: Cores) -> Found:
    """Each fault, and the overload where it lasts a while."""
    results = [await run(fault, oracle, cores) for fault in faults]
    return Found(results, await overload.run(oracle, cores, overload_s) if overload_s else None)


class Found(NamedTuple):
    """What became of each fault, and of what is sustained and of the overload."""

    results: list[Result]
    overloaded: tuple[overload.Part, overload.Part] | None

    @property
    def report(self) -> str:
        """A table of each."""
        faults = [table(HEAD, map(row, self.results))] if self.results else []
        return "\n\n".join(faults + ([overload.report(*self.overloaded)] if self.overloaded else []))

    @property
    def missed(self) -> list[str]:
        """What must not be."""
        bad = any(result.outcomes[outcome] for result in self.results for outcome in BAD)
        told = ["streams failed or were altered"] if bad else []
        return told + (overload.missed(*self.overloaded) if self.overloaded else [])


@click.command(context_settings={"show_default": True})
@click.option("--only", default="", help="Rows whose name contains this.")
@click.option("--overload", "overload_s", default=60.0, help="How long the overload lasts (seconds).")
@click.option("--churn", "churn_s", type=float, help="In place of the rows: one fault after the other.")
def main(only: str, overload_s: float, churn_s: float | None) -> None:
    """What clients notice of faults, and of twice the load that is sustained.

    40 streams a second of 60 tokens on four replicas, a fault on one; the overload is on slower ones.
    """
    faults = [fault for fault in FAULTS if only in fault.name]
    if churn_s is not None or only not in overload.NAME:
        overload_s = 0.0
    if churn_s is not None:
        faults = [replace(CHURN, seconds=churn_s)]
    if not faults and not overload_s:
        names = ", ".join([*(fault.name for fault in FAULTS), overload.NAME])
        raise click.BadParameter(f"no row contains {only!r}: {names}")
    cores = Cores.of_machine()
    oracle = Oracle(demo_model.tokenizer_dir())
    found = run_bench(bench(faults, overload_s, oracle, cores), cores)
    click.echo(where(machine(cores)) + "\n\n" + found.report)
    if missed := found.missed:
        raise click.ClickException("; ".join(missed))


if __name__ == "__main__":
    main()
