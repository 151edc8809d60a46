"""Engines behind a benchmark, started as a replica starts them."""

from __future__ import annotations

import asyncio
import contextlib
import tempfile
from collections.abc import AsyncIterator, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from loadtests.bench import BenchFailed
from workers.engine import DEMO, Engine, EngineSpec, make_engine
from workers.process import EngineProcess
from workers.vllm_engine import VllmNotFoundError

MODEL = "bench"
# vLLM on a CPU that others use too.
STARTUP_S = 300.0
LOG_CHARACTERS = 2000
LOG_CHARACTERS = 2000


@contextlib.asynccontextmanager
async def running(
    count: int,
    engine_args: Mapping[str, Any],
    kind: Literal["vllm", "simulated"] = "simulated",
    source: str = DEMO,
) -> AsyncIterator[list[EngineProcess]]:
    """Engines with KV events that report cached tokens; ended on leaving. Raises BenchFailed."""
    try:
        engine = make_engine(
            EngineSpec(engine=kind, name=MODEL, source=source, engine_args=dict(engine_args))
        )
    except VllmNotFoundError as error:
        raise BenchFailed(str(error)) from None
    started: list[EngineProcess] = []
    with tempfile.TemporaryDirectory(prefix="herd-bench-") as folder:
        try:
            await _start(engine, [Path(folder) / f"log-{number}" for number in range(count)], started)
            yield started
        except Exception as error:
            if dead := [process for process in started if not process.alive()]:
                told = dead[0].log_tail()[-LOG_CHARACTERS:]
                raise BenchFailed(f"an engine ended ({error!r}). Its log ends:\n{told}") from error
            raise
        finally:
            for process in started:
                await process.kill()


async def _start(engine: Engine, logs: Iterable[Path], started: list[EngineProcess]) -> None:
    async def one(log: Path) -> None:
        started.append(await EngineProcess.start(engine, log, STARTUP_S))

    try:
        async with asyncio.TaskGroup() as group:
            for log in logs:
                group.create_task(one(log))
    except ExceptionGroup as errors:
        raise BenchFailed(str(errors.exceptions[0])) from None
