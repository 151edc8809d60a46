"""`herd up` as a user runs it, for tests: `from integration.fleet import Fleet`."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx
import openai
import yaml
from support import ROOT, Running, eventually, free_port, free_ports

from router.cluster import TOKEN
from router.run_directory import Process, Record, RunDirectory
from router.serve_rest import ServeRest

HERD = Path(sys.executable).with_name("herd")
SERVE = Path(sys.executable).with_name("serve")
# Ray alone takes half a minute where other tests keep the cores busy.
UP_S = 180.0
# Streams, engines, Serve, Ray; `herd up` gives the first of them 20 s.
END_S = 60.0


class Fleet:
    """One `herd up` in a run directory and on ports of its own."""

    def __init__(self, folder: Path, *args: str | Path, env: Mapping[str, str] | None = None) -> None:
        self.port = free_ports(3)
        self.admin_port = self.port + 1  # and the next for a second router process
        self.directory = RunDirectory(folder / "run")
        ports = ["--port", str(self.port), "--admin-port", str(self.admin_port)]
        where = ["--run-dir", str(self.directory.path), "--dashboard-port", str(free_port())]
        self.running = Running.start([HERD, "up", *args, *ports, *where], folder / "herd-up.log", env)

    def wait_until_up(self, timeout: float = UP_S) -> Fleet:
        """Returns when it says how to try it; fails as soon as it has ended instead."""

        def up() -> bool:
            assert self.running.process.poll() is None, self.output
            return "Try it:" in self.output

        eventually(up, timeout)
        return self

    @property
    def output(self) -> str:
        return self.running.output

    @property
    def record(self) -> Record:
        record = self.directory.read()
        assert record is not None
        return record

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def client(self) -> openai.OpenAI:
        """A client that never tries twice: what fails must be seen."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0)

    def ready(self) -> dict[str, dict[str, Any]]:
        """The replicas that get traffic, by id."""
        fleet = httpx.get(f"http://127.0.0.1:{self.admin_port}/fleet", trust_env=False).json()
        return {r["id"]: r for r in fleet["replicas"] if r["state"] == "ready"}

    def processes(self, word: str) -> list[Process]:
        """Its processes, as it recorded them, whose command line has this word."""
        return [p for p in self.record.processes if p.alive and word in command_line(p)]

    def engine(self, replica: dict[str, Any]) -> Process:
        """The engine behind a replica: the process that was given its port, less its supervisors."""
        port = replica["url"].rpartition(":")[2]
        found = [p for p in self.processes(f"--port {port}") if "supervisor.py" not in command_line(p)]
        return min(found, key=lambda p: p.started)

    def serve(self, command: str, *args: Path) -> str:
        """What one of Ray's own commands for operators says."""
        argv = [str(part) for part in (SERVE, command, "--address", self.record.dashboard, *args)]
        env = {**os.environ, "RAY_AUTH_MODE": "token"}
        done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT, env=env, timeout=120)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    def redeploy(self, change: Callable[[dict[str, Any]], object]) -> None:
        """`serve deploy` of the same file with a change."""
        config = yaml.safe_load(self.directory.serve_config.read_text())
        change(config)
        changed = self.directory.path / "changed.yaml"
        changed.write_text(yaml.safe_dump(config))
        self.serve("deploy", changed)

    def deploy(self, deployment: dict[str, Any], timeout: float) -> None:
        """Other options of one deployment, to its end."""
        self.redeploy(lambda config: config["applications"][0].update(deployments=[deployment]))

        # `serve status` would say the same, after seconds of imports each time.
        with ServeRest(self.record.dashboard, TOKEN.read_text().strip()) as serve:

            def settled() -> bool:
                herd = serve.applications()["herd"]
                states = [r["state"] for r in herd["deployments"][deployment["name"]]["replicas"]]
                return herd["status"] == "RUNNING" and states == ["RUNNING"] * deployment["num_replicas"]

            eventually(settled, timeout)

    def signal(self, number: int) -> None:
        """As Ctrl-C or `kill` on the `herd up` process."""
        self.running.process.send_signal(number)

    def wait(self, timeout: float = END_S) -> int:
        """The exit status of `herd up`."""
        return self.running.process.wait(timeout)

    def end(self) -> None:
        """After a test, however far it came: politely first, a fleet is more than one process group."""
        if self.running.process.poll() is None:
            self.signal(signal.SIGINT)
            try:
                self.wait()
            except subprocess.TimeoutExpired:
                pass
        herd("down", "--run-dir", self.directory.path)
        self.running.kill()


def herd(*args: str | Path) -> subprocess.CompletedProcess[str]:
    """Another `herd` command, to its end."""
    return subprocess.run(
        [str(a) for a in (HERD, *args)], capture_output=True, text=True, cwd=ROOT, timeout=120
    )


def status(fleet: Fleet) -> dict[str, Any]:
    """What `herd status --json` tells."""
    told = herd("status", "--json", "--run-dir", fleet.directory.path)
    assert told.returncode == 0, told.stderr
    return dict(json.loads(told.stdout))


def command_line(process: Process) -> str:
    try:
        return Path(f"/proc/{process.pid}/cmdline").read_text().replace("\0", " ")
    except (FileNotFoundError, ProcessLookupError):
        return ""


def gone(processes: list[Process]) -> bool:
    return not any(p.alive for p in processes)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
