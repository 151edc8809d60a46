"""How replicas and requests are divided among router processes, where none is to know every cache.

What a replica caches is known to the routers that have it in their share. What belongs together has one
owner, which places it on replicas of its share. All routers agree that know the same routers and replicas,
and when one comes or goes only its own part moves (rendezvous hashing, Thaler and Ravishankar 1998).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from math import log

from xxhash import xxh3_64_intdigest


def knowing(replica_id: str, routers: Iterable[str], shards: int) -> list[str]:
    """The routers that have a replica in their share: one of so many as there are shards, at least one."""
    key = xxh3_64_intdigest(replica_id.encode())
    ranked = sorted(routers, key=lambda name: xxh3_64_intdigest(name.encode(), key), reverse=True)
    return ranked[: max(1, len(ranked) // shards)]


def owner(key: int, shares: Mapping[str, int]) -> str:
    """The router that owns what belongs to a key.

    `shares`: how many replicas each router has that could serve it; it owns as large a part of all keys
    (Schindelhauer and Schomaker 2005, "Weighted Distributed Hash Tables").
    """
    return max(shares, key=lambda name: shares[name] / -log(_draw(name, key)))


def _draw(name: str, key: int) -> float:
    """A number between 0 and 1, neither included."""
    return ((xxh3_64_intdigest(name.encode(), key) >> 12) + 0.5) / 2**52
