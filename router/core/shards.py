"""Which router process owns a request, where each holds a share of the index only."""

from __future__ import annotations

from collections.abc import Sequence

from xxhash import xxh3_64_intdigest


def owner(key: int, own: str, others: Sequence[str], shards: int) -> int | None:
    """The place among `others` of the router that owns what belongs to a key; None: this one does.

    `own` and `others` name the routers. Those with the highest weights, hashes of name and key, own it: one
    of so many as there are shards (rendezvous hashing, Thaler and Ravishankar 1998). All routers that know
    the same others agree, and when one comes or goes only its own keys move.
    """
    mine = _weight(own, key)
    weights = [_weight(name, key) for name in others]
    heavier = sum([weight > mine for weight in weights])
    if heavier < max(1, (len(others) + 1) // shards):
        return None
    return weights.index(max(weights))


def _weight(name: str, key: int) -> int:
    return xxh3_64_intdigest(name.encode(), key)
