"""An engine's command line: vLLM's flags, those that make it part of a fleet, and those left to the user."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# How long an engine that got SIGTERM goes on with the streams it has; `EngineProcess.stop` makes it shorter.
DRAIN_LIMIT_S = 3600

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


def flag_name(key: str) -> str:
    """A flag as vLLM's help spells it, without dashes in front: `--max_model_len` is `max-model-len`."""
    head, dot, tail = key.lstrip("-").partition(".")
    return head.replace("_", "-") + dot + tail


def flags(args: Mapping[str, Any]) -> list[str]:
    """Words of a command line: true is a bare flag, false its --no- form, None nothing, a dict JSON."""
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


def contract_flags(name: str, at: Address) -> dict[str, Any]:
    """The flags that make a vLLM-like server part of a fleet.

    KV events go to a free port of this host alone: vLLM binds `tcp://*:0` to VLLM_HOST_IP and tells the port
    at /kv_event_sources.
    """
    return {
        "served-model-name": name,
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
