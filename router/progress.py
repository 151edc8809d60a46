"""What an operator sees of a fleet: one line per change, and on a terminal what is awaited."""

from __future__ import annotations

import json
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from router.run_directory import Record
from router.serve_rest import sentence


class Progress:
    """Lines on standard error, and a spinner below them where that is a terminal."""

    def __init__(self, title: str) -> None:
        self._console = Console(stderr=True, highlight=False, markup=False, soft_wrap=True)
        self._status = self._console.status("") if self._console.is_terminal else None
        self._began = time.monotonic()
        self._console.print(title)

    def line(self, text: str) -> None:
        """Something happened."""
        self._console.print(f"{time.monotonic() - self._began:6.1f} s  {text}")

    def waiting(self, text: str) -> None:
        """What is being waited for now."""
        if self._status is not None:
            self._status.update(text)
            self._status.start()

    def announce(self, record: Record) -> None:
        """The fleet serves: where it is, and what to try."""
        self.quiet()
        click.echo(f"\nHerd is up after {time.monotonic() - self._began:.1f} s.\n{summary(record)}")

    def quiet(self) -> None:
        """Nothing is being waited for."""
        if self._status is not None:
            self._status.stop()


class Tale:
    """Tells what changed from one look at a Serve application to the next."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress
        self._running: dict[str, str] = {}
        self._said: dict[str, str] = {}

    def tell(self, application: dict[str, Any]) -> None:
        """One look at the application, as Serve's REST interface describes it."""
        deployments = application.get("deployments", {})
        for name, deployment in deployments.items():
            self._complain(name, deployment["message"])
        running = {
            r["replica_id"]: (name, r)
            for name, d in deployments.items()
            for r in d["replicas"]
            if r["state"] == "RUNNING"
        }
        for replica_id in running.keys() - self._running.keys():
            name, replica = running[replica_id]
            self._progress.line(
                f"{name} {replica_id} is ready, {time.time() - replica['start_time_s']:.1f} s after its start"
            )
        for replica_id in self._running.keys() - running.keys():
            self._progress.line(f"{self._running[replica_id]} {replica_id} is gone")
        self._running = {replica_id: name for replica_id, (name, _) in running.items()}

    def _complain(self, name: str, message: str) -> None:
        if message and self._said.get(name) != message:
            self._progress.line(f"{name}: {sentence(message)}")
        self._said[name] = message


def outstanding(application: dict[str, Any]) -> str:
    """How far each deployment is."""
    counts = [
        f"{name} {sum(r['state'] == 'RUNNING' for r in d['replicas'])} of {d['target_num_replicas']}"
        for name, d in application.get("deployments", {}).items()
    ]
    return "Ready: " + ", ".join(counts) if counts else "Serve is building the application"


def summary(record: Record) -> str:
    """Where everything is, and commands to paste."""
    token = "RAY_AUTH_MODE=token " if record.token_auth else ""
    dashboard = f"{record.dashboard}" + (
        f"  (asks for a token: `{_beside('ray')} get-auth-token`)" if token else ""
    )
    return f"""
  endpoint    {record.endpoint}/v1
  admin       {record.admin}/metrics  {record.admin}/fleet
  dashboard   {dashboard}
  state       {_beside("herd")} status --run-dir {shlex.quote(record.run_directory)}
  on Serve    {token}{_beside("serve")} status --address {record.dashboard}

Try it:
  {_curl(record)}

Ctrl-C ends all of it."""


def _curl(record: Record) -> str:
    body = {
        "model": record.models[0],
        "messages": [{"role": "user", "content": "Hello"}],
        "max_tokens": 64,
        "stream": True,
    }
    header, data = shlex.quote("content-type: application/json"), shlex.quote(json.dumps(body))
    key = ' -H "authorization: Bearer $HERD_API_KEY"' if record.keyed else ""
    return f"curl -N {record.endpoint}/v1/chat/completions -H {header}{key} -d {data}"


def _beside(name: str) -> str:
    """A command of this environment, as short as it can be called from here."""
    path = Path(sys.executable).with_name(name)
    return shlex.quote(str(path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path))
