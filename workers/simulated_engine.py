"""The simulated engine as a subprocess: a server with vLLM's wire, a modelled clock and a modelled cache."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from workers import demo_model
from workers.command import Address, Command, contract_flags, flags
from workers.failure import explain

if TYPE_CHECKING:
    from workers.engine import EngineSpec


@dataclass(frozen=True, slots=True)
class SimulatedEngine:
    """It needs a model's tokenizer only, and this Python."""

    spec: EngineSpec
    model: str
    kind = "simulated"

    @classmethod
    def prepare(cls, spec: EngineSpec) -> SimulatedEngine:
        """For this model; makes the demo tokenizer if it is that."""
        return cls(spec, str(demo_model.tokenizer_dir()) if spec.demo else spec.source)

    def command(self, at: Address) -> Command:
        """`python -m workers.simulated`, with vLLM's flags."""
        contract = {"model": self.model, **contract_flags(self.spec.name, at)}
        argv = [sys.executable, "-m", "workers.simulated", *flags(contract | arguments(self.spec))]
        return Command(argv, {"VLLM_HOST_IP": at.host, **self.spec.env})

    def explain(self, exit_code: int | None, log: str) -> str:
        """Why it did not start."""
        return explain(exit_code, log)


def arguments(spec: EngineSpec) -> dict[str, Any]:
    """The flags of its modelled speed and memory."""
    offload = {"kv-offloading-size": spec.kv_offload.cpu_gib} if spec.kv_offload else {}
    return spec.engine_args | offload
