"""Policies: a view of the fleet in, one replica with the reason out.

A policy is a pure function. What it would have to remember or to draw is in the view, so the live router, its
tests and the simulator run the same code. After a failure the relay asks again with `View.without`, which
sees the fleet as it is then, instead of walking down a ranking that has aged.

docs/add-a-policy.md walks through one.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import ceil
from types import MappingProxyType

from xxhash import xxh3_64_intdigest

from router.core.fleet import NOTHING_CACHED, Forecast, Standing, View

# What a replica may hold in consistent_hash, times the average (Mirrokni, Thorup, Zadimoghaddam 2016,
# "Consistent Hashing with Bounded Loads"; HAProxy's manual calls 1.25 to 2 reasonable). An engine batches, so
# a queue costs less than a lost cache: with 8 replicas and 4 requests on each, chosen by uniform keys, 1.25
# sends 22 % away from their home, 1.5 sends 9 %.
BALANCE = 1.5

# kv_aware's weights, found in the twin (`scripts/bench placement`; docs/placement.md tells how). So many of a
# stream's tokens are waited for as its first one is.
STREAM_TOKENS = 100
# A second that a stream waits between two tokens, by the seconds that it waits there anyhow: streams that are
# slow already are close to being too slow.
HARM = 5.0
# A second of prefill where half of all time is prefill: what it takes from those who are yet to come.
CROWDING = 4.0


@dataclass(frozen=True, slots=True)
class Placement:
    """Where a request goes, and why.

    `forecasts` and `costs` (in seconds): what each replica of the view would have meant, for policies that
    go by it.
    """

    standing: Standing
    reason: str
    costs: tuple[float, ...] = ()
    forecasts: tuple[Forecast, ...] = ()


Policy = Callable[[View], Placement | None]


def least_requests(view: View) -> Placement | None:
    """The replica with the fewest requests in flight; equals take turns."""
    if not view.replicas:
        return None
    requests = [s.requests for s in view.replicas]
    fewest = min(requests)
    equals = [s for s, count in zip(view.replicas, requests, strict=True) if count == fewest]
    return Placement(equals[view.turn % len(equals)], f"fewest requests in flight ({fewest})")


def power_of_two(view: View) -> Placement | None:
    """Of two replicas drawn at random, the one with fewer requests in flight; of equals the first drawn."""
    count = len(view.replicas)
    if count < 2:
        return random(view)
    offset, place = divmod(view.draw, count)
    first = view.replicas[place]
    other = view.replicas[(place + 1 + offset % (count - 1)) % count]
    fewer, more = (first, other) if first.requests <= other.requests else (other, first)
    return Placement(fewer, f"{fewer.requests} requests in flight, {more.requests} on {more.id}")


def consistent_hash(view: View) -> Placement | None:
    """The home of the request's key, or while that is full the next by weight; least_requests without a key.

    The home is the replica of the highest weight, a hash of the replica's id and the key (rendezvous
    hashing, Thaler and Ravishankar 1998): when a replica comes or goes, only its own keys move. No replica
    is given more than `BALANCE` times its share of all requests in flight, so a popular key does not drown
    its home.

    Every router that knows the same ids agrees on the homes, also after it was started anew. With
    `herd route` an id is the engine's URL; on Serve it is new with every start, as the engine's cache is.
    """
    if view.key is None:
        placement = least_requests(view)
        return placement and Placement(placement.standing, f"no key; {placement.reason}")
    if not view.replicas:
        return None
    weights = [xxh3_64_intdigest(s.replica.id.encode(), view.key) for s in view.replicas]
    requests = [s.requests for s in view.replicas]
    most = ceil(BALANCE * (sum(requests) + 1) / len(requests))
    home = weights.index(max(weights))
    if requests[home] < most:
        return Placement(view.replicas[home], "home of the key")
    # The replica with the fewest requests has no more than the average, so there is always one with room.
    room = [place for place, held in enumerate(requests) if held < most]
    chosen = max(room, key=weights.__getitem__)
    full = f"{view.replicas[home].id} has {requests[home]} of at most {most} requests"
    return Placement(view.replicas[chosen], f"next for the key; its home {full}")


def round_robin(view: View) -> Placement | None:
    """Each replica in turn."""
    if not view.replicas:
        return None
    place = view.turn % len(view.replicas)
    return Placement(view.replicas[place], f"turn {place + 1} of {len(view.replicas)}")


def random(view: View) -> Placement | None:
    """Any replica, each as likely."""
    if not view.replicas:
        return None
    return Placement(view.replicas[view.draw % len(view.replicas)], f"drawn from {len(view.replicas)}")


def kv_aware(view: View) -> Placement | None:
    """The replica where the request costs least: its first token's wait, and what it holds up there."""
    if not view.replicas:
        return None
    had = view.cached.get
    forecasts = tuple(
        [s.forecast(view.num_tokens, had(s.id, NOTHING_CACHED), view.now) for s in view.replicas]
    )
    costs = tuple([_cost(forecast) for forecast in forecasts])
    least = min(costs)
    cheapest = [place for place, cost in enumerate(costs) if cost == least]
    chosen = view.replicas[cheapest[view.turn % len(cheapest)]]
    cached = had(chosen.id, NOTHING_CACHED)
    told = f"costs least ({least:.3f} s), {cached.known} tokens cached"
    return Placement(chosen, told, costs, forecasts)


def _cost(forecast: Forecast) -> float:
    """In seconds: the wait for the first token, how slowly others follow, what its prefill does to others."""
    busy, pace = forecast.busy, forecast.pace_s
    price = HARM * forecast.decoding * pace + CROWDING * busy / (1 - busy)
    return forecast.ttft_s + STREAM_TOKENS * pace + price * forecast.prefill_s


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        policy.__name__: policy
        for policy in (kv_aware, least_requests, power_of_two, consistent_hash, round_robin, random)
    }
)
# Those that read `View.key`; for the others the relay computes none.
KEYED = frozenset({consistent_hash})
# Those that read what is cached of the prompt.
PROMPTED = frozenset({kv_aware})
