"""A fleet as its operator writes it: the `args:` of a Ray Serve application.

Settings are defined beside the code that reads them and composed here; unknown keys are refused, and an
error names the key. `load` reads a whole Serve config file, the one that `serve deploy` takes too.
"""

from __future__ import annotations

from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from router.continuation import Mode
from router.core.placement import POLICIES, kv_aware
from router.decisions import DecisionsConfig
from router.errors import ConfigError
from router.http.cors import Cors
from router.http.requests import Limits
from router.keys import ADMIN_KEY
from router.line import AdmissionConfig
from router.scaling import Replicas
from router.settings import checked, read_yaml
from router.slo import Slo
from router.tenants import KeyHash, TenantsConfig
from router.tokenizer_config import TokenizerConfig
from router.warmup import WarmupConfig
from workers.engine import EngineSpec

Port = Annotated[int, Field(ge=0, le=65535)]
Name = Annotated[str, Field(min_length=1)]


# What Serve asks how many replicas there are to be (router/autoscaling.py).
AUTOSCALING_POLICY = "router.autoscaling:as_routers_decide"


class RouterConfig(BaseModel):
    """The front door: where it listens and how it chooses. Port 0 takes any free one.

    `admin_key`: the hash of the key that admin ports ask for (`herd key admin`); needed where they are not on
    loopback. `admin_open_metrics`: `/metrics` is told without it.
    `replicas`: router processes; those on one machine share the port. `shards`: into how many shares the KV
    index is divided; with 1 every process holds all of it, with more it holds what belongs to its requests,
    and passes others' on (router/shards.py). `tokenizers`: by model, `*` for all others
    (router/tokenizer_config.py). `continuation`: by model as well, whether streams go on when their
    replica fails (router/continuation.py). `allow_kv_transfer_params`: clients may send their own. `aliases`:
    other names of models, each with the name that engines know. `limits`: of what clients send
    (router/http/requests.py). `cors`: which web pages may call (router/http/cors.py). `decisions`: what is
    told of placements (router/decisions.py). `tenants`: whose requests are taken (router/tenants.py).
    `admission`: when requests wait in line (router/line.py). `slos`: what is promised of models, by model,
    `*` for all others (router/slo.py). `scaling`: how many replicas those models may have whose number is not
    fixed (router/scaling.py). `warmup`: what replicas that come or go compute beforehand (router/warmup.py).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "0.0.0.0"
    port: Port = 8000
    admin_host: str = "127.0.0.1"
    admin_port: Port = 8001  # of the first router process on a machine; the next ones have the next ports
    admin_key: KeyHash | None = None
    admin_open_metrics: bool = False
    replicas: Annotated[int, Field(ge=1)] = 1
    shards: Annotated[int, Field(ge=1)] = 1
    policy: str = kv_aware.__name__
    tokenizers: dict[Name, TokenizerConfig] = {}
    continuation: dict[Name, Mode] = {}
    allow_kv_transfer_params: bool = False
    aliases: dict[Name, Name] = {}
    limits: Limits = Limits()
    cors: Cors = Cors()
    decisions: DecisionsConfig = DecisionsConfig()
    tenants: TenantsConfig = TenantsConfig()
    admission: AdmissionConfig = AdmissionConfig()
    slos: dict[Name, Slo] = {}
    scaling: dict[Name, Replicas] = {}
    warmup: WarmupConfig = WarmupConfig()

    @field_validator("policy")
    @classmethod
    def _known_policy(cls, name: str) -> str:
        if name not in POLICIES:
            raise ValueError(f"{name!r} is not a policy; known are {', '.join(POLICIES)}")
        return name

    @field_validator("aliases")
    @classmethod
    def _no_chains(cls, aliases: dict[str, str]) -> dict[str, str]:
        for alias, model in aliases.items():
            if model in aliases:
                raise ValueError(f"{alias!r} stands for {model!r}, which is an alias itself")
        return aliases

    @model_validator(mode="after")
    def _admin_is_not_open(self) -> RouterConfig:
        if self.admin_key is None and not _is_loopback(self.admin_host):
            raise ValueError(
                f"admin_key: admin_host {self.admin_host} can be reached from other machines, "
                f"so a key is needed (`herd key admin` makes one; or {ADMIN_KEY})"
            )
        return self

    @property
    def admin_unguarded(self) -> tuple[str, ...]:
        """What the admin port tells without its key."""
        return ("/health", "/metrics") if self.admin_open_metrics else ("/health",)

    @model_validator(mode="after")
    def _owned(self) -> RouterConfig:
        if self.shards > self.replicas:
            raise ValueError(f"shards: {self.shards} need as many router processes, not {self.replicas}")
        return self

    @model_validator(mode="after")
    def _ports_apart(self) -> RouterConfig:
        last = self.admin_port + self.replicas - 1
        if last > 65535:
            raise ValueError(f"admin_port: {self.replicas} router processes need ports up to {last}")
        if self.port and self.admin_port and self.admin_port <= self.port <= last:
            raise ValueError(f"admin_port: {self.admin_port} to {last} are admin ports, port {self.port} too")
        return self


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


class ModelConfig(EngineSpec):
    """One model and how many replicas of it run: a number, or a range with how to choose in it.

    `drain_s`: how long streams of a replica that leaves may go on there; then they go on at another.
    """

    replicas: Replicas = Replicas(max=1)
    drain_s: Annotated[float, Field(ge=0)] = 600.0
    slo: Slo = Slo()
    continuation: Mode = "exact"
    resources: dict[str, float] = {}


class FleetConfig(BaseModel):
    """All models of a fleet and the router in front of them."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    models: Annotated[list[ModelConfig], Field(min_length=1)]
    router: RouterConfig = RouterConfig()

    @property
    def tokenizers(self) -> dict[str, TokenizerConfig]:
        """By model: as the router is told, else as the model's engines are started."""
        of_engines = {model.name: TokenizerConfig.of_engine(model) for model in self.models}
        known = {name: config for name, config in of_engines.items() if config is not None}
        return known | self.router.tokenizers

    @property
    def continuation(self) -> dict[str, Mode]:
        """By model: as the router is told, else as the model is."""
        return {model.name: model.continuation for model in self.models} | self.router.continuation

    @property
    def slos(self) -> dict[str, Slo]:
        """By model: as its entry says, else as the router is told; nothing of those of which nobody says."""
        said = {model.name: model.slo for model in self.models if "slo" in model.model_fields_set}
        return self.router.slos | said

    @property
    def scaling(self) -> dict[str, Replicas]:
        """By model: as its entry says, else as the router is told."""
        said = {model.name: model.replicas for model in self.models if not model.replicas.fixed}
        return self.router.scaling | said

    @property
    def by_model(self) -> dict[str, dict[str, Any]]:
        """What the router is told of models, by its keys."""
        return {
            "tokenizers": self.tokenizers,
            "continuation": self.continuation,
            "slos": self.slos,
            "scaling": self.scaling,
        }

    @model_validator(mode="after")
    def _unique_names(self) -> FleetConfig:
        names = [model.name for model in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"models: the name {name!r} is given twice")
            if name in self.router.aliases:
                raise ValueError(f"router.aliases: {name!r} is the name of a model")
        for name in self.router.scaling:
            if name not in names:
                raise ValueError(f"router.scaling: {name!r} is no model of this fleet")
        return self


def parse(args: Mapping[str, Any]) -> FleetConfig:
    """The `args:` of the application; raises ConfigError that names the key."""
    if not isinstance(args, Mapping):
        raise ConfigError("args: a mapping with `models` and `router` is expected")
    return checked(FleetConfig, args)


def parse_router(settings: Mapping[str, Any]) -> RouterConfig:
    """A router's settings by themselves, as `herd route` has them; raises ConfigError that names the key."""
    return checked(RouterConfig, settings)


def load(path: Path) -> dict[str, Any]:
    """A Serve config file with one Herd application, checked; its content as `serve deploy` sends it."""
    document = read_yaml(path)
    try:
        application = application_of(document)
        fleet = parse(application.get("args") or {})
        _check_followed(application, fleet)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return dict(document)


def _check_followed(application: Mapping[str, Any], fleet: FleetConfig) -> None:
    """Serve asks whom the application names how many replicas there are to be; by itself it asks nobody."""
    policy = application.get("autoscaling_policy") or {}
    if fleet.scaling and policy.get("policy_function") != AUTOSCALING_POLICY:
        raise ConfigError(
            f"applications.0.autoscaling_policy: with a range of replicas {{policy_function: "
            f"{AUTOSCALING_POLICY}}} is expected, else Serve does not scale by what routers decide"
        )


def application_of(document: Any) -> dict[str, Any]:
    """The one application of a Serve config."""
    applications = document.get("applications") if isinstance(document, dict) else None
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise ConfigError("applications: exactly one application is expected (a Ray Serve config file)")
    return applications[0]
