"""Several tenants of one fleet."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random

from loadtests.scenarios.session import Ask, Load, Scenario, Session, Slo, say, setting
from loadtests.words import words


@dataclass(frozen=True, slots=True)
class Tenant:
    """Who asks: how much of all requests, how long they are, in which class."""

    name: str
    share: float
    prompt_tokens: int
    output_tokens: int
    priority: int | None = None


QUIET = Tenant("quiet", share=0.2, prompt_tokens=100, output_tokens=48)
NIGHTLY = Tenant("nightly", share=0.2, prompt_tokens=600, output_tokens=96, priority=10)
NOISY = Tenant("noisy", share=0.6, prompt_tokens=1200, output_tokens=96)


@dataclass(frozen=True)
class Tenants(Scenario):
    """Several tenants of one fleet: a quiet one with short questions, a noisy one with most of the load, and
    nightly work of a lower class. The thresholds are the quiet one's: others must not be able to break them.
    """

    name = "tenants"
    load = Load(rate=8.0)
    slo = Slo(tenant=QUIET.name)

    noise: float = setting(1.0, "So many times as many requests of the noisy tenant")
    system_tokens: int = setting(200, "Words of the system prompt that each tenant has", 1)
    keys: str = setting("", "Their keys: quiet=KEY,noisy=KEY,nightly=KEY; one not named uses --api-key")

    def __post_init__(self) -> None:
        super().__post_init__()
        if unknown := self.key_of.keys() - {tenant.name for tenant in (QUIET, NIGHTLY, NOISY)}:
            raise ValueError(f"keys: no tenant of this scenario: {', '.join(sorted(unknown))}")

    @property
    def key_of(self) -> dict[str, str]:
        """Keys by tenant, of those that have one."""
        pairs = (pair.partition("=") for pair in self.keys.split(",") if pair)
        return {name: key for name, _, key in pairs}

    def session(self, seed: str) -> Session:
        """One request of one of them."""
        shares = [QUIET.share, NIGHTLY.share, NOISY.share * self.noise]
        (tenant,) = Random(seed).choices((QUIET, NIGHTLY, NOISY), shares)
        system = say("system", words(self.system_tokens, f"system of {tenant.name}"))
        asked = say("user", words(tenant.prompt_tokens, seed))
        yield Ask((system, asked), tenant.output_tokens, tenant=tenant.name, priority=tenant.priority)
