"""What `herd up` is to run: a Serve config, from a file or from flags, and one line on its engine."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from router.config import FleetConfig, application_of, load, parse
from router.errors import ConfigError
from router.scaling import Replicas
from workers import demo_model
from workers.engine import DEMO
from workers.vllm_engine import Place

# Enough to see a fleet at work: traffic spreads, and one can be killed.
REPLICAS = 2


@dataclass(frozen=True, slots=True)
class Plan:
    """A Serve config with one Herd application, and which engine it comes down to."""

    document: dict[str, Any]
    engine: str

    @property
    def name(self) -> str:
        """The application's name on Serve."""
        return str(application_of(self.document).get("name", "default"))

    @property
    def fleet(self) -> FleetConfig:
        """The fleet that the application is built from."""
        return parse(application_of(self.document)["args"])

    def on_ports(self, port: int | None, admin_port: int | None) -> Plan:
        """The same on other ports; 0 becomes a free one, which people are told before the router has it."""
        router = self.fleet.router
        return self._with(
            port=_settled(router.port if port is None else port),
            admin_port=_settled(router.admin_port if admin_port is None else admin_port),
        )

    def for_tenants(self, tenants: dict[str, Any], admin_key: str | None) -> Plan:
        """The same for those who have these keys (router.tenants), beside what the file says of them."""
        known = application_of(self.document)["args"].get("router", {}).get("tenants", {})
        added = {"tenants": {**known, **tenants}} if tenants else {}
        return self._with(**added, **({"admin_key": admin_key} if admin_key else {}))

    def _with(self, **settings: Any) -> Plan:
        """The same with other settings of the router."""
        application = application_of(self.document)
        args = {**application["args"], "router": {**application["args"].get("router", {}), **settings}}
        return Plan({**self.document, "applications": [{**application, "args": args}]}, self.engine)

    def prepare(self, waiting: Callable[[str], None]) -> None:
        """Makes the demo model once, before every replica asks for it."""
        if any(model.source == DEMO for model in self.fleet.models):
            waiting("Making the demo model")
            demo_model.ensure()


def from_file(path: Path, engine: str | None = None) -> Plan:
    """A Serve config file, on another kind of engine if one is given. Raises ConfigError that names the file
    and the key."""
    document = load(path)
    if engine is not None:
        application = application_of(document)
        on_engine = [{**model, "engine": engine} for model in application["args"]["models"]]
        args = {**application["args"], "models": on_engine}
        document = {**document, "applications": [{**application, "args": args}]}
    models = parse(application_of(document)["args"]).models
    engines = ", ".join(f"{_number(m.replicas)} x {m.engine} with {m.name}" for m in models)
    return Plan(document, f"{engines}, as {path} says")


def _number(replicas: Replicas) -> str:
    return str(replicas.max) if replicas.fixed else f"{replicas.min} to {replicas.max}"


def from_flags(engine: str, model: str | None, replicas: int | None, place: Place) -> Plan:
    """One model, on the engine asked for; `auto` takes vLLM where it can run. Raises ConfigError."""
    obstacle = _obstacle(place, model)
    if engine == "vllm" and place.platform is None:
        raise ConfigError(f"--engine vllm: {place.reason}.")
    kind = "simulated" if engine == "simulated" or (engine == "auto" and obstacle) else "vllm"
    spec = {"name": _name(model), "engine": kind, "source": model or DEMO, "replicas": replicas or REPLICAS}
    return Plan(
        document({"models": [spec]}), describe(kind, model, place, obstacle if engine == "auto" else None)
    )


def document(args: dict[str, Any]) -> dict[str, Any]:
    """A fleet as a Serve config. Serve's own proxies stay off: they would share the router's port."""
    application = {"name": "herd", "import_path": "router.app:build", "route_prefix": None, "args": args}
    return {"proxy_location": "Disabled", "applications": [application]}


def describe(kind: str, model: str | None, place: Place, obstacle: str | None) -> str:
    """Which engine runs, why, and what to expect of its output."""
    if kind == "simulated":
        because = f" because {obstacle}" if obstacle else ""
        return f"simulated{because}; its timing and cache are modelled and its text is made up"
    where = f"vLLM on {'the CPU' if place.platform == 'cpu' else 'GPUs'} ({place.reason})"
    if model is None:
        return f"{where} with the demo model; its weights are random, so its output is noise"
    return f"{where} with {model}"


def _obstacle(place: Place, model: str | None) -> str | None:
    if place.platform is None:
        return place.reason
    if place.platform == "cuda" and model is None:
        return "a GPU is worth a real model, and no --model is given"
    return None


def _name(model: str | None) -> str:
    """What clients call it: a hub's name as it is, a folder by its last part."""
    if model is None:
        return demo_model.NAME
    return Path(model).resolve().name if Path(model).is_dir() else model


def _settled(port: int) -> int:
    if port != 0:
        return port
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])
