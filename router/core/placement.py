"""Policies: a view of the fleet in, one replica with the reason out.

A policy is a pure function. What it would have to remember is in the view (`turn` counts placements), so
the live router, its tests and the simulator run the same code. After a failure the relay asks again with
`View.without`, which sees the fleet as it is then, instead of walking down a ranking that has aged.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType

from router.core.fleet import Standing, View


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes, and why."""

    standing: Standing
    reason: str


Policy = Callable[[View], Placement | None]


def least_requests(view: View) -> Placement | None:
    """The replica with the fewest requests in flight; equals take turns."""
    if not view.replicas:
        return None
    fewest = min(s.in_flight for s in view.replicas)
    equals = [s for s in view.replicas if s.in_flight == fewest]
    return Placement(equals[view.turn % len(equals)], f"fewest requests in flight ({fewest})")


def round_robin(view: View) -> Placement | None:
    """Each replica in turn."""
    if not view.replicas:
        return None
    place = view.turn % len(view.replicas)
    return Placement(view.replicas[place], f"turn {place + 1} of {len(view.replicas)}")


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {"least_requests": least_requests, "round_robin": round_robin}
)
