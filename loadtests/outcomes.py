"""What became of simulated requests, and whether that is good enough."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from loadtests.trace import Arrival
from router.slo import Slo

# Of all requests, these come first and meet caches that are still empty: they are left out.
WARM_UP = 0.1
# A policy must not buy attainment with long prompts, so those count for themselves.
LONGEST = 0.1
# What is called sustainable: so much of all requests, and of the longest, within their SLO.
STRICT_ALL, STRICT_LONGEST = 0.90, 0.85


@dataclass(slots=True)
class Outcome:
    """One request and what became of it. Times in seconds, lengths and what was cached in tokens.

    `unloaded`: what its whole prefill takes on an idle engine. `crowding`: when it was placed, requests in
    flight on the busiest replica by those on the average one. `refused`: it waited in line, and went nowhere.
    """

    arrival: Arrival
    unloaded: float
    replica: str = ""
    predicted: int = 0
    crowding: float = 0.0
    ttft: float = 0.0
    tpot: float = 0.0
    reported: int = 0
    refused: bool = False

    def attained(self, slo: Slo) -> bool:
        """Whether its user got what was promised."""
        return not self.refused and self.ttft <= slo.first_token_s(self.unloaded) and self.tpot <= slo.tpot_s


@dataclass(frozen=True, slots=True)
class Summary:
    """A run in figures, warm-up left out. Shares are 0 to 1, times in seconds.

    `refused`: requests that fit no engine. `turned_away`: requests that routers refused; they are not within
    their SLO, and in no other figure. `hit`: prompt tokens that engines found in their caches.
    `predicted_right`: requests whose cached tokens were foreseen. `balance`: mean of `Outcome.crowding`, 1 at
    best.
    """

    requests: int
    refused: int
    attainment: float
    attainment_longest: float
    ttft_p50: float
    ttft_p90: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    hit: float
    predicted_right: float
    balance: float
    turned_away: float = 0.0

    @property
    def strict(self) -> bool:
        """Whether the load is sustained."""
        return self.attainment >= STRICT_ALL and self.attainment_longest >= STRICT_LONGEST


def summarize(outcomes: Sequence[Outcome], slo: Slo, refused: int = 0) -> Summary:
    """The figures of a run; `outcomes` in order of arrival."""
    kept = outcomes[int(len(outcomes) * WARM_UP) :]
    attained = np.array([outcome.attained(slo) for outcome in kept])
    lengths = np.array([outcome.arrival.input_length for outcome in kept])
    longest = lengths >= np.quantile(lengths, 1 - LONGEST)
    served = [outcome for outcome in kept if not outcome.refused]
    ttft_p50, ttft_p90, ttft_p99 = np.quantile([outcome.ttft for outcome in served], (0.5, 0.9, 0.99))
    streams = [outcome.tpot for outcome in served if outcome.arrival.output_length > 1] or [0.0]
    tpot_p50, tpot_p99 = np.quantile(streams, (0.5, 0.99))
    return Summary(
        requests=len(kept),
        refused=refused,
        attainment=float(attained.mean()),
        attainment_longest=float(attained[longest].mean()),
        ttft_p50=float(ttft_p50),
        ttft_p90=float(ttft_p90),
        ttft_p99=float(ttft_p99),
        tpot_p50=float(tpot_p50),
        tpot_p99=float(tpot_p99),
        hit=sum(outcome.reported for outcome in served) / sum(o.arrival.input_length for o in served),
        predicted_right=float(np.mean([outcome.predicted == outcome.reported for outcome in served])),
        balance=float(np.mean([outcome.crowding for outcome in served])),
        turned_away=1 - len(served) / len(kept),
    )
