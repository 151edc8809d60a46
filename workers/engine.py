"""What an engine is to the fleet: a command that serves vLLM's HTTP API, and a sentence when it does not.

An engine is a process of its own, known by its wire only. `workers.process` runs one for `workers.replica`.
"""

from __future__ import annotations

from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from workers.command import RESERVED, Address, Command, flag_name
from workers.simulated_engine import SimulatedEngine
from workers.vllm_engine import VllmEngine

DEMO = "demo"

Scalar = str | int | float | bool | None


class KvOffload(BaseModel):
    """A second tier of the KV cache, in host memory: prompts' blocks are copied there, and loaded from there.

    `cpu_gib`: GiB for each replica, over all its GPUs together.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    cpu_gib: float = Field(gt=0, allow_inf_nan=False)


# The flags that `kv_offload` stands for.
OFFLOADING = ("kv-offloading-size", "kv-offloading-backend", "kv-transfer-config")


class EngineSpec(BaseModel):
    """One engine as a fleet file describes it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    engine: Literal["vllm", "simulated"]
    name: str = Field(min_length=1, description="the model's name in the API")
    source: str = Field(min_length=1, description="a model's directory, its hub id, or 'demo'")
    engine_args: dict[str, Scalar | list[Scalar] | dict[str, Any]] = Field(
        default_factory=dict, description="vLLM's flags, with or without the leading dashes"
    )
    env: dict[str, str] = Field(default_factory=dict)
    kv_offload: KvOffload | None = None

    @property
    def demo(self) -> bool:
        """Whether it is the demo model, made here on first use."""
        return self.source == DEMO

    @field_validator("engine_args")
    @classmethod
    def _only_the_users_flags(cls, given: dict[str, Any]) -> dict[str, Any]:
        kept: dict[str, Any] = {}
        for key, value in given.items():
            name = flag_name(key)
            if reason := RESERVED.get(name.removeprefix("no-").partition(".")[0]):
                raise ValueError(f"'{key}' is not yours to set: {reason}")
            if name in kept:
                raise ValueError(f"'{key}' is given twice")
            kept[name] = value
        return kept

    @model_validator(mode="after")
    def _offloads_in_one_way(self) -> EngineSpec:
        given = [name for name in self.engine_args if name.partition(".")[0] in OFFLOADING]
        if self.kv_offload is not None and given:
            raise ValueError(f"kv_offload: engine_args sets '{given[0]}' as well; only one of them can")
        return self


class Engine(Protocol):
    """A kind of engine, for one model."""

    spec: EngineSpec

    @property
    def kind(self) -> str:
        """As the fleet is told."""

    def command(self, at: Address) -> Command:
        """The process that serves this model there. Changes nothing."""

    def explain(self, exit_code: int | None, log: str) -> str:
        """Why it did not start, in one sentence; `exit_code` is None where it still ran."""


def make_engine(spec: EngineSpec) -> Engine:
    """The engine for this model, on this machine; makes the demo model if it is that and not there yet.

    Raises VllmNotFoundError where vLLM is asked for and cannot run, UnsupportedError where not as asked.
    """
    return VllmEngine.prepare(spec) if spec.engine == "vllm" else SimulatedEngine.prepare(spec)
