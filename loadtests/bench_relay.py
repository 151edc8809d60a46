"""The relay benchmark: what a router costs per chunk and per request, Herd beside its peers.

The routers run on one core, one at a time under load; the generator and the mock engines share the other.
Each load goes to each router in turn, then all again, because a shared machine drifts. CPU per chunk is the
figure to trust; times depend on everything else that runs. Run through `scripts/bench relay`.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import datetime
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import httpx
import msgspec
import uvloop

from loadtests import contenders, generator, mock_engine
from loadtests.contenders import DIRECT, Contender, Running
from loadtests.cpu import cpu_seconds, pinned, rss_bytes
from loadtests.report import SMALL, Run, cost_us, relay_report

ENGINES = 4
READY_S = 60.0
# Connections to the engines are open and code is warm after this long.
SETTLE_S = 0.5


class BenchFailed(Exception):
    """The benchmark cannot be run, or a router broke replies."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured: streams at a time, kept connections for small requests, seconds per measurement."""

    streams: tuple[int, ...]
    connections: int
    chunks: int
    seconds: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Cores:
    """One core for the router, one for everything else; the same one on a machine with a single core."""

    router: int
    load: int

    @classmethod
    def of_machine(cls) -> Cores:
        """The first two that this process may use."""
        usable = sorted(os.sched_getaffinity(0))
        return cls(usable[0], usable[1] if len(usable) > 1 else usable[0])


@dataclass(frozen=True, slots=True)
class Target:
    """What is measured: a port, and the process tree whose CPU counts."""

    port: int
    pid: int


def loads(plan: Plan, port: int) -> dict[str, generator.Load]:
    """Every load of the plan, against a router on this port."""
    ask = partial(generator.request, port, mock_engine.MODEL)
    length_s = plan.chunks * mock_engine.STEP_S
    small = generator.Load(ask(stream=False), plan.connections, SETTLE_S, mock_engine.text(1), stream=False)
    said = mock_engine.text(plan.chunks)
    # Streams begin one by one over the length of a stream, so that afterwards as many end as begin.
    streams = {
        f"stream {n}": generator.Load(ask(stream=True), n, length_s, said, stream=True) for n in plan.streams
    }
    return {SMALL: small, **streams}


@contextlib.contextmanager
def engines(chunks: int, core: int) -> Iterator[tuple[int, list[str]]]:
    """Mock engines on a core: their process, and their URLs."""
    command = [sys.executable, "-m", "loadtests.mock_engine", f"--engines={ENGINES}", f"--chunks={chunks}"]
    with pinned({core}):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, start_new_session=True)
    assert process.stdout is not None
    try:
        urls = [process.stdout.readline().decode().strip() for _ in range(ENGINES)]
        if not all(urls):
            raise BenchFailed("the mock engines did not start")
        yield process.pid, urls
    finally:
        contenders.end(process)
        process.stdout.close()


async def ready(name: str, router: Running) -> None:
    """Waits until a request goes through the router; raises BenchFailed with the end of its log."""
    url = f"http://127.0.0.1:{router.port}/v1/chat/completions"
    body = {"model": mock_engine.MODEL, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    deadline = asyncio.get_running_loop().time() + READY_S
    async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
        while asyncio.get_running_loop().time() < deadline and router.alive:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.post(url, json=body)).status_code == 200:
                    return
            await asyncio.sleep(0.1)
    raise BenchFailed(f"{name} does not route requests. Its log ends:\n{router.log_tail}")


async def measure(name: str, kind: str, load: generator.Load, plan: Plan, router: Target) -> generator.Sample:
    """One load against one router."""
    try:
        return await generator.run(load, router.port, plan.seconds, partial(cpu_seconds, router.pid))
    except (generator.BrokenReply, OSError) as error:
        raise BenchFailed(f"{name}, {kind}: {error}") from None


async def bench(plan: Plan, routers: list[Contender], direct: bool, cores: Cores) -> list[Run]:
    """All rounds. `direct` also measures the engines without a router; its CPU is that of the engines."""
    task = asyncio.current_task()
    assert task is not None
    # An exception from a signal handler could land in any callback; cancelled, everything started is ended.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    with contextlib.ExitStack() as stack:
        engines_pid, urls = stack.enter_context(engines(plan.chunks, cores.load))
        targets = {DIRECT: Target(int(urls[0].rpartition(":")[2]), engines_pid)} if direct else {}
        for router in routers:
            running = stack.enter_context(contenders.running(router, urls, cores.router))
            await ready(router.name, running)
            targets[router.name] = Target(running.port, running.pid)
        return [run for n in range(plan.rounds) for run in await one_round(n, plan, targets)]


async def one_round(number: int, plan: Plan, targets: dict[str, Target]) -> list[Run]:
    """Each load on each router in turn, so that what is compared was measured within seconds."""
    samples: dict[str, dict[str, generator.Sample]] = {name: {} for name in targets}
    for kind in loads(plan, port=0):
        for name, target in targets.items():
            load = loads(plan, target.port)[kind]
            samples[name][kind] = await measure(name, kind, load, plan, target)
    runs = [Run(name, number, rss_bytes(target.pid), samples[name]) for name, target in targets.items()]
    for run in runs:
        _tell(run)
    return runs


def _tell(run: Run) -> None:
    costs = ", ".join(f"{name} {cost_us(name, sample):.1f} us" for name, sample in run.samples.items())
    click.echo(f"round {run.round + 1}, {run.router}: {costs}", err=True)


def broken(runs: list[Run]) -> list[str]:
    """One line per measurement in which a reply was not what the engines had sent."""
    return [
        f"{run.router}, {name}: {'; '.join(sample.broken)}"
        for run in runs
        for name, sample in run.samples.items()
        if sample.broken
    ]


def machine(cores: Cores) -> dict[str, str]:
    """What the figures were measured on."""
    named = [line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")]
    model = named[0].partition(":")[2].strip() if named else platform.machine()
    shared = " (one core only: the load ran on the router's)" if cores.router == cores.load else ""
    return {
        "date": datetime.date.today().isoformat(),
        "cpu": f"{model}, {os.cpu_count()} cores{shared}",
        "kernel": platform.release(),
        "python": platform.python_version(),
    }


def _numbers(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 64,256") from None


def _chosen(names: str | None, also: tuple[str, ...]) -> tuple[list[Contender], bool]:
    """The routers of this run, and whether `direct` is among them."""
    here = contenders.contenders()
    wanted = names.split(",") if names else [DIRECT, *(c.name for c in here)]
    unknown = set(wanted) - {DIRECT, *(c.name for c in here)}
    if unknown:
        raise click.UsageError(f"not on this machine: {', '.join(sorted(unknown))} (see --peers)")
    extra = [contenders.template(*pair.split("=", 1)) for pair in also]
    return [c for c in here if c.name in wanted] + extra, DIRECT in wanted


@click.command()
@click.option("--streams", default="64,256", show_default=True, callback=_numbers, help="Streams at a time.")
@click.option("--connections", default=32, show_default=True, help="Connections with small requests.")
@click.option("--chunks", default=200, show_default=True, help="Chunks per stream, one every 10 ms.")
@click.option("--seconds", default=4.0, show_default=True, help="Length of one measurement.")
@click.option("--rounds", default=3, show_default=True)
@click.option("--routers", default=None, help="Only these, e.g. direct,herd; default: all that are here.")
@click.option("--also", multiple=True, help="One more: 'NAME=command {urls} {port}'.")
@click.option("--peers", is_flag=True, help=f"First install {', '.join(contenders.PEERS)}.")
@click.option("--json", "json_file", type=click.Path(dir_okay=False, path_type=Path), help="All samples.")
def main(
    streams: tuple[int, ...], connections: int, chunks: int, seconds: float, rounds: int,
    routers: str | None, also: tuple[str, ...], peers: bool, json_file: Path | None,
) -> None:  # fmt: skip
    """Compare routers: CPU per chunk and per request, added time to first token, memory."""
    for name in contenders.PEERS if peers else ():
        if not contenders.installed(name):
            click.echo(f"installing {name} {contenders.PEERS[name][0]}", err=True)
            contenders.install(name)
    chosen, direct = _chosen(routers, also)
    plan = Plan(streams, connections, chunks, seconds, rounds)
    cores = Cores.of_machine()
    try:
        with pinned({cores.load}):
            runs = uvloop.run(bench(plan, chosen, direct, cores))
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)
    except BenchFailed as error:
        raise click.ClickException(str(error)) from None
    if json_file:
        result = {"machine": machine(cores), "plan": dataclasses.asdict(plan), "runs": runs}
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    click.echo(relay_report(runs, machine(cores)))
    if faults := broken(runs):
        raise click.ClickException("replies were broken:\n" + "\n".join(faults))


if __name__ == "__main__":
    main()
