"""The waiting line: who goes next when replicas have enough to do, and who is refused.

An engine takes all it is sent and serves it in that order. What waits here instead can still be placed well,
be overtaken, be cancelled or be refused. A line is of one model in one router, and fills replicas only up to
that router's share.

Priority classes go strictly one before the other, and leave some room to those before them. Within a class
those that can still meet their SLO go before those that cannot. Among either, tenants share by tokens to be
computed (start-time fair queueing: Goyal, Vin and Cheng 1996), and a tenant's requests go in the order in
which they have to start.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from heapq import heappop, heapreplace
from itertools import count
from math import exp, inf
from types import MappingProxyType
from typing import Generic, NamedTuple, Protocol, TypeVar

from router.core.fleet import Standing, View
from router.core.placement import Placement

# So many of those who wait are looked at: the first may want a replica that is full while the next do not.
LOOK_AHEAD = 8
# Where a request may go, streams get their tokens within their SLO even if what prefills make them wait is
# counted so many times, since that varies. PRESSED is for one that has no time left. In the twin, where time
# to first token is to spare and time per token is not, a fleet sustains 5 % more so.
CALM, PRESSED = 2.6, 1.4
# So many times more where a better class asked within so long (seconds): its streams are there or come next,
# and are to meet less prefill. In the twin's overload premium requests fare so as before it; with 2 some do
# not, with 3 the others get a fifth less done.
RESERVE, ASKED_S = 2.5, 20.0
# Who wanted none of the replicas that had room is asked again after so long (seconds).
AGAIN_S = 0.1
# What counts as lately (seconds).
LATELY_S = 5.0
# What a client that is refused is asked to wait (seconds): no less, and nobody foresees more.
LEAST_RETRY_S, MOST_RETRY_S = 1.0, 60.0

# What a request's policy would choose at a time.
Look = Callable[[float], tuple[View, Placement | None]]


@dataclass(slots=True, eq=False)
class Ticket:
    """A request in line. Times in seconds, on the clock of the Fleet's verbs.

    `due`: when it has to start to meet its SLO. `tokens`: what is to be computed of it at best, 0 if unknown.
    `patience_s`: how long it waits once it is late. `cold`: it came while there was no replica at all; it
    does not become late by that. `priority`: lower goes first, as in vLLM. The rest is the line's own.
    """

    arrived_at: float
    due: float
    look: Look
    tokens: int = 0
    patience_s: float = inf
    cold: bool = False
    priority: int = 0
    tenant: str = ""
    number: int = -1
    late: bool = False
    turns_at: float = 0.0  # when it becomes late, or has waited too long

    @property
    def cost(self) -> int:
        """What its tenant is charged; unknown prompts count the same each."""
        return max(1, self.tokens)


def start_by(arrived_at: float, ttft_s: float, unloaded_s: float, backlog_s: float) -> float:
    """When a request has to start whose first token is due within `ttft_s`, and takes `unloaded_s` by itself.

    The replica that it goes to may have `backlog_s` to do first; half of the time to spare it waits anyhow.
    """
    spare = ttft_s - unloaded_s
    return arrived_at + spare - min(backlog_s, max(0.0, spare / 2))


T = TypeVar("T", bound=Ticket)


class Release(NamedTuple, Generic[T]):
    """A request whose wait is over, where it goes, and what its policy saw."""

    ticket: T
    view: View
    placement: Placement


class Bounds(Protocol):
    """When replicas have enough to do, and how long a line may get. Seconds, requests and tokens."""

    @property
    def backlog_s(self) -> float:
        """With more prefill promised and not done, a replica is given no more."""

    @property
    def awaiting(self) -> int:
        """Nor with so many requests that wait for their first token."""

    @property
    def max_waiting(self) -> int:
        """How many requests wait."""

    @property
    def max_waiting_tokens(self) -> int:
        """What is to be computed of all of them."""

    @property
    def max_wait_s(self) -> float:
        """How long each waits."""

    @property
    def max_cold_s(self) -> float:
        """How long each waits that came while there was no replica."""


class Room(NamedTuple):
    """What streams wait for each token at a replica that may be given more: a step, and others' prefill."""

    step_s: float
    prefill_s: float


class Lately:
    """A sum of what was lately, the older the less."""

    def __init__(self, now: float) -> None:
        self._sum = 0.0
        self._as_of = now

    def add(self, amount: float, now: float) -> None:
        """More of it."""
        self._sum, self._as_of = self.at(now) + amount, now

    def at(self, now: float) -> float:
        """What is left of it."""
        return self._sum * exp((self._as_of - now) / LATELY_S)


class Lane(Generic[T]):
    """Those of a class that go by the same rule, shared between tenants by their weights.

    A tenant's tag is what it was served by its weight, and the least one goes next. `_clock` is the tag of
    the last that went: who comes anew or comes back starts there, having saved nothing up meanwhile.
    """

    def __init__(self, weights: Mapping[str, float]) -> None:
        self._weights = weights
        self._queues: dict[str, list[tuple[float, int, T]]] = {}
        self._costs: dict[str, int] = {}  # of all that a tenant has here
        self._order: list[tuple[float, str]] = []  # tags of those that wait
        self._tags: dict[str, float] = {}
        self._clock = 0.0

    def __bool__(self) -> bool:
        return bool(self._queues)

    def add(self, ticket: T) -> None:
        """It waits here from now on."""
        tenant = ticket.tenant
        queue = self._queues.get(tenant)
        if queue is None:
            queue = self._queues[tenant] = []
            tag = self._tags[tenant] = max(self._clock, self._tags.get(tenant, 0.0))
            insort(self._order, (tag, tenant))
            self._costs[tenant] = 0
        insort(queue, (ticket.due, ticket.number, ticket))
        self._costs[tenant] += ticket.cost

    def remove(self, ticket: T, served: bool = False) -> None:
        """It does not wait here any more; if it was served its tenant is charged."""
        tenant = ticket.tenant
        queue, tag = self._queues[tenant], self._tags[tenant]
        del queue[bisect_left(queue, (ticket.due, ticket.number))]
        del self._order[bisect_left(self._order, (tag, tenant))]
        self._costs[tenant] -= ticket.cost
        if served:
            self._clock = max(self._clock, tag)
            tag = self._tags[tenant] = tag + self._charge(ticket)
        if queue:
            insort(self._order, (tag, tenant))
        else:
            del self._queues[tenant], self._costs[tenant]

    def first(self, most: int) -> list[T]:
        """Who is next, and who would be after each."""
        heads = [(tag, tenant, 0) for tag, tenant in self._order[:most]]  # sorted, so it is a heap
        found: list[T] = []
        while heads and len(found) < most:
            tag, tenant, place = heads[0]
            queue = self._queues[tenant]
            ticket = queue[place][2]
            found.append(ticket)
            if place + 1 < len(queue):
                heapreplace(heads, (tag + self._charge(ticket), tenant, place + 1))
            else:
                heappop(heads)
        return found

    def last(self) -> T:
        """Of the tenant that has most in line for its weight, the one with most time left."""
        most = max(self._costs, key=lambda tenant: self._costs[tenant] / self._weight(tenant))
        return self._queues[most][-1][2]

    def _charge(self, ticket: T) -> float:
        return ticket.cost / self._weight(ticket.tenant)

    def _weight(self, tenant: str) -> float:
        return self._weights.get(tenant, 1.0)


class Line(Generic[T]):
    """Everyone who waits for a replica of one model, at one router.

    `tpot_s`: how often the model's streams are to get a token; inf where nobody says. `weights`: of tenants,
    1 for others. `routers`: how many there are that fill the same replicas. `came`, `came_tokens`,
    `went_tokens`: requests so far, what is to be computed of them, and of those of them that went.
    """

    def __init__(
        self,
        bounds: Bounds,
        now: float,
        tpot_s: float = inf,
        weights: Mapping[str, float] = MappingProxyType({}),
    ) -> None:
        self.routers = 1
        self.tokens = 0
        self.came = self.came_tokens = self.went_tokens = 0
        self._bounds = bounds
        self._tpot_s = tpot_s
        self._weights = weights
        self._lanes: dict[tuple[int, bool], Lane[T]] = {}
        self._keys: list[tuple[int, bool]] = []  # of the lanes, in the order in which they go
        self._turns: list[tuple[float, int, T]] = []  # by when something becomes of each
        self._numbers = count()
        self._asked: dict[int, float] = {}  # when a request of each class came last
        self._vain: tuple[float, AbstractSet[str], list[int]] = (-inf, frozenset(), [])
        self._began = now
        self._served = Lately(now)  # tokens of those that went

    def __len__(self) -> int:
        return len(self._turns)

    def __contains__(self, ticket: T) -> bool:
        place = bisect_left(self._turns, (ticket.turns_at, ticket.number))
        return place < len(self._turns) and self._turns[place][2] is ticket

    # -- who comes and leaves

    def enter(self, ticket: T, now: float) -> list[T]:
        """A request comes. Returns who is refused for it: itself, or others that are worth less."""
        ticket.number = next(self._numbers)
        self._asked[ticket.priority] = now
        self._came(ticket)
        if ticket.cost > self._bounds.max_waiting_tokens:
            return [ticket]  # it would never fit, whoever made room
        self._add(ticket, late=now > ticket.due and not ticket.cold)
        refused: list[T] = []
        while len(self) > self._bounds.max_waiting or self.tokens > self._bounds.max_waiting_tokens:
            last = self._lanes[self._keys[-1]].last()
            if (last.priority, last.late, last.tenant) == (ticket.priority, ticket.late, ticket.tenant):
                last = ticket  # of equals, who was there first stays
            self._remove(last)
            refused.append(last)
            if last is ticket:
                break
        return refused

    def leave(self, ticket: T) -> bool:
        """It is given up. False if it did not wait any more."""
        if ticket not in self:
            return False
        self._remove(ticket)
        return True

    def expired(self, now: float) -> list[T]:
        """Those that waited too long; they do not wait any more."""
        found = []
        while self._turns and self._turns[0][0] <= now:
            ticket = self._turns[0][2]
            self._remove(ticket)
            if ticket.late or ticket.cold:
                found.append(ticket)
            else:
                self._add(ticket, late=True)
        return found

    # -- who goes

    def passes(self, ticket: T, placement: Placement, now: float) -> bool:
        """Whether a request that comes goes at once: nobody waits, and there is room for it."""
        self._asked[ticket.priority] = now
        room = None if self._turns else self._room(placement.standing, now)
        if room is None or not self._fits(room, self._weight(ticket, now)):
            return False
        self._came(ticket)
        self._went(ticket, now)
        return True

    def next(self, standings: Sequence[Standing], now: float) -> Release[T] | None:
        """Who goes now, and where; it does not wait any more.

        `standings`: those of the model that are ready. To be asked again at once, when the fleet has counted
        this one, until nobody goes.
        """
        rooms = {s.id: room for s in standings if (room := self._room(s, now)) is not None}
        if not rooms:
            return None
        first = self._first()
        if self._in_vain(rooms, first, now):
            return None
        for ticket in first:
            weight = self._weight(ticket, now)
            fit = [id for id, room in rooms.items() if self._fits(room, weight)]
            if not fit:
                continue
            view, placement = ticket.look(now)
            if placement is not None and placement.standing.id in fit:
                self._remove(ticket, served=True)
                self._went(ticket, now)
                return Release(ticket, view, placement)
        self._vain = (now, rooms.keys(), [ticket.number for ticket in first])
        return None

    def _in_vain(self, rooms: Mapping[str, Room], first: Sequence[T], now: float) -> bool:
        """Whether these were asked a moment ago, and wanted none of these replicas."""
        since, seen, asked = self._vain
        recent = now < since + AGAIN_S and rooms.keys() <= seen
        return recent and [ticket.number for ticket in first] == asked

    def retry_after_s(self, now: float) -> float:
        """In how many seconds those who wait now will have gone, if it goes on as it did lately."""
        if not self._turns:
            return LEAST_RETRY_S
        rate = self._rate(now)
        return max(LEAST_RETRY_S, min(MOST_RETRY_S, self.tokens / rate if rate else inf))

    def _room(self, standing: Standing, now: float) -> Room | None:
        """What streams wait at a replica; None if that has enough to do.

        Nothing where there are none, or where one would be too slow alone. Of what a replica may have to do
        each router gives its share, since the others see the same room.
        """
        bounds, others = self._bounds, standing.elsewhere
        own_s, own = standing.own_backlog_s(now), standing.awaiting_first_token
        if own_s > bounds.backlog_s / self.routers or own_s + others.prefill_s > bounds.backlog_s:
            return None
        awaiting = own + others.in_flight - others.decoding
        if own >= max(1, bounds.awaiting / self.routers) or awaiting >= bounds.awaiting:
            return None
        decoding, context = standing.decoding + others.decoding, standing.context + others.context
        if not decoding or standing.steps.step_s(1, context // decoding) >= self._tpot_s:
            return Room(0.0, 0.0)
        step, busy = standing.step_s(), standing.busy(now)
        return Room(step, step * busy / (1 - busy))

    def _weight(self, ticket: T, now: float) -> float:
        """How many times that counts which streams wait for prefills where this one goes."""
        slack = ticket.due - ticket.arrived_at
        pressed = 0.0 if ticket.late or slack <= 0 else min(1.0, (now - ticket.arrived_at) / slack)
        weight = CALM + (PRESSED - CALM) * pressed
        return RESERVE * weight if self._better_asked(ticket.priority, now) else weight

    def _better_asked(self, priority: int, now: float) -> bool:
        """Whether a request of a better class came lately."""
        return any(better < priority and now < at + ASKED_S for better, at in self._asked.items())

    def _fits(self, room: Room, weight: float) -> bool:
        return room.step_s + weight * room.prefill_s < self._tpot_s

    # -- keeping the books

    def _came(self, ticket: T) -> None:
        self.came += 1
        self.came_tokens += ticket.cost

    def _went(self, ticket: T, now: float) -> None:
        self.went_tokens += ticket.cost
        self._served.add(ticket.cost, now)

    def _first(self) -> list[T]:
        found: list[T] = []
        for key in self._keys:
            found += self._lanes[key].first(LOOK_AHEAD - len(found))
            if len(found) == LOOK_AHEAD:
                break
        return found

    def _add(self, ticket: T, late: bool) -> None:
        ticket.late = late
        ends = min(ticket.arrived_at + self._bounds.max_wait_s, ticket.due + ticket.patience_s)
        ticket.turns_at = ends if late else min(ticket.due, ends)
        if ticket.cold:
            ticket.turns_at = ticket.arrived_at + self._bounds.max_cold_s
        key = (ticket.priority, late)
        if key not in self._lanes:
            self._lanes[key] = Lane(self._weights)
            insort(self._keys, key)
        self._lanes[key].add(ticket)
        insort(self._turns, (ticket.turns_at, ticket.number, ticket))
        self.tokens += ticket.cost

    def _remove(self, ticket: T, served: bool = False) -> None:
        key = (ticket.priority, ticket.late)
        lane = self._lanes[key]
        lane.remove(ticket, served)
        if not lane:
            del self._lanes[key]
            self._keys.remove(key)
        del self._turns[bisect_left(self._turns, (ticket.turns_at, ticket.number))]
        self.tokens -= ticket.cost

    def _rate(self, now: float) -> float:
        """Tokens a second that went lately; at first there are not many seconds to tell by."""
        seen = LATELY_S * (1 - exp((self._began - now) / LATELY_S))
        return self._served.at(now) / max(1.0, seen)
