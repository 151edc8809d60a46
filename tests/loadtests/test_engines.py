"""Engines behind a benchmark: an end of one of them is told with its cause."""

import asyncio
import os
import signal

import httpx
import pytest

from loadtests import account, engines
from loadtests.bench import BenchFailed


def test_an_engine_that_ends_fails_the_benchmark_with_its_log() -> None:
    async def end_one() -> None:
        async with engines.running(1, {"speed": 100}) as (engine,):
            assert (await account.counted([engine.url]))["vllm:num_requests_running"] == 0
            os.kill(engine.pid, signal.SIGKILL)
            await engine.wait()
            await account.counted([engine.url])

    with pytest.raises(BenchFailed, match="an engine ended") as failure:
        asyncio.run(end_one())
    assert isinstance(failure.value.__cause__, httpx.ConnectError)


def test_an_engine_that_does_not_start_fails_the_benchmark() -> None:
    async def start() -> None:
        async with engines.running(1, {"block-size": 0}):
            raise AssertionError("it started")

    with pytest.raises(BenchFailed, match="--block-size must be at least 1"):
        asyncio.run(start())
