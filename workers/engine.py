"""What an engine is to the fleet: a command that serves vLLM's HTTP API, and one sentence when it will not start.

An engine is a process of its own, known by its wire only. This module names the two kinds that ship and holds
what both share; `workers.process` runs the command.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_validator

DEMO = "demo"

# Flags that are Herd's to set: the router could not reach, know or trust an engine that has other values.
RESERVED = {
    "model": "it is the model's 'source'",
    "served-model-name": "it is the model's 'name'",
    "host": "the replica listens where the routers look for it",
    "port": "each replica takes a free port",
    "uds": "the router reaches an engine by TCP",
    "root-path": "the router calls an engine's paths as they are",
    "ssl-keyfile": "the router speaks plain HTTP to an engine",
    "ssl-certfile": "the router speaks plain HTTP to an engine",
    "api-key": "clients' keys end at the router, which sends none to an engine",
    "kv-events-config": "the router follows the engine's KV cache through it",
    "enable-prompt-tokens-details": "the router checks its predictions by it",
    "shutdown-timeout": "a leaving replica drains for as long as the fleet says",
    "config": "a file could set any of the others",
    "headless": "an engine has to answer HTTP",
    "grpc": "an engine has to answer HTTP",
}

# How long an engine that got SIGTERM goes on with the streams it has; `EngineProcess.stop` cuts it shorter.
DRAIN_LIMIT_S = 3600

Scalar = str | int | float | bool | None


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

    @field_validator("engine_args")
    @classmethod
    def _only_the_users_flags(cls, given: dict[str, Any]) -> dict[str, Any]:
        flags: dict[str, Any] = {}
        for key, value in given.items():
            name = flag_name(key)
            if reason := RESERVED.get(name.removeprefix("no-")):
                raise ValueError(f"'{key}' is not yours to set: {reason}")
            if name in flags:
                raise ValueError(f"'{key}' is given twice")
            flags[name] = value
        return flags


@dataclass(frozen=True, slots=True)
class Address:
    """Where an engine is to listen, and where others reach it."""

    host: str
    port: int

    @property
    def url(self) -> str:
        """The base of its HTTP API."""
        return f"http://{self.host}:{self.port}"


@dataclass(frozen=True, slots=True)
class Command:
    """What to run. `env` is laid over the environment; an empty value takes a variable's effect away."""

    argv: list[str]
    env: dict[str, str] = field(default_factory=dict)


class Engine(Protocol):
    """A kind of engine, for one model."""

    kind: str
    spec: EngineSpec

    def command(self, at: Address) -> Command:
        """The process that serves this model there. Changes nothing."""

    def explain(self, exit_code: int | None, log: str) -> str:
        """Why it did not start, in one sentence; `exit_code` is None where it still ran."""


def make_engine(spec: EngineSpec) -> Engine:
    """The engine for this model, on this machine; makes the demo model if it is that and not there yet."""
    # Here, not above: each kind builds on this module.
    from workers.simulated_engine import SimulatedEngine
    from workers.vllm_engine import VllmEngine

    kinds = {"vllm": VllmEngine, "simulated": SimulatedEngine}
    return kinds[spec.engine].prepare(spec)


def flag_name(key: str) -> str:
    """A flag as vLLM's help spells it, without dashes in front: `--max_model_len` is `max-model-len`."""
    head, dot, tail = key.lstrip("-").partition(".")
    return head.replace("_", "-") + dot + tail


def flags(args: Mapping[str, Any]) -> list[str]:
    """Words of a command line: true is a bare flag, false its --no- form, None is left out, a dict is JSON."""
    words: list[str] = []
    for name, value in args.items():
        match value:
            case None:
                continue
            case True:
                words.append(f"--{name}")
            case False:
                words.append(f"--no-{name}")
            case dict():
                words += [f"--{name}", json.dumps(value)]
            case list():
                words += [f"--{name}", *map(str, value)]
            case _:
                words += [f"--{name}", str(value)]
    return words


def contract_flags(spec: EngineSpec, at: Address) -> dict[str, Any]:
    """The flags that make a vLLM-like server part of a fleet.

    KV events go to a free port of this host alone: vLLM binds `tcp://*:0` to VLLM_HOST_IP and tells the port
    at /kv_event_sources.
    """
    return {
        "served-model-name": spec.name,
        "host": at.host,
        "port": at.port,
        "enable-prompt-tokens-details": True,
        "shutdown-timeout": DRAIN_LIMIT_S,
        "kv-events-config": {
            "enable_kv_cache_events": True,
            "publisher": "zmq",
            "endpoint": "tcp://*:0",
            "replay_endpoint": "tcp://*:0",
        },
    }


# What a line of an engine's log means; the first cause that matches wins. A cause may quote what it caught.
_CAUSES = tuple(
    (re.compile(pattern), sentence)
    for pattern, sentence in (
        (r"[Aa]ddress already in use", "its port is already in use"),
        (r"Repo id must [^\n]*: '([^'\n]+)'", "there is no model at {0}"),
        (r"Invalid repository ID or local directory specified: '([^'\n]+)'", "there is no model at {0}"),
        (r"couldn't find them in the cached files", "the model is neither here nor can it be fetched from the hub"),
        (r"([^\s']+) is not a local folder and is not a valid model", "there is no model called {0}"),
        (r"error: ((?:unrecognized|ambiguous|argument|the following)[^\n]*)", "bad argument: {0}"),
        (r"(CUDA out of memory.*?)(?:\. |\n|$)", "out of GPU memory: {0}"),
        (r"(Free memory on device.*?)(?:\. |\n|$)", "too little GPU memory is free: {0}"),
        (r"(To serve at least one request.*?)(?:\. |\n|$)", "too little memory for the KV cache: {0}"),
        (r"(Available memory on node.*?)(?:\. |\n|$)", "too little memory for the KV cache: {0}"),
        (r"No available memory for the cache blocks", "too little memory for the KV cache"),
        (r"DefaultCPUAllocator|Cannot allocate memory|std::bad_alloc|\bMemoryError\b", "out of memory"),
    )
)

_RAISED = re.compile(r"\b([A-Z]\w*(?:Error|Exception|Exit))\b:? *(\S[^\n]*)")
# What vLLM's front process says of any failure in its engine process.
_ECHO = re.compile(r"Engine core initialization failed|EngineCore failed to start|died unexpectedly")


def explain(exit_code: int | None, log: str) -> str:
    """Why an engine did not start, from the end of its log: a known cause, else the last thing it complained of."""
    for pattern, sentence in _CAUSES:
        if found := pattern.search(log):
            return sentence.format(*found.groups())
    if exit_code == 137:
        return "it was killed, most likely because the machine ran out of memory"
    ending = "it was not ready in time" if exit_code is None else f"it ended with status {exit_code}"
    last = _last_complaint(log)
    return f"{ending}: {last}" if last else f"{ending} and said nothing"


def _last_complaint(log: str) -> str:
    lines = [line.strip() for line in log.splitlines() if line.strip() and not _ECHO.search(line)]
    raised = [f"{found[1]}: {found[2]}" for line in lines if (found := _RAISED.search(line))]
    return (raised or lines or [""])[-1]
