"""One replica on Ray Serve: an actor that owns an engine process, says where it is, and restarts with it.

Serve sees the actor only; requests go to the engine's own port. When the engine dies the health check fails
and Serve starts a new replica, with a new id. When this process dies the supervisor ends the engine.
"""

from __future__ import annotations

import asyncio
import re
from pathlib import Path
from typing import Any

import ray
from ray import serve

from workers.engine import EngineSpec, make_engine
from workers.process import EngineProcess

# Loading weights from a slow disk takes minutes; a start that hangs still has to end.
STARTUP_TIMEOUT_S = 1800.0


class EngineDiedError(Exception):
    """The engine process ended by itself."""


class Replica:
    """A deployment of one model: each instance is one engine.

    `drain_s`: what a leaving engine may take to finish its streams; an idle one leaves at once.
    """

    async def __init__(self, spec: dict[str, Any], drain_s: float) -> None:
        self._spec = EngineSpec.model_validate(spec)
        self._drain_s = drain_s
        # The node's address: the loopback one where the whole cluster stays on it.
        self._engine = make_engine(self._spec)
        starting = EngineProcess.start(
            self._engine,
            log_path(self._spec.name),
            STARTUP_TIMEOUT_S,
            host=ray.util.get_node_ip_address(),
        )
        self._starting = asyncio.ensure_future(starting)
        self._process = await self._starting

    def record_replica_metadata(self) -> dict[str, Any]:
        """What Serve tells every holder of a handle when this replica is ready."""
        return {
            "url": self._process.url,
            "model": self._spec.name,
            "engine": self._engine.kind,
            "kv_events": self._process.kv_events,
            "kv_replay": self._process.kv_replay,
            "pid": self._process.pid,
        }

    async def check_health(self) -> None:
        """Raises when the engine is gone; Serve then replaces this replica."""
        if not self._process.alive():
            raise EngineDiedError(f"the engine of {self._spec.name} (process {self._process.pid}) ended")

    async def __del__(self) -> None:
        """Serve awaits this before it ends the actor, even while that starts: the engine leaves first."""
        self._starting.cancel()  # a start that is over does not mind
        await asyncio.wait({self._starting})
        if not self._starting.cancelled() and self._starting.exception() is None:
            await self._starting.result().stop(self._drain_s)


def log_path(model: str) -> Path:
    """The engine's log, where Ray's dashboard lists the files of a session."""
    # The node keeps this path private; Serve's own replicas read it the same way.
    folder = Path(ray._private.worker._global_node.get_logs_dir_path())
    replica = serve.get_replica_context().replica_id.unique_id
    return folder / f"engine-{slug(model)}-{replica}.log"


def slug(model: str) -> str:
    """A model's name as part of a file or deployment name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-")
