"""The relay benchmark: what a router costs per chunk and per request, Herd beside its peers.

The routers run on one core, one at a time under load; the generator and the mock engines share the other.
Each load goes to each router in turn, then all again, because a shared machine drifts. CPU per chunk is the
figure to trust; times depend on everything else that runs. Run through `scripts/bench relay`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import click
import msgspec

from loadtests import contenders, generator, mock_engine
from loadtests.bench import BenchFailed, Cores, chosen, install_peers, machine, ready, run_bench
from loadtests.contenders import DIRECT, Contender
from loadtests.cpu import cpu_seconds, pinned, rss_bytes
from loadtests.report import SMALL, Run, cost_us, relay_report
from workers import demo_model

ENGINES = 4
# Like its peers' round robin, it looks at no prompt: what is measured is the relay.
POLICY = "least_requests"
# Beside it Herd by default, where it knows the tokenizer (mock engines care for no words):
# prompts are read, and all that is said is noted so that a stream can go on at another replica.
NOTING = "herd-noting"
# Connections to the engines are open and code is warm after this long.
SETTLE_S = 0.5


@dataclass(frozen=True, slots=True)
class Plan:
    """What is measured: streams at a time, kept connections for small requests, seconds per measurement."""

    streams: tuple[int, ...]
    connections: int
    chunks: int
    seconds: float
    rounds: int


@dataclass(frozen=True, slots=True)
class Target:
    """What is measured: a port, and the process tree whose CPU counts."""

    port: int
    pid: int


def loads(plan: Plan, port: int) -> dict[str, generator.Load]:
    """Every load of the plan, against a router on this port."""
    ask = partial(generator.request, port, mock_engine.MODEL)
    length_s = plan.chunks * mock_engine.STEP_S
    small = generator.same(ask(stream=False), mock_engine.text(1), plan.connections, SETTLE_S, stream=False)
    said = mock_engine.text(plan.chunks)
    # Streams begin one by one over the length of a stream, so that afterwards as many end as begin.
    streams = {
        f"stream {n}": generator.same(ask(stream=True), said, n, length_s, stream=True) for n in plan.streams
    }
    return {SMALL: small, **streams}


def noting() -> Contender:
    """Herd with `kv_aware`, whose streams are noted (router/continuation.py)."""
    tokenizer = str(demo_model.tokenizer_dir())
    return Contender(NOTING, contenders.herd("kv_aware", "--tokenizer", tokenizer))


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


async def measure(name: str, kind: str, load: generator.Load, plan: Plan, router: Target) -> generator.Sample:
    """One load against one router."""
    try:
        return await generator.run(load, [router.port], plan.seconds, partial(cpu_seconds, router.pid))
    except (generator.BrokenReply, OSError) as error:
        raise BenchFailed(f"{name}, {kind}: {error}") from None


async def bench(plan: Plan, routers: list[Contender], direct: bool, cores: Cores) -> list[Run]:
    """All rounds. `direct` also measures the engines without a router; its CPU is that of the engines."""
    with contextlib.ExitStack() as stack:
        engines_pid, urls = stack.enter_context(engines(plan.chunks, cores.load))
        targets = {DIRECT: Target(int(urls[0].rpartition(":")[2]), engines_pid)} if direct else {}
        for router in routers:
            running = stack.enter_context(contenders.running(router, urls, cores.router))
            await ready(router.name, running, mock_engine.MODEL)
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


def _numbers(context: click.Context, option: click.Parameter, value: str) -> tuple[int, ...]:
    try:
        return tuple(int(number) for number in value.split(","))
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a list of numbers such as 64,256") from None


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
    if peers:
        install_peers()
    herd, *others = contenders.contenders(contenders.herd(POLICY))
    routers_here, direct = chosen([herd, noting(), *others], routers, also)
    plan = Plan(streams, connections, chunks, seconds, rounds)
    cores = Cores.of_machine()
    runs = run_bench(bench(plan, routers_here, direct, cores), cores)
    if json_file:
        result = {"machine": machine(cores), "plan": dataclasses.asdict(plan), "runs": runs}
        json_file.write_bytes(msgspec.json.format(msgspec.json.encode(result)))
    click.echo(relay_report(runs, machine(cores)))
    if faults := broken(runs):
        raise click.ClickException("replies were broken:\n" + "\n".join(faults))


if __name__ == "__main__":
    main()
