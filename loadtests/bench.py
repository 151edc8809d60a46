"""What the benchmarks of routers have in common: which routers, on which cores, ready, on what machine."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import os
import platform
import signal
import sys
from collections.abc import Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import click
import httpx
import uvloop

from loadtests import account, contenders
from loadtests.contenders import DIRECT, Contender, Running
from loadtests.cpu import pinned

T = TypeVar("T")

READY_S = 60.0


class BenchFailed(Exception):
    """The benchmark cannot be run, or a router broke replies."""


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


def install_peers() -> None:
    """Makes the environments of the peers that have none yet."""
    for name, (version, _) in contenders.PEERS.items():
        if not contenders.installed(name):
            click.echo(f"installing {name} {version}", err=True)
            contenders.install(name)


def chosen(
    here: Sequence[Contender], names: str | None, also: Sequence[str] = ()
) -> tuple[list[Contender], bool]:
    """The routers of this run, and whether `direct` is among them; raises UsageError.

    `names`: a list with commas, all if None. `also`: more of them, as 'NAME=command {urls} {port}'.
    """
    known = [DIRECT, *(contender.name for contender in here)]
    wanted = names.split(",") if names else known
    if unknown := set(wanted) - set(known):
        raise click.UsageError(f"not on this machine: {', '.join(sorted(unknown))} (see --peers)")
    extra = [contenders.template(*pair.split("=", 1)) for pair in also]
    return [contender for contender in here if contender.name in wanted] + extra, DIRECT in wanted


async def ready(name: str, router: Running, model: str) -> None:
    """Waits until a request goes through the router; raises BenchFailed with the end of its log."""
    url = f"http://127.0.0.1:{router.port}/v1/chat/completions"
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}], "max_tokens": 1}
    deadline = asyncio.get_running_loop().time() + READY_S
    async with httpx.AsyncClient(trust_env=False, timeout=5) as client:
        while asyncio.get_running_loop().time() < deadline and router.alive:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.post(url, json=body)).status_code == 200:
                    return
            await asyncio.sleep(0.1)
    raise BenchFailed(f"{name} does not route requests. Its log ends:\n{router.log_tail}")


async def trusting(router: Running) -> None:
    """Waits until Herd knows all its engines' caches exactly; raises BenchFailed with why it does not."""
    deadline = asyncio.get_running_loop().time() + READY_S
    while lacking := await account.untrusted(f"http://127.0.0.1:{router.admin_port}"):
        if asyncio.get_running_loop().time() > deadline:
            raise BenchFailed(f"Herd does not know all caches exactly: {'; '.join(lacking)}")
        await asyncio.sleep(0.1)


def run_bench(bench: Coroutine[Any, Any, T], cores: Cores | None = None) -> T:
    """Runs a benchmark, on the core of the load if cores are told apart.

    On SIGTERM it ends, and with it all that it started.
    """
    try:
        with pinned({cores.load}) if cores else contextlib.nullcontext():
            return uvloop.run(_cancelled_by_signal(bench))
    except asyncio.CancelledError:
        sys.exit(128 + signal.SIGTERM)
    except BenchFailed as error:
        raise click.ClickException(str(error)) from None


async def _cancelled_by_signal(bench: Coroutine[Any, Any, T]) -> T:
    task = asyncio.current_task()
    assert task is not None
    # An exception from a signal handler could land in any callback; cancelled, everything started is ended.
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    return await bench
