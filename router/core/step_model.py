"""How long prefill and decode take on one replica; calibrates itself by what was observed.

A step takes a + b * prefill tokens + e * attention pairs + c * decoding sequences + d * context tokens. The
prior says how these relate to each other on a kind of engine; three factors, for prefill, for decoding and
for loading from slower tiers, are learnt online, because wrong constants cost more than wrong policies.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from math import exp, log
from statistics import median_low
from types import MappingProxyType

# vLLM's default --max-num-batched-tokens on a GPU: a longer prefill takes several steps.
STEP_TOKENS = 8192
# An observation moves the factor by at most so much, however far it lies off: the first ones fast, later ones
# slowly. So an outlier is one small step, as it is for a median.
FIRST_MOVE, LEAST_MOVE = 1.5, 0.02
# Of a shorter stream, the time is mostly chance: in which step it began and ended.
LEAST_TOKENS = 8
# What was seen of a replica fades within such a time (seconds) into what is seen of its kin. So one that
# looks slow, and is given nothing for that, gets another chance; what is observed meanwhile weighs more.
FADE_S = 300.0
# Factors that differ by less than a quarter, or that so few observations tell of, are taken to be the same.
ALIKE, TELLING = log(1.25), 20


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Coefficients in seconds: a step, a prefill token, a decoding sequence, a token that it attends to, a
    pair of tokens in prefill's attention, a token's KV that is loaded from a slower tier."""

    step: float
    prefill: float
    sequence: float
    context: float
    attention: float
    loading: float


# Roofline estimates for an 8B model on one H100, whose 128 KiB of KV a token come from the host's memory over
# PCIe 5.0 at 50 GB/s; the factors take care of other models and machines.
GPU = StepCosts(6e-3, 33e-6, 45e-6, 5.6e-8, 1.3e-9, 2.6e-6)
# By the kind of engine. On a CPU: what a 26M model does on one core.
PRIORS: Mapping[str, StepCosts] = MappingProxyType(
    {"vllm": GPU, "simulated": GPU, "vllm-cpu": StepCosts(8e-3, 7.5e-4, 5e-4, 1e-7, 1e-8, 2.6e-6)}
)


@dataclass(slots=True)
class Factor:
    """A factor on predictions, learnt from pairs of what was predicted and what was observed.

    Its `own` value follows the median of their ratio: each pair moves it a step up or down, and no further.
    `common`: what that is among those like it. Where the two are nearly the same, or little was observed, the
    difference is chance, which must not decide where requests go. `value`: what predictions are multiplied
    by.
    """

    own: float = 1.0
    observations: int = 0
    common: float | None = None
    value: float = 1.0

    def observe(self, predicted: float, observed: float) -> None:
        """One pair, in seconds, predicted with the factor as it is."""
        if predicted <= 0 or observed <= 0:
            return
        self.observations += 1
        most = max(LEAST_MOVE, FIRST_MOVE / self.observations)
        off = log(observed) - log(predicted) + log(self.value / self.own)
        self.own *= exp(max(-most, min(most, off)))
        self._choose()

    def fade(self, common: float, share: float) -> None:
        """A share of the way to what is common among its kin; all of it before the first observation."""
        self.own *= (common / self.own) ** (share if self.observations else 1.0)
        self.common = common
        self._choose()

    def _choose(self) -> None:
        common = self.own if self.common is None else self.common
        chance = self.observations < TELLING or abs(log(self.own / common)) < ALIKE
        self.value = common if chance else self.own


@dataclass(slots=True)
class StepModel:
    """The step times of one replica."""

    prior: StepCosts
    prefill: Factor = field(default_factory=Factor)
    decode: Factor = field(default_factory=Factor)
    loading: Factor = field(default_factory=Factor)

    @classmethod
    def of(cls, engine: str = "vllm") -> StepModel:
        """As it is before anything was observed; of an unknown kind of engine, as of vLLM."""
        return cls(PRIORS.get(engine, GPU))

    def prefill_s(self, new: int, before: int = 0) -> float:
        """Seconds to prefill `new` tokens that stand behind others, without what each step costs anyway."""
        prior = self.prior
        return self.prefill.value * new * (prior.prefill + prior.attention * (before + new / 2))

    def step_s(self, decoding: int, context: int) -> float:
        """Seconds of a step that decodes so many sequences with so many tokens behind them, all together."""
        prior = self.prior
        return self.decode.value * (prior.step + prior.sequence * decoding + prior.context * context)

    def loading_s(self, tokens: int) -> float:
        """Seconds to load the KV of so many tokens from a slower tier."""
        return self.loading.value * self.prior.loading * tokens

    def first_token_s(self, prefill: float, step: float) -> float:
        """Seconds until a line of so many seconds of prefill is done: each step of it decodes as well."""
        return prefill + step * (1 + prefill / self.prefill_s(STEP_TOKENS))

    def observe_first_token(
        self, predicted: float, prefill: float, observed: float, loading: float = 0.0
    ) -> None:
        """A first token that was `predicted` to take so long, `prefill` of it for prefilling, and `loading`.

        It tells of what most of it was.
        """
        if prefill > predicted / 2:
            self.prefill.observe(predicted, observed)
        elif loading > predicted / 2:
            self.loading.observe(predicted, observed)

    def observe_stream(self, num_tokens: int, step: float, decoding_s: float) -> None:
        """A stream's tokens after the first, and what they took beside prefills; `step` predicted of one."""
        if num_tokens >= LEAST_TOKENS:
            self.decode.observe(step * num_tokens, decoding_s)


def fade(kin: Sequence[StepModel], passed_s: float) -> None:
    """Time goes by for replicas that should be alike: the same kind of engine with the same model."""
    share = 1 - exp(-passed_s / FADE_S)
    for factors in zip(*((steps.prefill, steps.decode, steps.loading) for steps in kin), strict=True):
        common = _common(factors)
        for factor in factors:
            factor.fade(common, share)


def _common(factors: Iterable[Factor]) -> float:
    """The median of those that observed something."""
    return median_low([factor.own for factor in factors if factor.observations] or [1.0])
