"""Engine processes as a replica has them: ready, drained, killed, or never ready and saying why."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Coroutine, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import eventually

from workers.command import Address, Command
from workers.engine import EngineSpec, make_engine
from workers.failure import explain
from workers.process import PORTS, EngineProcess, EngineStartError, free_port

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the supervisor is made for Linux")

SPEC = EngineSpec(engine="simulated", name="m", source="demo")


@dataclass(frozen=True)
class Scripted:
    """An engine that is a few lines of Python; `sys.argv` holds host and port."""

    program: str
    spec: EngineSpec = SPEC
    kind = "scripted"

    def command(self, at: Address) -> Command:
        return Command([sys.executable, "-c", self.program, at.host, str(at.port)])

    def explain(self, exit_code: int | None, log: str) -> str:
        return explain(exit_code, log)


@pytest.fixture
def run() -> Iterator[Callable[[Coroutine[Any, Any, Any]], Any]]:
    with asyncio.Runner() as runner:
        yield runner.run


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "logs" / "engine.log"


@pytest.fixture(autouse=True)
def nothing_is_left() -> Iterator[None]:
    """No test leaves a process behind: all of them are below this one."""
    yield
    eventually(lambda: not Path(f"/proc/self/task/{threading.get_native_id()}/children").read_text())


def runs(pid: int) -> bool:
    return Path(f"/proc/{pid}").exists()


def test_a_started_engine_serves_and_says_where_its_events_are(run, log):
    process = run(EngineProcess.start(make_engine(SPEC), log, 60))
    try:
        assert [model["id"] for model in httpx.get(f"{process.url}/v1/models").json()["data"]] == ["m"]
        assert b"workers.simulated" in Path(f"/proc/{process.pid}/cmdline").read_bytes()
        for endpoint in (process.kv_events, process.kv_replay):
            host, port = endpoint.removeprefix("tcp://").split(":")
            socket.create_connection((host, int(port)), timeout=5).close()
        assert process.alive()
        assert 0 < process.startup_s < 60
    finally:
        status = run(process.stop(10))
    assert (status, process.alive(), runs(process.pid)) == (0, False, False)


def test_a_stopped_engine_finishes_its_streams(run, log):
    async def stop_in_mid_stream() -> tuple[int, bytes]:
        process = await EngineProcess.start(make_engine(SPEC), log, 60)
        request = {"model": "m", "prompt": "x", "max_tokens": 30, "stream": True, "ignore_eos": True}
        async with (
            httpx.AsyncClient(trust_env=False) as client,
            client.stream("POST", f"{process.url}/v1/completions", json=request) as reply,
        ):
            chunks = reply.aiter_bytes()
            body = await anext(chunks)
            stopping = asyncio.create_task(process.stop(30))
            async for chunk in chunks:
                body += chunk
        return await stopping, body

    status, body = run(stop_in_mid_stream())
    assert status == 0
    assert body.endswith(b"data: [DONE]\n\n")
    assert b'"finish_reason":"length"' in body.replace(b": ", b":")


def test_an_engine_that_ignores_sigterm_is_killed(run, log):
    process = run(EngineProcess.start(Scripted(SERVER), log, 60))
    assert run(process.stop(0.2)) == 128 + signal.SIGKILL
    assert not runs(process.pid)


def test_an_engine_that_dies_is_noticed(run, log):
    process = run(EngineProcess.start(make_engine(SPEC), log, 60))
    os.kill(process.pid, signal.SIGKILL)
    assert run(asyncio.wait_for(process.wait(), 10)) == 128 + signal.SIGKILL
    assert not process.alive()
    assert run(process.stop(10)) == 128 + signal.SIGKILL


# A server that is healthy and answers each completion with this status, whatever it is told.
SERVER = """
import http.server, signal, sys
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if self.path == "/health" else 404); self.end_headers()
    def do_POST(self):
        self.send_response(STATUS); self.end_headers(); self.wfile.write(b"because")
signal.signal(signal.SIGTERM, signal.SIG_IGN)
http.server.HTTPServer((sys.argv[1], int(sys.argv[2])), Handler).serve_forever()
"""
REFUSING = SERVER.replace("STATUS", "500")
SERVER = SERVER.replace("STATUS", "200")
BREAKING = SERVER.replace(
    "self.send_response(200); ", "print('MemoryError', flush=True); import os; os._exit(1); "
)


@pytest.mark.parametrize(
    ("engine", "sentence"),
    [
        (Scripted("raise ValueError('no luck')"), "it ended with status 1: ValueError: no luck"),
        (Scripted("raise SystemExit(3)"), "it ended with status 3 and said nothing"),
        (
            Scripted("import os; os.kill(os.getpid(), 9)"),
            "it was killed, most likely because the machine ran",
        ),
        (Scripted(REFUSING), "it answered a first request with status 500: because"),
        (Scripted(BREAKING), "out of memory"),
    ],
    ids=["raises", "silent", "killed", "refuses", "breaks"],
)
def test_a_failed_start_says_why(run, log, engine, sentence):
    with pytest.raises(EngineStartError) as failed:
        run(EngineProcess.start(engine, log, 30))
    assert str(failed.value).startswith(f"the scripted engine of m did not start: {sentence}")
    assert str(failed.value).endswith(f" (its log: {log})")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"engine_args": {"no-such-flag": 1}}, "bad argument: unrecognized arguments: --no-such-flag 1"),
        ({"source": "/no/such/model"}, "there is no model at /no/such/model"),
    ],
    ids=["bad argument", "missing model"],
)
def test_a_wrong_spec_ends_in_a_sentence(run, log, change, sentence):
    spec = SPEC.model_validate(SPEC.model_dump() | change)
    with pytest.raises(EngineStartError, match=sentence):
        run(EngineProcess.start(make_engine(spec), log, 60))


def test_a_port_in_use_ends_in_a_sentence(run, log):
    class Stubborn(Scripted):
        def command(self, at: Address) -> Command:
            return super().command(Address(*taken.getsockname()))

    with (
        socket.create_server(("127.0.0.1", 0)) as taken,
        pytest.raises(EngineStartError, match="its port is already in use"),
    ):
        run(EngineProcess.start(Stubborn(SERVER), log, 60))


def test_a_start_that_hangs_ends_when_the_time_is_out(run, log):
    hanging = Scripted("import time; print('loading weights', flush=True); time.sleep(600)")
    with pytest.raises(EngineStartError, match="it was not ready in time: loading weights"):
        run(EngineProcess.start(hanging, log, 1))


def test_only_this_starts_log_is_read(run, log):
    log.parent.mkdir()
    log.write_text("MemoryError of an earlier start\n")
    with pytest.raises(EngineStartError, match="said nothing"):
        run(EngineProcess.start(Scripted("raise SystemExit(1)"), log, 30))


def test_a_cancelled_start_leaves_nothing(run, log):
    async def cancel() -> None:
        starting = asyncio.create_task(EngineProcess.start(Scripted(FORKING), log, 60))
        while not (log.exists() and log.read_text().endswith("\n")):
            await asyncio.sleep(0.01)
        starting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await starting

    run(cancel())
    pids = [int(pid) for pid in log.read_text().split()]
    assert len(pids) == 2
    assert not any(map(runs, pids))


FORKING = """
import os, subprocess, time
child = subprocess.Popen(["sleep", "600"], start_new_session=True)
print(os.getpid(), child.pid, flush=True)
time.sleep(600)
"""

OWNER = """
import asyncio, sys
from pathlib import Path
from workers.engine import EngineSpec, make_engine
from workers.process import EngineProcess

async def main():
    engine = make_engine(EngineSpec(engine="simulated", name="m", source="demo"))
    process = await EngineProcess.start(engine, Path(sys.argv[1]), 60)
    print(process.pid, flush=True)
    await process.wait()

asyncio.run(main())
"""


def test_kill_9_of_the_owner_ends_the_engine(log):
    with subprocess.Popen([sys.executable, "-c", OWNER, str(log)], stdout=subprocess.PIPE) as owner:
        engine = int(owner.stdout.readline())
        assert runs(engine)
        owner.kill()
    eventually(lambda: not runs(engine))


def test_free_ports_are_out_of_the_way():
    port = free_port("127.0.0.1")
    assert port in PORTS
    with pytest.raises(EngineStartError, match=r"no free port on 192\.0\.2\.1"):
        free_port("192.0.2.1")
