"""How near the twin is to what it stands for: one trace in virtual time and over real sockets.

Live: simulated engines behind `herd route`, on this machine. Both sides get the same requests at the same
times, on engines with the same clock and cache, placed by the same policy. What the twin leaves out is HTTP,
and processes that wait for each other. Run through `scripts/bench fidelity`.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import click
import httpx
import msgspec

from loadtests import contenders, engines
from loadtests.bench import READY_S, BenchFailed, run_bench
from loadtests.contenders import HERD, Contender, Running
from loadtests.outcomes import Outcome, Summary, summarize
from loadtests.report import table
from loadtests.trace import BLOCK_TOKENS, Arrival, compress, read, spread
from loadtests.twin import Lined, Setting, core_policy, simulate
from router.core.placement import POLICIES
from router.slo import Slo
from workers.command import flags
from workers.demo_model import VOCABULARY
from workers.simulated import options

TRACE = Path(__file__).parent / "traces" / "conversation.jsonl.gz"
FIRST_ID = 3  # of the demo model's vocabulary; those before it are special
# How long the live side waits for the first request, once all is ready.
HEAD_START_S = 0.2
READ_BYTES = 1 << 16
CACHED = re.compile(rb'"cached_tokens":\s*(\d+)')
# How far the figures may lie apart.
TOLERANCE = 0.05
# A policy that weighs seconds may choose otherwise for a few milliseconds, and from there on all is
# different. How far that goes is seen in runs of the twin whose requests come up to so much later.
MOVED_S = 0.01
MOVED_RUNS = 20

Figure = Callable[[Summary], float]
FIGURES: Mapping[str, Figure] = {
    "TTFT p50 s": lambda summary: summary.ttft_p50,
    "TTFT p90 s": lambda summary: summary.ttft_p90,
    "hit rate": lambda summary: summary.hit,
}
# These tell more, but are not judged: one request decides the last percent.
BESIDE: Mapping[str, Figure] = {
    "TTFT p99 s": lambda summary: summary.ttft_p99,
    "TPOT p50 s": lambda summary: summary.tpot_p50,
    "TPOT p99 s": lambda summary: summary.tpot_p99,
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What is compared: `seconds` of the trace, on engines that are `clock` times as fast as modelled.

    Each replica has the load that it would have among 8, at `load` times the trace's speed.
    """

    policy: str
    replicas: int
    seconds: float
    load: float
    clock: float
    seed: int

    @property
    def engine_args(self) -> dict[str, float]:
        """Of the engines on both sides; the trace has longer requests than the demo model takes."""
        context = options.DEFAULT_MAX_MODEL_LEN
        return {"block-size": BLOCK_TOKENS, "speed": self.clock, "max-model-len": context}

    @property
    def setting(self) -> Setting:
        """The twin's side."""
        return Setting(options.read(flags(self.engine_args)).engine_config(), self.replicas)

    def arrivals(self) -> list[Arrival]:
        """The requests: of a fleet of 8, the conversations that fall to so many replicas."""
        ours = [arrival for arrival in read(TRACE) if _chance_of(arrival) < self.replicas / 8]
        arrivals = compress(spread(ours, Random(self.seed)), self.load * self.clock)
        return [arrival for arrival in arrivals if arrival.at < self.seconds]


def _chance_of(arrival: Arrival) -> float:
    """From 0 to 1, the same for all turns of a conversation: many share a first block, not the second."""
    return Random(arrival.hash_ids[:2][-1]).random()


@dataclass(frozen=True, slots=True)
class Sides:
    """The figures of both; `moved`: of the twin, when the same requests come a few milliseconds later."""

    live: Summary
    twin: Summary
    moved: Sequence[Summary] = ()

    def apart(self, figure: Figure) -> float:
        """By how much of the live figure the twin's differs."""
        live, twin = figure(self.live), figure(self.twin)
        return abs(twin / live - 1) if live else float(twin != live)

    def span(self, figure: Figure) -> tuple[float, float]:
        """The least and the most that the twin has."""
        figures = [figure(summary) for summary in (self.twin, *self.moved)]
        return min(figures), max(figures)

    def near(self, figure: Figure) -> bool:
        """Whether the twin is right: within the tolerance, or what chance makes of either side."""
        least, most = self.span(figure)
        return self.apart(figure) <= TOLERANCE or least <= figure(self.live) <= most

    @property
    def faithful(self) -> bool:
        """Whether all figures that are judged are near enough."""
        return all(map(self.near, FIGURES.values()))


async def compare(plan: Plan) -> Sides:
    """Runs both. Raises BenchFailed."""
    arrivals = plan.arrivals()
    moved = [virtual(plan, spread(arrivals, Random(n), MOVED_S)) for n in range(MOVED_RUNS)]
    outcomes = await live(plan, arrivals)
    return Sides(summarize(outcomes, Slo()), virtual(plan, arrivals), moved)


def virtual(plan: Plan, arrivals: Sequence[Arrival]) -> Summary:
    """The twin's side."""
    run = simulate(arrivals, plan.setting, Lined(core_policy(POLICIES[plan.policy])), plan.seed)
    return summarize(run.outcomes, Slo())


# -- live


async def live(plan: Plan, arrivals: Sequence[Arrival]) -> list[Outcome]:
    """What becomes of the requests over real sockets. Raises BenchFailed."""
    bodies = [body(arrival) for arrival in arrivals]  # not while the clock runs
    unloaded = plan.setting.unloaded_s
    herd = Contender(HERD, contenders.herd(plan.policy))
    async with engines.running(plan.replicas, plan.engine_args) as behind:
        with contenders.running(herd, [engine.url for engine in behind]) as router:
            await settled(router, plan.replicas)
            began = time.monotonic() + HEAD_START_S
            return await asyncio.gather(
                *(
                    Client(router.port, arrival, unloaded(arrival.input_length)).ask(body, began)
                    for arrival, body in zip(arrivals, bodies, strict=True)
                )
            )


async def settled(router: Running, replicas: int) -> None:
    """Waits until all replicas are ready. Raises BenchFailed.

    Without a request that tries it: where equals take turns, one more makes another run of it.
    """
    deadline = time.monotonic() + READY_S
    async with httpx.AsyncClient(trust_env=False) as client:
        while time.monotonic() < deadline and router.alive:
            with contextlib.suppress(httpx.HTTPError):
                told = await client.get(f"http://127.0.0.1:{router.admin_port}/fleet")
                if [replica["state"] for replica in told.json()["replicas"]] == ["ready"] * replicas:
                    return
            await asyncio.sleep(0.1)
    raise BenchFailed(f"the fleet does not become ready. The router's log ends:\n{router.log_tail}")


def body(arrival: Arrival) -> bytes:
    """A completion request as long as the trace's, its output too."""
    asked = {"model": engines.MODEL, "prompt": prompt(arrival), "max_tokens": arrival.output_length}
    stream = {"stream": True, "stream_options": {"include_usage": True}}
    # A token that is half a character has no text, and no event of its own unless ids are asked for.
    return msgspec.json.encode({**asked, **stream, "ignore_eos": True, "return_token_ids": True})


def prompt(arrival: Arrival) -> list[int]:
    """Token ids that share what the trace says: those of a block come from its id."""
    ids = [token for id in arrival.hash_ids for token in _block(id)]
    return ids[: arrival.input_length]


def _block(id: int) -> list[int]:
    return Random(id).choices(range(FIRST_ID, VOCABULARY), k=BLOCK_TOKENS)


@dataclass(frozen=True, slots=True)
class Client:
    """Sends one request when it is due, on a connection of its own."""

    port: int
    arrival: Arrival
    unloaded: float

    async def ask(self, body: bytes, began: float) -> Outcome:
        """What became of it. BenchFailed if the reply is not whole."""
        due = began + self.arrival.at
        await asyncio.sleep(due - time.monotonic())
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port)
        head = "POST /v1/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n"
        head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
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
            raise BenchFailed(f"a reply is not whole: {reply[:500]!r} ... {reply[-500:]!r}")
        tpot = rest / max(1, self.arrival.output_length - 1)
        return Outcome(self.arrival, self.unloaded, "", 0, 1.0, ttft, tpot, reported=int(cached[1]))


# -- the command


def report(sides: Sides) -> str:
    """A row per figure."""
    head = ["", "live", "twin", "apart", f"twin, requests moved by up to {1e3 * MOVED_S:g} ms"]
    return table(head, [_row(sides, name, of) for name, of in {**FIGURES, **BESIDE}.items()])


def _row(sides: Sides, name: str, of: Figure) -> list[str]:
    live, twin, least, most = (f"{value:.4f}" for value in (of(sides.live), of(sides.twin), *sides.span(of)))
    return [name, live, twin, f"{100 * sides.apart(of):.1f} %", f"{least}..{most}"]


@click.command(context_settings={"show_default": True})
@click.option("--policy", type=click.Choice(list(POLICIES)), default="least_requests")
@click.option("--replicas", default=3, help="Engines; each of them and the router needs some CPU.")
@click.option("--seconds", default=90.0, help="How long requests come.")
@click.option("--load", default=1.5, help="That of 8 replicas at so many times the trace's speed.")
@click.option("--clock", default=1.0, help="The engines' clock; a slower one leaves each token more CPU.")
@click.option("--seed", default=0)
def main(policy: str, replicas: int, seconds: float, load: float, clock: float, seed: int) -> None:
    """The twin beside live simulated engines.

    Exit code 1 if TTFT p50, p90 or hit rate are more than 5 % apart, and outside of what the twin has when
    the requests are moved a little.
    """
    plan = Plan(policy, replicas, seconds, load, clock, seed)
    sides = run_bench(compare(plan))
    click.echo(f"{sides.live.requests} requests, {replicas} engines at {clock:g} x their speed, {policy}\n")
    click.echo(report(sides))
    sys.exit(0 if sides.faithful else 1)


if __name__ == "__main__":
    main()
