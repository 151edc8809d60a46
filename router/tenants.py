"""Who may ask, and how much: keys, the tenants they belong to, and what keeps tenants apart.

They stand in a file that is read again when it changes. One that is wrong changes nothing: those before stay.
"""

from __future__ import annotations

import asyncio
import hmac
import logging
import math
from base64 import urlsafe_b64encode
from pathlib import Path
from types import TracebackType
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from router import responses_api
from router.core.quotas import Allowance, Limit, Quota
from router.errors import ConfigError, RateLimited, ResponseNotFound, Unauthorized
from router.http.headers import Headers
from router.http.requests import Request
from router.http.sse import Usage
from router.keys import HASH, digest, digest_in, sent_with
from router.metrics import Metrics
from router.openai_api import Salt
from router.responses_api import Seal
from router.settings import checked, read_yaml

log = logging.getLogger(__name__)

# How soon a change of the file is seen. Kubernetes, which swaps mounted secrets, takes longer itself.
LOOK_S = 1.0
# Answered to anybody: load balancers ask these.
OPEN_PATHS = frozenset({"/health", "/ready"})
# The tenant of keys that have none, and that of everybody where there are no keys.
DEFAULT, ANYBODY = "default", "anonymous"
# 64 bits: a guess at another tenant's id, which nobody can guess either, fails here too.
SEAL_DIGITS = 16
# As OpenAI's headers tell a limit, what is left of it, and when all of it is back.
RATED = {
    limit: tuple(b"x-ratelimit-%b-%b" % (what, name) for what in (b"limit", b"remaining", b"reset"))
    for limit, name in ((Limit.REQUESTS, b"requests"), (Limit.TOKENS, b"tokens"))
}

Count = Annotated[int, Field(ge=1)]
KeyHash = Annotated[str, Field(pattern=rf"^{HASH}[0-9a-f]{{64}}$")]
# Names are values of labels, and parts of what salts are made of.
TenantName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
Secret = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]


class TenantConfig(BaseModel):
    """A tenant. `keys`: the hashes of its keys, as `herd key new` prints them.

    `weight`: its share where requests wait, beside those of others. `priority`: as vLLM's, the lower the
    sooner. `shared_cache`: tenants of one such group share what engines have cached.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    keys: tuple[KeyHash, ...] = ()
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1.0
    priority: int = 0
    max_concurrent_requests: Count | None = None
    requests_per_minute: Count | None = None
    tokens_per_minute: Count | None = None
    shared_cache: TenantName | None = None
    allow_kv_transfer_params: bool = False

    @property
    def allowance(self) -> Allowance:
        """What it may use."""
        return Allowance(self.max_concurrent_requests, self.requests_per_minute, self.tokens_per_minute)


class TenantsFile(BaseModel):
    """A file of tenants. `secret`: what cache salts are made of; the same at every router of a fleet."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    secret: Secret | None = None
    tenants: dict[TenantName, TenantConfig]

    @model_validator(mode="after")
    def _of_one_each(self) -> TenantsFile:
        owners: dict[str, str] = {}
        for name, tenant in self.tenants.items():
            for key in tenant.keys:
                if owners.setdefault(key, name) != name:
                    raise ValueError(f"tenants.{name}.keys: a key of {owners[key]!r} too")
        return self

    @model_validator(mode="after")
    def _apart(self) -> TenantsFile:
        if self.secret is None and len({_scope(*each) for each in self.tenants.items()}) > 1:
            raise ValueError("secret: keeps the caches of tenants apart; `herd key secret` makes one")
        return self


class TenantsConfig(BaseModel):
    """Who may ask. `file`: a file of tenants, on the machine of every router. `keys`: in place of it the
    hashes of keys that all count as one tenant. With neither anybody may."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    file: str | None = None
    keys: tuple[KeyHash, ...] = ()

    @property
    def closed(self) -> bool:
        """Whether clients need a key."""
        return self.file is not None or bool(self.keys)

    @field_validator("file")
    @classmethod
    def _absolute(cls, path: str | None) -> str | None:
        if path is not None and not Path(path).is_absolute():
            raise ValueError(f"{path!r} is not an absolute path, and routers run in folders of their own")
        return path

    @model_validator(mode="after")
    def _one_source(self) -> TenantsConfig:
        if self.file is not None and self.keys:
            raise ValueError("keys: they belong into the file, if there is one")
        return self


def load(path: Path) -> TenantsFile:
    """A file of tenants; raises ConfigError that names the file and the key."""
    document = read_yaml(path)
    if not isinstance(document, dict):
        raise ConfigError(f"{path}: a mapping with `tenants` is expected")
    try:
        return checked(TenantsFile, document)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


class Tenant:
    """Whom a request is for. As a context it is one request, from `admit` to its end."""

    def __init__(self, name: str, config: TenantConfig, secret: str | None, metrics: Metrics) -> None:
        self.name = name
        self.known = name not in (ANYBODY, DEFAULT)
        self.quota = Quota(config.allowance)
        self._metrics = metrics.tenant(name)
        self.requests = self._metrics.requests  # (code)
        self._set(config, secret)

    def change(self, config: TenantConfig, secret: str | None, now: float) -> None:
        """Other settings from now on, for requests under way too."""
        self.quota.allow(config.allowance, now)
        self._set(config, secret)

    def _set(self, config: TenantConfig, secret: str | None) -> None:
        self.weight = config.weight
        self.priority = config.priority
        self.allow_transfer = config.allow_kv_transfer_params
        self.salt = salt_of(self.name, config, secret)
        self._seal = seal_of(self.name, secret)

    def new_response_id(self, replica_id: str) -> str:
        """The id of a response of the tenant's that this replica will keep."""
        return responses_api.new_id(replica_id, self._seal)

    def check_response(self, response_id: str, param: str) -> None:
        """Raises ResponseNotFound for one that is another tenant's."""
        if self._seal is not None and not responses_api.is_sealed(response_id, self._seal):
            raise ResponseNotFound(f"Tenant {self.name!r} has no response {response_id!r}", param=param)

    def admit(self, now: float) -> Tenant:
        """Takes one more request; raises RateLimited."""
        if (refusal := self.quota.refusal(now)) is not None:
            limit, allowed, wait_s = refusal
            told = f"The limit of tenant {self.name!r}, {allowed} {limit}, is reached"
            raise RateLimited(told, retry_after=math.ceil(wait_s), limits=self.headers(now))
        self.quota.enter(now)
        return self

    def __enter__(self) -> Tenant:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.quota.leave()

    def used(self, usage: Usage, now: float) -> None:
        """A request took so many tokens."""
        prompt, output = usage.prompt_tokens, usage.completion_tokens or 0
        self._metrics.prompt_tokens.inc(prompt)
        self._metrics.cached_tokens.inc(usage.cached_tokens)
        self._metrics.output_tokens.inc(output)
        self.quota.charge(prompt + output, now)

    def headers(self, now: float) -> Headers:
        """How it stands with its limits, as OpenAI tells it; nothing where it has none."""
        said: Headers = []
        if self.quota.limited:
            for limit, allowed, left, whole_s in self.quota.left(now):
                names = RATED[limit]
                said += zip(names, (b"%d" % allowed, b"%d" % left, b"%ds" % math.ceil(whole_s)), strict=True)
        return said


class Tenants:
    """All tenants, found by their keys. Raises ConfigError where the file is wrong from the start."""

    def __init__(self, config: TenantsConfig, metrics: Metrics) -> None:
        self._metrics = metrics
        self._path = Path(config.file) if config.file is not None else None
        self._stamp = _stamp(self._path)
        self._looking: asyncio.Task[None] | None = None
        self._tenants: dict[str, Tenant] = {}
        self._by_key: dict[bytes, Tenant] = {}
        self.quotas: dict[str, Quota] = {}  # of tenants that have limits
        self.weights: dict[str, float] = {}
        self._anybody: Tenant | None = None
        if self._path is not None:
            self._take(load(self._path), 0.0)
        elif config.keys:
            self._take(TenantsFile(tenants={DEFAULT: TenantConfig(keys=config.keys)}), 0.0)
        else:
            self._anybody = Tenant(ANYBODY, TenantConfig(), None, metrics)

    def start(self) -> None:
        """Sees changes of the file from now on."""
        if self._path is not None:
            self._looking = asyncio.get_running_loop().create_task(self._look(self._path))

    def stop(self) -> None:
        """Sees none any more."""
        if self._looking is not None:
            self._looking.cancel()

    def of(self, request: Request) -> Tenant | None:
        """Whom a request is for; None where everybody is answered. Raises Unauthorized."""
        if request.path in OPEN_PATHS:
            return None
        if self._anybody is not None:
            return self._anybody
        keys = [digest(key) for key in sent_with(request)]
        for key in keys:
            if (tenant := self._by_key.get(key)) is not None:
                return tenant
        told = "The API key is not known here" if keys else "An API key is needed: Authorization: Bearer KEY"
        raise Unauthorized(told)

    async def _look(self, path: Path) -> None:
        while True:
            await asyncio.sleep(LOOK_S)
            if (stamp := _stamp(path)) != self._stamp:
                self._stamp = stamp
                await self._read_again(path)

    async def _read_again(self, path: Path) -> None:
        """Beside the loop, which a file of a thousand tenants would hold for a second."""
        try:
            file = await asyncio.to_thread(load, path)
        except ConfigError as error:
            self._metrics.tenants_file_refused.set(1)
            log.error("%s. The tenants before it stay", error)
            return
        self._take(file, asyncio.get_running_loop().time())
        self._metrics.tenants_file_refused.set(0)
        log.info("%s was read again: %d tenants", path, len(self._tenants))

    def _take(self, file: TenantsFile, now: float) -> None:
        """These are all; those that were there before go on with what they have used."""
        before, self._tenants, self._by_key = self._tenants, {}, {}
        for name, config in file.tenants.items():
            tenant = before.get(name)
            if tenant is None:
                tenant = Tenant(name, config, file.secret, self._metrics)
            else:
                tenant.change(config, file.secret, now)
            self._tenants[name] = tenant
            self._by_key.update((digest_in(key), tenant) for key in config.keys)
        self.quotas = {name: t.quota for name, t in self._tenants.items() if t.quota.limited}
        self.weights.clear()  # lines hold on to it
        self.weights.update((name, tenant.weight) for name, tenant in self._tenants.items())


def salt_of(name: str, config: TenantConfig, secret: str | None) -> Salt | None:
    """What makes cache salts for a tenant; None where caches are not kept apart.

    A client's own salt divides its tenant's cache further. vLLM takes no salts of over 128 characters.
    """
    if secret is None:
        return None
    key = _key(secret, _scope(name, config))
    own = _salt(key, "")

    def salt(given: str | None) -> str:
        return _salt(key, given) if given else own

    return salt


def seal_of(name: str, secret: str | None) -> Seal | None:
    """What marks the ids of a tenant's stored responses as its own; None where tenants are not kept apart."""
    if secret is None:
        return None
    key = _key(secret, f"responses of {name}")
    return lambda made: hmac.digest(key, made.encode(), "sha256").hex()[:SEAL_DIGITS]


def _key(secret: str, purpose: str) -> bytes:
    return hmac.digest(bytes.fromhex(secret), purpose.encode(), "sha256")


def _salt(key: bytes, given: str) -> str:
    return urlsafe_b64encode(hmac.digest(key, given.encode(), "sha256")).rstrip(b"=").decode("ascii")


def _scope(name: str, config: TenantConfig) -> str:
    """Who shares a cache."""
    return f"group {config.shared_cache}" if config.shared_cache is not None else f"tenant {name}"


def _stamp(path: Path | None) -> tuple[int, int, int] | None:
    """What changes with a file."""
    try:
        stat = path.stat() if path is not None else None
    except OSError:
        return None
    return (stat.st_mtime_ns, stat.st_size, stat.st_ino) if stat is not None else None
