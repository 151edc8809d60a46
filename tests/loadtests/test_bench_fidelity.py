"""The fidelity check: what it asks of both sides, and a short one over real sockets."""

from __future__ import annotations

import asyncio
from dataclasses import replace

import pytest

from loadtests.bench import BenchFailed
from loadtests.bench_fidelity import Client, Plan, Sides, compare, prompt
from loadtests.outcomes import Summary
from loadtests.trace import Arrival

SUMMARY = Summary(100, 0, 1.0, 1.0, 0.2, 1.0, 3.0, 0.01, 0.02, 0.1, 1.0, 1.0)
SHORT = Plan("round_robin", replicas=2, seconds=6, load=1.5, clock=2, seed=1)


def test_prompts_share_what_their_blocks_share() -> None:
    one = prompt(Arrival(0.0, 1100, 1, [1, 2, 3]))
    other = prompt(Arrival(0.0, 2048, 1, [1, 2, 4, 3]))
    assert (len(one), len(other)) == (1100, 2048)
    assert one[:1024] == other[:1024]
    assert one[1024:] == other[1536:1612] != other[1024:1100]


@pytest.mark.parametrize(
    ("changed", "faithful"),
    [
        ({"ttft_p50": 0.209, "ttft_p90": 0.951, "hit": 0.104}, True),
        ({"ttft_p50": 0.212}, False),
        ({"ttft_p90": 0.94}, False),
        ({"hit": 0.11}, False),
        ({"ttft_p99": 9.0}, True),
    ],
)
def test_five_percent_apart_is_near_enough(changed: dict[str, float], faithful: bool) -> None:
    assert Sides(SUMMARY, replace(SUMMARY, **changed)).faithful is faithful


def test_what_chance_makes_of_the_twin_is_near_enough() -> None:
    far, farther = (replace(SUMMARY, ttft_p90=p90) for p90 in (0.9, 0.8))
    assert Sides(SUMMARY, far, [farther, replace(SUMMARY, ttft_p90=1.1)]).faithful
    assert not Sides(SUMMARY, far, [farther]).faithful


def test_a_reply_that_is_not_whole_fails_the_check() -> None:
    async def refuse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 503 Service Unavailable\r\ncontent-length: 0\r\n\r\n")
        writer.close()

    async def ask() -> None:
        async with await asyncio.start_server(refuse, "127.0.0.1", 0) as server:
            port = server.sockets[0].getsockname()[1]
            await Client(port, Arrival(0.0, 5, 5, [1]), 1.0).ask(b"", asyncio.get_running_loop().time())

    with pytest.raises(BenchFailed, match="503"):
        asyncio.run(ask())


def test_in_short_the_twin_is_near_the_live_fleet() -> None:
    """Wide bounds: a dozen requests on a machine that other tests share. `scripts/bench fidelity` has 5 %."""
    sides = asyncio.run(compare(SHORT))
    assert sides.live.requests == sides.twin.requests > 10
    assert sides.live.ttft_p90 == pytest.approx(sides.twin.ttft_p90, rel=0.3)
    assert sides.live.tpot_p50 == pytest.approx(sides.twin.tpot_p50, rel=0.3)
    assert sides.live.hit == pytest.approx(sides.twin.hit, rel=0.3)
    assert sides.live.hit > 0
