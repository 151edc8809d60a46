"""A fleet as its operator writes it: the `args:` of a Ray Serve application.

Settings are defined beside the code that reads them and composed here; unknown keys are refused, and an
error names the key. `load` reads a whole Serve config file, the one that `serve deploy` takes too.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from router.core.placement import POLICIES, kv_aware
from router.decisions import DecisionsConfig
from router.errors import ConfigError
from router.http.cors import Cors
from router.http.requests import Limits
from router.line import AdmissionConfig
from router.slo import Slo
from router.tokenizer_config import TokenizerConfig
from workers.engine import EngineSpec

Port = Annotated[int, Field(ge=0, le=65535)]
Name = Annotated[str, Field(min_length=1)]
Config = TypeVar("Config", bound=BaseModel)


class RouterConfig(BaseModel):
    """The front door: where it listens and how it chooses. Port 0 takes any free one.

    `replicas`: router processes; those on one machine share the port. `shards`: into how many shares the KV
    index is divided; with 1 every process holds all of it, with more it holds what belongs to its requests,
    and passes others' on (router/shards.py). `tokenizers`: by model, `*` for all others
    (router/tokenizer_config.py). `allow_kv_transfer_params`: clients may send their own. `aliases`: other
    names of models, each with the name that engines know. `limits`: of what clients send
    (router/http/requests.py). `cors`: which web pages may call (router/http/cors.py). `decisions`: what is
    told of placements (router/decisions.py). `admission`: when requests wait in line (router/line.py).
    `slos`: what is promised of models, by their names (router/slo.py).
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    host: str = "0.0.0.0"
    port: Port = 8000
    admin_host: str = "127.0.0.1"
    admin_port: Port = 8001  # of the first router process on a machine; the next ones have the next ports
    replicas: Annotated[int, Field(ge=1)] = 1
    shards: Annotated[int, Field(ge=1)] = 1
    policy: str = kv_aware.__name__
    tokenizers: dict[Name, TokenizerConfig] = {}
    allow_kv_transfer_params: bool = False
    aliases: dict[Name, Name] = {}
    limits: Limits = Limits()
    cors: Cors = Cors()
    decisions: DecisionsConfig = DecisionsConfig()
    admission: AdmissionConfig = AdmissionConfig()
    slos: dict[Name, Slo] = {}

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


class ModelConfig(EngineSpec):
    """One model and how many replicas of it run."""

    replicas: Annotated[int, Field(ge=1)] = 1
    slo: Slo = Slo()
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
    def slos(self) -> dict[str, Slo]:
        """By model: as its entry says, else as the router is told; nothing of those of which nobody says."""
        said = {model.name: model.slo for model in self.models if "slo" in model.model_fields_set}
        return self.router.slos | said

    @model_validator(mode="after")
    def _unique_names(self) -> FleetConfig:
        names = [model.name for model in self.models]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"models: the name {name!r} is given twice")
            if name in self.router.aliases:
                raise ValueError(f"router.aliases: {name!r} is the name of a model")
        return self


def parse(args: Mapping[str, Any]) -> FleetConfig:
    """The `args:` of the application; raises ConfigError that names the key."""
    if not isinstance(args, Mapping):
        raise ConfigError("args: a mapping with `models` and `router` is expected")
    return _checked(FleetConfig, args)


def parse_router(settings: Mapping[str, Any]) -> RouterConfig:
    """A router's settings by themselves, as `herd route` has them; raises ConfigError that names the key."""
    return _checked(RouterConfig, settings)


def load(path: Path) -> dict[str, Any]:
    """A Serve config file with one Herd application, checked; its content as `serve deploy` sends it."""
    try:
        document = yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None
    try:
        application = application_of(document)
        parse(application.get("args") or {})
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None
    return dict(document)


def application_of(document: Any) -> dict[str, Any]:
    """The one application of a Serve config."""
    applications = document.get("applications") if isinstance(document, dict) else None
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise ConfigError("applications: exactly one application is expected (a Ray Serve config file)")
    return applications[0]


def _checked(kind: type[Config], values: Mapping[str, Any]) -> Config:
    try:
        return kind.model_validate(dict(values))
    except ValidationError as error:
        raise ConfigError(_sentence(error)) from None


def _sentence(error: ValidationError) -> str:
    return "; ".join(_one(e["loc"], e["msg"]) for e in error.errors())


def _one(loc: tuple[int | str, ...], message: str) -> str:
    message = message.removeprefix("Value error, ")
    where = ".".join(str(part) for part in loc)
    return f"{where}: {message}" if where else message
