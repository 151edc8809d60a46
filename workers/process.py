"""One engine process: started under a supervisor, ready once it generates a token, gone when its owner is."""

from __future__ import annotations

import asyncio
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import httpx

from workers.command import Address, Command
from workers.engine import Engine

SUPERVISOR = Path(__file__).with_name("supervisor.py")

# Above the ports of Ray's workers (10002 to 19999) and below those that Linux gives to outgoing connections
# (32768 and up): an engine binds its port seconds after it was chosen, and nobody should get it meanwhile.
PORTS = range(20000, 32768)

# How often a starting engine is asked whether it is ready.
PROBE_S = 0.1

# vLLM's front process outlives its engine process by two seconds.
DYING_S = 5.0

# vLLM's usage text for one bad argument is 22 KB, and the cause of a failed start can stand before it.
LOG_TAIL_BYTES = 256 * 1024


class EngineStartError(Exception):
    """The engine did not become ready. The message is one sentence for the operator."""


class EngineProcess:
    """A running engine and all that it has started, which ends with it, with this process, or by `stop`.

    `url` is its HTTP API, `pid` its own process id; `kv_events` and `kv_replay` are ZMQ endpoints, None where
    it has no events.
    """

    def __init__(self, command: Command, address: Address, log_path: Path) -> None:
        """Runs the command at once, in a running event loop; `start` also waits until it is ready."""
        self.url = address.url
        self.kv_events: str | None = None
        self.kv_replay: str | None = None
        self.pid = 0
        self.startup_s = 0.0
        self.log_path = log_path
        self._host = address.host
        self._exit: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._link, theirs = socket.socketpair()
        with theirs, log_path.open("ab") as log:
            self._log_start = log.tell()
            self._supervisor = subprocess.Popen(
                [sys.executable, "-I", "-S", SUPERVISOR, *command.argv],
                env=os.environ | command.env,
                stdin=theirs,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        self._link.setblocking(False)
        asyncio.get_running_loop().add_reader(self._link, self._read_link)

    @classmethod
    async def start(
        cls, engine: Engine, log_path: Path, startup_timeout_s: float, host: str = "127.0.0.1"
    ) -> EngineProcess:
        """An engine that has generated a token. `host` is where it listens and others reach it.

        Raises EngineStartError when it ends or the time is out; then, and on cancellation, nothing of it is
        left but its log.
        """
        began = time.monotonic()
        log_path.parent.mkdir(parents=True, exist_ok=True)
        address = Address(host, free_port(host))
        process = cls(engine.command(address), address, log_path)
        try:
            why = await process._become_ready(engine, startup_timeout_s)
        except BaseException:
            await process.kill()
            raise
        if why:
            await process.kill()
            name = f"the {engine.kind} engine of {engine.spec.name}"
            raise EngineStartError(f"{name} did not start: {why} (its log: {log_path})")
        process.startup_s = time.monotonic() - began
        return process

    def alive(self) -> bool:
        """Whether the engine still runs."""
        return self._supervisor.poll() is None

    async def wait(self) -> int:
        """The engine's exit status, when it has ended and nothing is left of it; 128 + n after signal n."""
        return await asyncio.shield(self._exit)

    async def stop(self, grace_s: float) -> int:
        """Asks it to finish what it has begun (SIGTERM), and kills all of it after `grace_s`."""
        if self.alive():
            self._supervisor.send_signal(signal.SIGTERM)
        await asyncio.wait([self._exit], timeout=grace_s)
        return await self.kill()

    async def kill(self) -> int:
        """Ends it and all that it started, now."""
        if not self._exit.done():
            self._link.shutdown(socket.SHUT_WR)
        return await self.wait()

    def log_tail(self) -> str:
        """The end of what this run has logged."""
        with self.log_path.open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._log_start, end - LOG_TAIL_BYTES))
            return log.read().decode(errors="replace")

    def _read_link(self) -> None:
        """First comes the engine's process id; the end comes when both supervisors have ended."""
        if told := self._link.recv(64):
            self.pid = int(told)
            return
        asyncio.get_running_loop().remove_reader(self._link)
        self._link.close()
        self._exit.set_result(self._supervisor.wait())

    async def _become_ready(self, engine: Engine, timeout_s: float) -> str | None:
        """None when it is ready, else why it never will be."""
        probing = asyncio.ensure_future(self._probe(engine.spec.name))
        try:
            await asyncio.wait({probing, self._exit}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
            if probing.done() and not isinstance(probing.exception(), httpx.TransportError):
                return probing.result()
            if probing.done():  # it broke in its first request, and may yet say why
                await asyncio.wait({self._exit}, timeout=DYING_S)
            return engine.explain(self._exit.result() if self._exit.done() else None, self.log_tail())
        finally:
            probing.cancel()

    async def _probe(self, model: str) -> str | None:
        """Asks until it is healthy, then for one token and for where its KV events are."""
        async with httpx.AsyncClient(base_url=self.url, trust_env=False, timeout=None) as client:
            while not await _healthy(client):
                await asyncio.sleep(PROBE_S)
            first = {"model": model, "prompt": "Hello", "max_tokens": 1}
            reply = await client.post("/v1/completions", json=first)
            if reply.status_code != httpx.codes.OK:
                return f"it answered a first request with status {reply.status_code}: {reply.text[:300]}"
            sources = await client.get("/kv_event_sources")
            events = sources.json().get("0", {}) if sources.is_success else {}
            self.kv_events = self._reachable(events.get("endpoint"))
            self.kv_replay = self._reachable(events.get("replay_endpoint"))
            return None

    def _reachable(self, endpoint: str | None) -> str | None:
        """An endpoint that is bound to any address, as others reach it."""
        return endpoint.replace("*", self._host) if endpoint else None


async def _healthy(client: httpx.AsyncClient) -> bool:
    try:
        return (await client.get("/health", timeout=5)).status_code == httpx.codes.OK
    except httpx.TransportError:
        return False


def free_port(host: str) -> int:
    """A TCP port that nobody listens on now."""
    for port in random.sample(PORTS, 64):
        with socket.socket() as probe:
            try:
                probe.bind((host, port))
            except OSError:
                continue
            return port
    raise EngineStartError(f"no free port on {host} between {PORTS.start} and {PORTS.stop - 1}")
