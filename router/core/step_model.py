"""How long prefill and decode take on one replica; calibrates itself by what was observed.

A step takes a + b * prefill tokens + e * attention pairs + c * decoding sequences + d * context tokens. The
prior says how these relate to each other on a kind of engine; two factors, one for prefill and one for
decoding, are learnt online, because wrong constants cost more than wrong policies.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import exp, log
from types import MappingProxyType

# vLLM's default --max-num-batched-tokens on a GPU: a longer prefill takes several steps.
STEP_TOKENS = 8192
# An observation moves the factor by at most so much, however far it lies off: the first ones fast, later ones
# slowly. So an outlier is one small step, as it is for a median.
FIRST_MOVE, LEAST_MOVE = 1.5, 0.02


@dataclass(frozen=True, slots=True)
class StepCosts:
    """Coefficients in seconds: step, prefill token, decoding sequence, context token, attention pair."""

    step: float
    prefill: float
    sequence: float
    context: float
    attention: float = 0.0


# Roofline estimates for an 8B model on one H100, and what the 26M demo model does on one CPU core
# (0.75 ms a prefill token, 8 ms a token); the factors take care of the rest.
PRIORS: Mapping[str, StepCosts] = MappingProxyType(
    {
        "gpu": StepCosts(6e-3, 33e-6, 45e-6, 5.6e-8, 1.3e-9),
        "cpu": StepCosts(8e-3, 7.5e-4, 5e-4, 1e-7, 1e-8),
    }
)


@dataclass(slots=True)
class Factor:
    """A factor on predictions, learnt from pairs of what was predicted and what was observed."""

    value: float = 1.0
    observations: int = 0

    def observe(self, predicted: float, observed: float) -> None:
        """One observation, predicted with the factor as it is."""
        if predicted <= 0 or observed <= 0:
            return
        self.observations += 1
        most = max(LEAST_MOVE, FIRST_MOVE / self.observations)
        self.value *= exp(max(-most, min(most, log(observed / predicted))))


@dataclass(slots=True)
class StepModel:
    """The step times of one replica."""

    prior: StepCosts
    prefill: Factor
    decode: Factor

    @classmethod
    def of(cls, kind: str = "gpu") -> StepModel:
        """As it is before anything was observed; `kind`: a key of PRIORS."""
        return cls(PRIORS.get(kind, PRIORS["gpu"]), Factor(), Factor())

    def prefill_s(self, new: int, cached: int) -> float:
        """Seconds to prefill `new` tokens behind `cached` ones, without what each step costs anyway."""
        prior = self.prior
        return self.prefill.value * new * (prior.prefill + prior.attention * (cached + new / 2))

    def step_s(self, decoding: int, context: int) -> float:
        """Seconds of a step that decodes so many sequences with so many tokens behind them, all together."""
        prior = self.prior
        return self.decode.value * (prior.step + prior.sequence * decoding + prior.context * context)
