"""A fleet in the twin that grows and shrinks: replicas start, warm up, serve, leave and stop.

A scaler says every second how many replicas there are to be. Those that are too many leave, the newest first,
as Ray Serve has it: they are given nothing more, their streams finish, and then they stop. A replica costs
from when it was asked for until it stops.
"""

from __future__ import annotations

from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import ceil

from loadtests.outcomes import Outcome
from loadtests.trace import BLOCK_TOKENS, Arrival
from loadtests.twin import MODEL, Content, PolicyFactory, Request, Router, Run, Setting, Twin, Waiter
from router.core.autoscale import Ability, Autoscaler, Bounds, Decision, Supply
from router.core.demand import Work, work
from router.core.fleet import View
from router.core.hot_prefixes import HotPrefixes, Prefix
from router.core.placement import Placement
from router.core.step_model import StepModel
from router.line import MOST_PRIORITY

# How often a scaler is asked (seconds).
TICK_S = 1.0

# How many replicas there are to be.
Scaler = Callable[[float, Mapping[str, Work], Supply], int]


class Herd:
    """The router's own. `decisions`: all that changed something."""

    def __init__(self, bounds: Bounds, tpot_s: float) -> None:
        self.decisions: list[Decision] = []
        self._autoscaler = Autoscaler(bounds, 0.0, tpot_s)

    def __call__(self, now: float, works: Mapping[str, Work], supply: Supply) -> int:
        decision = self._autoscaler.decide(now, works, supply)
        if decision.target != decision.before:
            self.decisions.append(decision)
        return decision.target


@dataclass(slots=True)
class Ray:
    """Ray Serve's default policy, as ray 2.56's autoscaling_policy.py has it, with its factors at 1.

    Requests in line and at replicas on average over `look_back_s`, by `target` for each replica; what that
    asks for has to be asked for all the time for `up_s` or `down_s`. Its signals are fresher here than Ray's,
    which are pushed every ten seconds.
    """

    target: float
    least: int
    most: int
    down_s: float = 600.0
    up_s: float = 30.0
    look_back_s: float = 30.0
    _counts: deque[tuple[float, int]] = field(default_factory=deque)
    _since: float | None = None
    _grows: bool = False

    def __call__(self, now: float, works: Mapping[str, Work], supply: Supply) -> int:
        """As often as it is asked it samples."""
        self._counts.append((now, sum(each.waiting + each.in_flight for each in works.values())))
        while self._counts[0][0] <= now - self.look_back_s:
            self._counts.popleft()
        requests = sum(count for _, count in self._counts) / len(self._counts)
        return self.delayed(now, ceil(requests / self.target), supply.target)

    def delayed(self, now: float, desired: int, current: int) -> int:
        """What comes of it when so many are desired now, and so many were asked for before."""
        desired = max(self.least, min(self.most, desired))
        if desired == current:
            self._since = None
            return current
        grows = desired > current
        if self._since is None or grows != self._grows:
            self._since, self._grows = now, grows
        if now - self._since < (self.up_s if grows else self.down_s):
            return current
        self._since = None
        return desired


@dataclass(slots=True)
class Life:
    """A replica's times, in seconds; None while they lie ahead. `ready_at`: it is given requests."""

    asked_at: float
    ready_at: float | None = None
    left_at: float | None = None
    stopped_at: float | None = None

    def cost_s(self, begins: float, ends: float) -> float:
        """Seconds that it took a GPU within these."""
        until = ends if self.stopped_at is None else min(ends, self.stopped_at)
        return max(0.0, until - max(begins, self.asked_at))


class Replay(Request):
    """A request of nobody's: it is made for what it leaves in the cache."""


@dataclass(frozen=True, slots=True)
class Changes:
    """How replicas come and go. Seconds: what one takes to start; for how long it replays what is hot before
    it serves, at most; and how much prefill goes into what only a leaving one had."""

    startup_s: float = 60.0
    warm_s: float = 0.0
    handover_s: float = 0.0


class Elastic(Twin):
    """One run. The fleet starts with `setting.replicas`, and is scaled until `ends`."""

    def __init__(
        self,
        setting: Setting,
        policy: PolicyFactory,
        seed: int,
        scaler: Scaler,
        ends: float,
        changes: Changes = Changes(),
    ) -> None:
        super().__init__(setting, policy, seed)
        self.lives = {id: Life(0.0, ready_at=0.0) for id in setting.replica_ids}
        self.placed: list[tuple[float, Outcome]] = []
        self._scaler = scaler
        self._ends = ends
        self._changes = changes
        self._hot = HotPrefixes(chunk_tokens=1)
        self._replays: dict[str, Iterator[Replay]] = {}  # by the one that is under way
        self._replayed = 0
        self._left_over: deque[Prefix] = deque()
        self._hands_over = False
        self._ability = Ability(StepModel.of("simulated"), setting.engine.num_gpu_blocks * BLOCK_TOKENS)
        self.timeline.at(TICK_S, self._tick)

    # -- how many there are

    def _tick(self) -> None:
        now = self.timeline.now
        if now < self._ends:
            works = {str(n): self._work(router) for n, router in enumerate(self._routers)}
            self.scale(self._scaler(now, works, self._supply()))
            self.timeline.at(now + TICK_S, self._tick)

    @staticmethod
    def _work(router: Router) -> Work:
        return work(router.fleet, MODEL, [] if router.line is None else [router.line])

    def _supply(self) -> Supply:
        staying = self._staying()
        ready = sum(self.lives[id].ready_at is not None for id in staying)
        for standing in self._routers[0].fleet.of_model(MODEL)[:1]:
            self._ability = Ability(standing.steps, self._ability.kv_tokens)
        return Supply(len(staying), ready, self._ability, self._changes.startup_s)

    def _staying(self) -> list[str]:
        """Replicas that are not on their way out, the oldest first."""
        return [id for id, life in self.lives.items() if life.left_at is None]

    def scale(self, target: int) -> None:
        """So many replicas from now on."""
        staying = self._staying()
        for _ in range(target - len(staying)):
            self._begin()
        for id in reversed(staying[target:]):
            self._leave(id)

    # -- one comes

    def _begin(self) -> None:
        id, now = f"replica-{len(self.lives)}", self.timeline.now
        self.lives[id] = Life(now)
        self.timeline.at(now + self._changes.startup_s, self._started, id)

    def _started(self, id: str) -> None:
        """It answers: routers know of it, and give it nothing before it is warm."""
        life, now = self.lives[id], self.timeline.now
        if life.left_at is not None:
            return
        self._engines[id] = self._engine(id)
        self._in_flight[id] = 0
        for router in self._routers:
            router.joined(id, now)
            router.fleet.suspected(id, now)
        self._replay(self._warming(id))

    def _warming(self, id: str) -> Iterator[Replay]:
        """One request after the other, and at last it is ready."""
        router, budget_s = self._routers[0], self._changes.warm_s
        until = self.timeline.now + budget_s
        for prefix in self._hottest(budget_s, lambda key: True):
            if self.timeline.now >= until or self.lives[id].left_at is not None:
                break
            yield self._again(prefix, router, id)
        if self.lives[id].left_at is None:
            self._ready(id)

    def _ready(self, id: str) -> None:
        now = self.lives[id].ready_at = self.timeline.now
        for router in self._routers:
            router.fleet.recovered(id, now)
            self._freed(router)

    # -- one goes

    def _leave(self, id: str) -> None:
        life, now = self.lives[id], self.timeline.now
        life.left_at = now
        if id not in self._engines:  # it had not started
            life.stopped_at = now
            return
        only_here = self._only_at(id)
        for router in self._routers:
            router.fleet.left(id)
        self._left_over.extend(only_here)
        if not self._hands_over:
            self._hands_over = True
            self._replay(self._handing_over())
        self._stop_if_done(id)

    def _only_at(self, id: str) -> list[Prefix]:
        """The hottest of what no other replica holds."""
        fleet = self._routers[0].fleet
        told, bits = fleet.index.told, {standing.id: standing.bit for standing in fleet.of_model(MODEL)}
        own, others = bits.pop(id), list(bits.values())

        def wanted(key: int) -> bool:
            return told([key], own) > 0 and not any(told([key], bit) for bit in others)

        return self._hottest(self._changes.handover_s, wanted)

    def _handing_over(self) -> Iterator[Replay]:
        """One after the other in the whole fleet, behind all that users ask."""
        while self._left_over:
            request = self._again(self._left_over.popleft(), self._routers[0])
            yield request
        self._hands_over = False

    def _stop_if_done(self, id: str) -> None:
        if not self._in_flight[id]:
            self.lives[id].stopped_at = self.timeline.now
            del self._engines[id], self._in_flight[id]

    # -- what is replayed

    def _hottest(self, budget_s: float, wanted: Callable[[int], bool]) -> list[Prefix]:
        blocks = budget_s / self._ability.steps.prefill_s(BLOCK_TOKENS)
        return self._hot.hottest(self.timeline.now, blocks, wanted) if budget_s else []

    def _again(self, prefix: Prefix, router: Router, replica: str = "") -> Replay:
        """The request for one token that computes it, at this replica or at any."""
        ids = array("I", prefix.token_ids).tolist()
        arrival = Arrival(self.timeline.now, len(ids) * BLOCK_TOKENS, 1, ids, priority=MOST_PRIORITY)
        content, outcome = Content(arrival, self._fresh), Outcome(arrival, 0.0, replica)
        self._replayed += 1
        return Replay(f"replay-{self._replayed}", router, content, outcome)

    def _replay(self, requests: Iterator[Replay]) -> None:
        """The next one, whose end brings the one after it."""
        if (request := next(requests, None)) is None:
            return
        self._replays[request.id] = requests
        if id := request.outcome.replica:
            self._send(request, id)
        elif request.router.line is not None:
            self._queue(request.router, request.router.line, request, *self._look(request, self.timeline.now))

    def _send(self, request: Replay, id: str) -> None:
        """Past the line and the policy: to one that is not given anything else yet."""
        request.flight = request.router.fleet.started(id, self.timeline.now, request.content.prompt)
        self._in_flight[id] += 1
        self._requests[request.id] = request
        self._engines[id].add(request.id, request.content, 1)

    # -- what else the twin does not tell

    def _start(self, request: Request, view: View, placed: Placement) -> None:
        super()._start(request, view, placed)
        if isinstance(request, Replay):
            return
        now, content = self.timeline.now, request.content
        self.placed.append((now, request.outcome))
        ids = array("I", content.ids).tobytes()
        self._hot.saw(content.prompt.keys(BLOCK_TOKENS), ids, 1, now)

    def _finished(self, request: Request, now: float) -> None:
        super()._finished(request, now)
        if request.id in self._replays:
            self._replay(self._replays.pop(request.id))
        if self.lives[request.outcome.replica].left_at is not None:
            self._stop_if_done(request.outcome.replica)

    def _refuse(self, waiters: Iterable[Waiter]) -> None:
        for waiter in waiters:
            waiter.request.outcome.refused = True
            if waiter.request.id in self._replays:
                self._replay(self._replays.pop(waiter.request.id))


def run(twin: Elastic, arrivals: Iterable[Arrival]) -> Run:
    """Serves these requests to the last token."""
    for arrival in arrivals:
        twin.timeline.at(arrival.at, twin.arrive, arrival)
    twin.timeline.run()
    return twin.run
