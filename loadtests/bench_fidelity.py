"""How near the twin is to what it stands for: one trace in virtual time and over real sockets.

Live: simulated engines (`herd engine simulated`) behind `herd route`, on this machine. Both sides get the
same requests at the same times, on engines with the same clock and cache, placed by the same policy. What
the twin leaves out is HTTP, and processes that wait for each other. Run through `scripts/bench fidelity`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import click
import httpx
import msgspec
import uvloop

from loadtests import contenders
from loadtests.cpu import cpu_seconds
from loadtests.outcomes import Outcome, Summary, summarize
from loadtests.report import table
from loadtests.trace import BLOCK_TOKENS, Arrival, compress, read, spread
from loadtests.twin import Setting, core_policy, simulate
from router.config import Slo
from router.core.placement import POLICIES
from workers.demo_model import VOCABULARY
from workers.simulated.options import Options

TRACE = Path(__file__).parent / "traces" / "conversation.jsonl.gz"
MODEL = "herd-demo"
FIRST_ID = 3  # those before it are special
READY_S = 60.0
# Between the start of the live side and its first request.
HEAD_START_S = 0.2
# How far the figures may lie apart.
TOLERANCE = 0.05

CONTEXT_TOKENS = 131_072  # more than the demo model has: no request of the trace is longer
READ_BYTES = 1 << 16
CACHED = re.compile(rb'"cached_tokens":\s*(\d+)')

FIGURES: dict[str, Callable[[Summary], float]] = {
    "TTFT p50": lambda summary: summary.ttft_p50,
    "TTFT p90": lambda summary: summary.ttft_p90,
    "hit rate": lambda summary: summary.hit,
}
# These tell more, but are not judged: one request decides the last percent.
BESIDE: dict[str, Callable[[Summary], float]] = {
    "TTFT p99": lambda summary: summary.ttft_p99,
    "TPOT p50": lambda summary: summary.tpot_p50,
    "TPOT p99": lambda summary: summary.tpot_p99,
}


class CheckFailed(Exception):
    """The check cannot be run."""


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared: a slice of `seconds`, at the load per replica that 8 have at `load` times the trace's
    speed, on engines that run at `clock` times the modelled speed."""

    policy: str
    replicas: int
    seconds: float
    load: float
    clock: float
    seed: int

    @property
    def engine(self) -> Options:
        """What both sides run."""
        return Options(block_size=BLOCK_TOKENS, speed=self.clock)

    def arrivals(self) -> list[Arrival]:
        """The requests."""
        speed = self.load * self.clock * self.replicas / 8
        arrivals = compress(spread(read(TRACE), Random(self.seed)), speed)
        return [arrival for arrival in arrivals if arrival.at < self.seconds]


@dataclass(frozen=True, slots=True)
class Sides:
    """The figures of both, and the CPU seconds that the live side used for each second."""

    live: Summary
    twin: Summary
    cores: float

    def apart(self, figure: Callable[[Summary], float]) -> float:
        """By how much of the live figure the twin's differs."""
        live, twin = figure(self.live), figure(self.twin)
        return abs(twin / live - 1) if live else float(twin != live)

    @property
    def faithful(self) -> bool:
        """Whether all figures are near enough."""
        return all(self.apart(figure) <= TOLERANCE for figure in FIGURES.values())


def prompt(arrival: Arrival) -> list[int]:
    """Token ids that share what the trace says: each block's come from its id."""
    ids = [token for id in arrival.hash_ids for token in _block(id)]
    return ids[: arrival.input_length]


def _block(id: int) -> list[int]:
    return Random(id).choices(range(FIRST_ID, VOCABULARY), k=BLOCK_TOKENS)


def body(arrival: Arrival) -> bytes:
    """A completion request as long as the trace's, its output too."""
    return msgspec.json.encode(
        {
            "model": MODEL,
            "prompt": prompt(arrival),
            "max_tokens": arrival.output_length,
            "ignore_eos": True,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,  # a token that is half a character has no text, but an event then
        }
    )


# -- live


@contextlib.contextmanager
def processes() -> Iterator[Callable[..., subprocess.Popen[bytes]]]:
    """Gives a function that starts one; all end with the block."""
    with tempfile.TemporaryDirectory(prefix="herd-fidelity-") as folder, contextlib.ExitStack() as stack:

        def start(*argv: str) -> subprocess.Popen[bytes]:
            log = stack.enter_context((Path(folder) / f"log-{time.monotonic_ns()}").open("wb"))
            process = subprocess.Popen(argv, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
            stack.callback(contenders.end, process)
            return process

        yield start


async def answers(url: str, process: subprocess.Popen[bytes]) -> None:
    """Waits until a process says that it is ready. CheckFailed if it never does."""
    deadline = time.monotonic() + READY_S
    async with httpx.AsyncClient(trust_env=False, verify=False) as client:
        while time.monotonic() < deadline and process.poll() is None:
            with contextlib.suppress(httpx.HTTPError):
                if (await client.get(url)).status_code == 200:
                    return
            await asyncio.sleep(0.1)
    raise CheckFailed(f"no answer from {url}")


async def live(plan: Plan, arrivals: Sequence[Arrival], setting: Setting) -> tuple[list[Outcome], float]:
    """Outcomes over real sockets, and how many cores the fleet kept busy."""
    bodies = [body(arrival) for arrival in arrivals]
    async with contextlib.AsyncExitStack() as stack:
        start = stack.enter_context(processes())
        ports = [contenders.free_port() for _ in range(plan.replicas)]
        engines = [start(*engine_command(plan, port)) for port in ports]
        urls = [f"http://127.0.0.1:{port}" for port in ports]
        for url, engine in zip(urls, engines, strict=True):
            await answers(f"{url}/health", engine)
        port = contenders.free_port()
        router = start(*contenders.herd(urls, port, Path()), "--policy", plan.policy)
        await answers(f"http://127.0.0.1:{port}/ready", router)
        clients = [Client(port, setting.unloaded_s(arrival.input_length), arrival) for arrival in arrivals]
        began, used = time.monotonic() + HEAD_START_S, busy_s(router, *engines)
        asked = (client.ask(body, began) for client, body in zip(clients, bodies, strict=True))
        outcomes = await asyncio.gather(*asked)
        return outcomes, (busy_s(router, *engines) - used) / (time.monotonic() - began)


def engine_command(plan: Plan, port: int) -> list[str]:
    """`plan.engine` as a process."""
    flags = f"--port {port} --block-size {BLOCK_TOKENS} --speed {plan.clock} --max-model-len {CONTEXT_TOKENS}"
    name = ("--served-model-name", MODEL, "--enable-prompt-tokens-details")
    return [sys.executable, "-m", "workers.simulated", *name, *flags.split()]


def busy_s(*processes: subprocess.Popen[bytes]) -> float:
    """CPU seconds that they have used."""
    return sum(cpu_seconds(process.pid) for process in processes)


@dataclass(frozen=True, slots=True)
class Client:
    """Sends one request when it is due, on a connection of its own."""

    port: int
    unloaded: float
    arrival: Arrival

    async def ask(self, body: bytes, began: float) -> Outcome:
        """What became of it. CheckFailed if the reply is not whole."""
        due = began + self.arrival.at
        await asyncio.sleep(due - time.monotonic())
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(
            f"POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
            f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        reply, first = bytearray(), 0.0
        while read := await reader.read(READ_BYTES):
            reply += read
            if not first and b"data: " in reply:
                first = time.monotonic()
        writer.close()
        return self._outcome(bytes(reply), first - due, time.monotonic() - first)

    def _outcome(self, reply: bytes, ttft: float, rest: float) -> Outcome:
        cached = CACHED.search(reply)
        if not reply.startswith(b"HTTP/1.1 200 ") or b"data: [DONE]" not in reply or cached is None:
            raise CheckFailed(f"a reply is not whole: {reply[:500]!r} ... {reply[-500:]!r}")
        outcome = Outcome(self.arrival, self.unloaded, "live", 0, 1.0, ttft)
        outcome.tpot = rest / max(1, self.arrival.output_length - 1)
        outcome.reported = int(cached[1])
        return outcome


# -- both


async def compare(plan: Plan) -> Sides:
    """Runs both. CheckFailed if the live side breaks."""
    arrivals = plan.arrivals()
    setting = Setting(plan.engine.engine_config(), plan.replicas)
    run = simulate(arrivals, setting, core_policy(POLICIES[plan.policy]), plan.seed)
    outcomes, cores = await live(plan, arrivals, setting)
    return Sides(summarize(outcomes, Slo()), summarize(run.outcomes, Slo()), cores)


def report(sides: Sides) -> str:
    """A table of both, a row per figure."""
    rows = [
        [name, f"{of(sides.live):.4f}", f"{of(sides.twin):.4f}", f"{100 * sides.apart(of):.1f} %"]
        for name, of in {**FIGURES, **BESIDE}.items()
    ]
    return table(["", "live", "twin", "apart"], rows)


@click.command(context_settings={"show_default": True})
@click.option("--policy", type=click.Choice(list(POLICIES)), default="least_requests")
@click.option("--replicas", default=3, help="Engines; each of them and the router needs some CPU.")
@click.option("--seconds", default=75.0, help="How long requests come.")
@click.option("--load", default=1.5, help="That of 8 replicas at so many times the trace's speed.")
@click.option("--clock", default=2.0, help="The engines' clock; a slower one leaves each token more CPU.")
@click.option("--seed", default=0)
def main(**options: object) -> None:
    """The twin beside live simulated engines; exit code 1 if a figure is more than 5 % apart."""
    plan = Plan(**options)  # type: ignore[arg-type]
    try:
        sides = uvloop.run(compare(plan))
    except CheckFailed as error:
        raise click.ClickException(str(error)) from None
    click.echo(
        f"{sides.live.requests} requests, {plan.replicas} engines at {plan.clock:g} x their speed, "
        f"{plan.policy}; the live side kept {sides.cores:.2f} cores busy\n\n{report(sides)}"
    )
    sys.exit(0 if sides.faithful else 1)


if __name__ == "__main__":
    main()
