"""How much a tenant may use: requests at once, requests and tokens per minute. Pure.

What a minute allows may be spent at once and comes back evenly. Nobody knows what a request will take before
it has ended, so tokens are charged afterwards, and a tenant in debt waits until that is paid back.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

import msgspec

MINUTE_S = 60.0
# When one of a tenant's own requests will end is not known: it is told to ask again after this.
BUSY_S = 1.0


class Limit(StrEnum):
    """What there can be too much of, in words for the client."""

    CONCURRENT = "requests at once"
    REQUESTS = "requests per minute"
    TOKENS = "tokens per minute"


@dataclass(frozen=True, slots=True)
class Allowance:
    """What a tenant may use, at all routers together; None: as much as there is."""

    concurrent: int | None = None
    requests_per_minute: int | None = None
    tokens_per_minute: int | None = None


UNLIMITED = Allowance()


class Refusal(NamedTuple):
    """Which limit keeps a request out, how high it is, and for how many seconds it will."""

    limit: Limit
    allowed: int
    wait_s: float


class Left(NamedTuple):
    """How it stands with a limit per minute: what is left of it, and seconds until all of it is back."""

    limit: Limit
    allowed: int
    left: int
    whole_s: float


class Use(msgspec.Struct, frozen=True, array_like=True):
    """What a tenant uses at one router: requests now, requests and tokens since the router's start."""

    in_flight: int = 0
    requests: int = 0
    tokens: int = 0


class Bucket:
    """So many a minute, and no more than that saved up. What is left may be below zero."""

    __slots__ = ("_at", "_level", "per_minute")

    def __init__(self, per_minute: int, used: float = 0.0, now: float = 0.0) -> None:
        self.per_minute = per_minute
        self._level = per_minute - used
        self._at = now

    def take(self, amount: int, now: float) -> None:
        """Whether or not there is so much."""
        self._level = self.level(now) - amount

    def level(self, now: float) -> float:
        """What is left. Times may come out of order; none counts twice."""
        if now > self._at:
            back = (now - self._at) / MINUTE_S * self.per_minute
            self._level = min(self._level + back, float(self.per_minute))
            self._at = now
        return self._level

    def wait_s(self, level: float, now: float) -> float:
        """Seconds until so much will be left."""
        return max(0.0, level - self.level(now)) / self.per_minute * MINUTE_S

    def left(self, limit: Limit, now: float) -> Left:
        """How it stands with it."""
        level, per_minute = self.level(now), self.per_minute
        return Left(limit, per_minute, max(0, int(level)), (1 - level / per_minute) * MINUTE_S)


class Quota:
    """A tenant's use of its allowance. What it uses at other routers counts too, once that is heard of."""

    __slots__ = ("_allowance", "_buckets", "_requests", "_tokens", "elsewhere", "in_flight", "limited")

    def __init__(self, allowance: Allowance) -> None:
        self.in_flight = 0
        self.elsewhere = 0  # in flight at other routers
        self._requests = self._tokens = 0
        self._allowance = UNLIMITED
        self._buckets: dict[Limit, Bucket] = {}
        self.allow(allowance, 0.0)

    def allow(self, allowance: Allowance, now: float) -> None:
        """Another allowance from now on. What was used of the one before stays used."""
        per_minute = {
            Limit.REQUESTS: allowance.requests_per_minute,
            Limit.TOKENS: allowance.tokens_per_minute,
        }
        before, self._buckets, self._allowance = self._buckets, {}, allowance
        self.limited = allowance != UNLIMITED  # whether there is anything to keep to
        for limit, allowed in per_minute.items():
            if allowed is not None:
                was = before.get(limit)
                used = was.per_minute - was.level(now) if was is not None else 0.0
                self._buckets[limit] = Bucket(allowed, used, now)

    @property
    def use(self) -> Use:
        """What other routers are told."""
        return Use(self.in_flight, self._requests, self._tokens)

    def refusal(self, now: float) -> Refusal | None:
        """Why a request cannot be taken now; None if it can. Nothing is counted."""
        concurrent = self._allowance.concurrent
        if concurrent is not None and self.in_flight + self.elsewhere >= concurrent:
            return Refusal(Limit.CONCURRENT, concurrent, BUSY_S)
        for limit, bucket in self._buckets.items():
            if (wait_s := bucket.wait_s(1, now)) > 0:
                return Refusal(limit, bucket.per_minute, wait_s)
        return None

    def enter(self, now: float) -> None:
        """A request was taken."""
        self.in_flight += 1
        self._requests += 1
        if self._buckets:
            self._take(Limit.REQUESTS, 1, now)

    def leave(self) -> None:
        """A request has ended."""
        self.in_flight -= 1

    def charge(self, tokens: int, now: float) -> None:
        """What a request took, of its prompt and of its output."""
        self._tokens += tokens
        if self._buckets:
            self._take(Limit.TOKENS, tokens, now)

    def used_elsewhere(self, requests: int, tokens: int, now: float) -> None:
        """What another router took from the same allowance."""
        self._take(Limit.REQUESTS, requests, now)
        self._take(Limit.TOKENS, tokens, now)

    def left(self, now: float) -> list[Left]:
        """How it stands with each limit per minute."""
        return [bucket.left(limit, now) for limit, bucket in self._buckets.items()]

    def _take(self, limit: Limit, amount: int, now: float) -> None:
        if (bucket := self._buckets.get(limit)) is not None:
            bucket.take(amount, now)


class Elsewhere:
    """What tenants use at the other routers, from reports of which any may be lost.

    A report tells totals, so each makes up for those before it. The first of a router is where counting
    begins: what was used there before this router heard of it is not known here.
    """

    def __init__(self) -> None:
        self._told: dict[str, dict[str, Use]] = {}

    def heard(self, router: str, uses: Mapping[str, Use], quotas: Mapping[str, Quota], now: float) -> None:
        """A router told what tenants use there."""
        told = self._told.setdefault(router, {})
        for name, use in uses.items():
            was = told.get(name)
            told[name] = use
            if was is not None and (quota := quotas.get(name)) is not None:
                quota.used_elsewhere(use.requests - was.requests, use.tokens - was.tokens, now)
        self._count(uses, quotas)

    def only(self, routers: frozenset[str], quotas: Mapping[str, Quota]) -> None:
        """All others are gone, and with them what was in flight there."""
        for router in self._told.keys() - routers:
            self._count(self._told.pop(router), quotas)

    def _count(self, names: Mapping[str, Use], quotas: Mapping[str, Quota]) -> None:
        for name in names:
            if (quota := quotas.get(name)) is not None:
                quota.elsewhere = sum(told[name].in_flight for told in self._told.values() if name in told)
