"""Settings as people write them: read from YAML, checked, and what is wrong with them in one sentence."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from router.errors import ConfigError

Config = TypeVar("Config", bound=BaseModel)


def read_yaml(path: Path) -> Any:
    """What a file of YAML (or JSON, which is YAML too) holds; raises ConfigError that names the file."""
    try:
        return yaml.safe_load(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not YAML: {' '.join(str(error).split())}") from None


def checked(kind: type[Config], values: Mapping[str, Any]) -> Config:
    """The values as settings of this kind; raises ConfigError that names the key."""
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
