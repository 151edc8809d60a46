"""The connections benchmark: what an idle keep-alive client costs a router, in memory and in CPU.

Every connection makes one small request and then rests. Memory is what the router's process grew by since it
had served as many requests on one connection; the kernel's own memory for sockets is not in it, nor in any
process. Run through `scripts/bench connections`.
"""

from __future__ import annotations

import asyncio
import contextlib
import resource
from dataclasses import dataclass

import click

from loadtests import contenders, generator, mock_engine
from loadtests.bench import BenchFailed, Cores, machine, ready, run_bench
from loadtests.bench_relay import engines
from loadtests.contenders import Contender, Running
from loadtests.cpu import cpu_seconds, rss_bytes
from loadtests.report import table

REPLY_S = 10.0
# Files that a process has open beside its connections.
SPARE_FILES = 200
# How long what came last may still be at work, a sweep of the router included.
SETTLE_S = 3.0


@dataclass(frozen=True, slots=True)
class Sample:
    """One router with so many clients at rest."""

    router: str
    connections: int
    rss_mb: float
    bytes_each: float
    cpu_ms_per_s: float


class Client:
    """A kept connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self.writer = writer

    async def ask(self, request: bytes) -> None:
        """One request and its whole reply; raises BenchFailed for any other reply."""
        self.writer.write(request)
        try:
            async with asyncio.timeout(REPLY_S):
                head = await self._reader.readuntil(b"\r\n\r\n")
                body = await self._reader.readexactly(int(generator.header(head, b"content-length") or 0))
            generator.check(head + body, mock_engine.text(1), stream=False)
        except (OSError, EOFError, TimeoutError, generator.BrokenReply) as error:
            raise BenchFailed(f"a connection was not served: {error!r}") from None


async def measure(name: str, router: Running, connections: int, seconds: float) -> Sample:
    """Opens the connections one by one, and watches the router while all of them rest."""
    request = generator.request(router.port, mock_engine.MODEL, stream=False)
    async with contextlib.AsyncExitStack() as stack:
        first = await opened(stack, router.port)
        for _ in range(connections):
            await first.ask(request)
        before = rss_bytes(router.pid)
        kept = []
        for _ in range(connections):
            kept.append(await opened(stack, router.port))
            await kept[-1].ask(request)
        await asyncio.sleep(SETTLE_S)
        after, cpu = rss_bytes(router.pid), cpu_seconds(router.pid)
        await asyncio.sleep(seconds)
        cpu = cpu_seconds(router.pid) - cpu
        for client in kept:  # none was closed, or its memory would not have been counted
            await client.ask(request)
    return Sample(name, connections, after / 1e6, (after - before) / connections, 1000 * cpu / seconds)


async def opened(stack: contextlib.AsyncExitStack, port: int) -> Client:
    """A connection that ends with the stack."""
    client = Client(*await asyncio.open_connection("127.0.0.1", port))
    stack.callback(client.writer.transport.abort)
    return client


async def bench(
    routers: list[Contender], counts: tuple[int, ...], seconds: float, cores: Cores
) -> list[Sample]:
    """Every router with every number of connections, each time in a new process."""
    samples = []
    with engines(chunks=1, core=cores.load) as (_, urls):
        for count in counts:
            for router in routers:
                with contenders.running(router, urls[:1], cores.router) as started:
                    await ready(router.name, started, mock_engine.MODEL)
                    samples.append(await measure(router.name, started, count, seconds))
    return samples


def allow_files(count: int) -> None:
    """Lets this process, and those it starts, have so many files open; raises BenchFailed."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    if most != resource.RLIM_INFINITY and count > most:
        raise BenchFailed(f"{count} open files are needed and {most} allowed (ulimit -n)")
    resource.setrlimit(resource.RLIMIT_NOFILE, (count, most))


def report(samples: list[Sample], where: dict[str, str]) -> str:
    """The samples as a table."""
    head = ["router", "idle connections", "KB each", "CPU ms/s while idle", "RSS MB"]
    rows = [_row(sample) for sample in samples]
    return f"{where['date']}, {where['cpu']}, Python {where['python']}.\n\n{table(head, rows)}"


def _row(sample: Sample) -> list[str]:
    kilobytes, rss = f"{sample.bytes_each / 1e3:.1f}", f"{sample.rss_mb:.0f}"
    return [sample.router, str(sample.connections), kilobytes, f"{sample.cpu_ms_per_s:.1f}", rss]


@click.command()
@click.option("--connections", "counts", type=click.IntRange(1), multiple=True, default=(1000, 8000))
@click.option("--seconds", default=5.0, show_default=True, help="How long all of them rest.")
@click.option("--also", multiple=True, help="One more router: 'NAME=command {urls} {port}'.")
def main(counts: tuple[int, ...], seconds: float, also: tuple[str, ...]) -> None:
    """Measure idle connections: memory for each, CPU for all of them."""
    routers = [
        Contender(contenders.HERD, contenders.herd()),
        *(contenders.template(*a.split("=", 1)) for a in also),
    ]
    cores = Cores.of_machine()
    try:
        allow_files(max(counts) + SPARE_FILES)
    except BenchFailed as error:
        raise click.ClickException(str(error)) from None
    samples = run_bench(bench(routers, counts, seconds, cores), cores)
    click.echo(report(samples, machine(cores)))


if __name__ == "__main__":
    main()
