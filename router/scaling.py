"""How many replicas each model is to have: the routers count what is asked, and the first of them decides.

What is decided is decided in router/core/autoscale.py. Every router knows what all counted, from gossip, and
follows the decisions of the first among them by name; so the next one goes on where that left off. Serve is
told through `targets`, and who runs replicas in another way reads the same from `/scaling` or `/metrics`.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Annotated, Any, Protocol

from pydantic import BaseModel, ConfigDict, Field, model_validator

from router.core.autoscale import Ability, Autoscaler, Decision, Supply
from router.core.demand import Demand, Scaled, Work, work
from router.core.fleet import UNTOLD_CAPACITY, Fleet, Standing, State
from router.core.startups import StartUps
from router.core.step_model import StepModel
from router.line import Lines
from router.metrics import Metrics
from router.slo import Slo
from router.tokenizer_config import ANY

log = logging.getLogger(__name__)

# What a second brings is enough to see a surge by, and not so little that chance decides.
TICK_S = 1.0
# So many decisions that changed something are kept.
KEPT = 100


class Replicas(BaseModel):
    """How many replicas a model may have, and when it has how many. A number by itself is both ends.

    `min`, `max`: no fewer and no more; with a `min` of 0 the last one goes after `idle_s` seconds without
    requests, and the first request waits for the next. `initial`: to begin with, `min` if not given. `busy`:
    for how much of its time a replica may prefill: found in the twin (`scripts/bench autoscale`), where more
    costs attainment and less GPUs. `settle_s`: so long fewer have to be enough before some
    go, and no shorter than a start takes. `startup_s`: what one takes to start, until the first
    has. `dry_run`: decisions are told and not followed.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    min: Annotated[int, Field(ge=0)] = 1
    max: Annotated[int, Field(ge=1)]
    initial: Annotated[int, Field(ge=0)] | None = None
    busy: Annotated[float, Field(gt=0, lt=1)] = 0.4
    settle_s: Annotated[float, Field(ge=0)] = 60.0
    idle_s: Annotated[float, Field(ge=0)] = 300.0
    startup_s: Annotated[float, Field(ge=0)] = 60.0
    dry_run: bool = False

    @model_validator(mode="before")
    @classmethod
    def _number(cls, given: Any) -> Any:
        number = isinstance(given, int) and not isinstance(given, bool)
        return {"min": given, "max": given} if number else given

    @model_validator(mode="after")
    def _in_order(self) -> Replicas:
        if not self.min <= self.first <= self.max:
            raise ValueError(f"min, initial, max: {self.min}, {self.first}, {self.max} are not in order")
        return self

    @property
    def fixed(self) -> bool:
        """There is nothing to decide."""
        return self.min == self.max

    @property
    def may_be_gone(self) -> bool:
        """That there is no replica is no failure: who asks gets one."""
        return self.min == 0 and not self.dry_run

    @property
    def first(self) -> int:
        """How many there are to begin with."""
        return self.min if self.initial is None else self.initial


class Told(Protocol):
    """What other routers tell (router/gossip.py)."""

    @property
    def name(self) -> str:
        """By which the others know this one."""

    @property
    def complete(self) -> bool:
        """Whether every router that there is speaks."""

    @property
    def scaled(self) -> Mapping[str, Mapping[str, Scaled]]:
        """What each of the others told of each model, by its name."""


@dataclass(slots=True)
class Pool:
    """The replicas of one model, as this router decides on them."""

    config: Replicas
    scaler: Autoscaler
    startups: StartUps
    target: int
    version: int = 0
    reason: str = ""
    ability: Ability = field(default_factory=lambda: Ability(StepModel.of()))
    decision: Decision | None = None
    changes: deque[Decision] = field(default_factory=lambda: deque(maxlen=KEPT))


class Scaling:
    """All models whose replicas are not fixed in number."""

    def __init__(
        self,
        configs: Mapping[str, Replicas],
        slos: Mapping[str, Slo],
        fleet: Fleet,
        lines: Lines,
        others: Told,
        metrics: Metrics,
    ) -> None:
        self._configs = configs
        self._slos = slos
        self._fleet = fleet
        self._lines = lines
        self._others = others
        self._metrics = metrics
        self._pools: dict[str, Pool] = {}
        self._ticks: asyncio.Task[None] | None = None
        self._retired = False

    def start(self, targets: Mapping[str, int]) -> None:
        """Begins to decide. `targets`: how many replicas of models were asked for by now, where that is
        known."""
        now = asyncio.get_running_loop().time()
        for model, config in self._configs.items():
            slo = self._slos.get(model, self._slos.get(ANY))
            scaler = Autoscaler(config, now, slo.tpot_s) if slo else Autoscaler(config, now)
            target = targets.get(model, config.first)
            self._pools[model] = Pool(config, scaler, StartUps(config.startup_s), target)
        self._ticks = asyncio.get_running_loop().create_task(self._run())

    def retire(self) -> None:
        """Decides no more, and leaves it to the others; they hear who still waits here."""
        if self._ticks is not None:
            self._ticks.cancel()
        self._retired = True

    @property
    def told(self) -> dict[str, Scaled]:
        """What the other routers are to know."""
        return {
            model: Scaled(
                self._work(model), None if self._retired else pool.target, pool.version, pool.reason
            )
            for model, pool in self._pools.items()
        }

    @property
    def targets(self) -> dict[str, int]:
        """How many replicas there are to be, by model; nothing where another router says so."""
        decided = not self._retired and self._leader() == self._others.name
        return {m: pool.target for m, pool in self._pools.items() if decided and not pool.config.dry_run}

    def described(self, epoch: float, history: bool = False) -> dict[str, dict[str, Any]]:
        """For people, by model. `epoch`: when the loop's clock began. `history`: with what was decided
        before, the newest first."""
        return {model: _described(pool, epoch, history) for model, pool in self._pools.items()}

    # -- a tick

    async def _run(self) -> None:
        while True:
            for model, pool in self._pools.items():
                try:
                    self._decide(model, pool)
                except Exception:  # as many replicas as before are better than none
                    log.exception("no decision on the replicas of %s", model)
            await asyncio.sleep(TICK_S)

    def _decide(self, model: str, pool: Pool) -> None:
        now = asyncio.get_running_loop().time()
        serving = [s for s in self._fleet.of_model(model) if s.state in (State.READY, State.SUSPECT)]
        if pool.config.dry_run:
            pool.target = len(serving)
        else:
            self._adopt(model, pool, now)
        pool.startups.look(pool.target, {standing.id for standing in serving}, now)
        if serving:
            pool.ability = ability(serving)
        others = {name: told[model].work for name, told in self._others.scaled.items() if model in told}
        works = {self._others.name: self._work(model), **others}
        supply = Supply(pool.target, len(serving), pool.ability, pool.startups.seconds, self._others.complete)
        self._take(model, pool, pool.scaler.decide(now, works, supply))

    def _adopt(self, model: str, pool: Pool, now: float) -> None:
        """What was decided last, whoever did: a router that has just come, or hung, knows an older one."""
        for told in self._others.scaled.values():
            said = told.get(model)
            if said and said.target is not None and (said.version, said.target) > (pool.version, pool.target):
                demand = pool.decision.demand if pool.decision else Demand()
                if said.target != pool.target:
                    pool.changes.append(
                        Decision(now, said.target, pool.target, said.target, said.reason, demand)
                    )
                pool.target, pool.version, pool.reason = said.target, said.version, said.reason

    def _take(self, model: str, pool: Pool, decision: Decision) -> None:
        """What was decided counts if this is the router that decides; else it is what it would have been."""
        pool.decision = decision
        leads = self._leader() == self._others.name
        self._metrics.scaled(model, decision.target if leads else pool.target, decision.needed)
        if decision.target == decision.before or not leads:
            return
        if not (pool.changes and _same(pool.changes[-1], decision)):
            pool.changes.append(decision)
            told = "replicas of %s: %d to %d, %s" + (" (dry run)" if pool.config.dry_run else "")
            log.info(told, model, decision.before, decision.target, decision.reason)
        pool.target, pool.version, pool.reason = decision.target, pool.version + 1, decision.reason

    def _leader(self) -> str:
        """The first by name of those that decide."""
        others = self._others.scaled.items()
        deciding = [name for name, told in others if any(s.target is not None for s in told.values())]
        return min([self._others.name, *deciding])

    def _work(self, model: str) -> Work:
        return work(self._fleet, model, self._lines.of(model))


def ability(serving: Sequence[Standing]) -> Ability:
    """What one in the middle of these can do."""
    typical = sorted(serving, key=lambda standing: standing.steps.prefill.value)[len(serving) // 2]
    replica = typical.replica
    tokens = (replica.num_blocks or 0) * (replica.block_size or 0) or UNTOLD_CAPACITY
    return Ability(typical.steps, tokens)


def _same(one: Decision, other: Decision) -> bool:
    """Whether a decision says what one before it said: in a dry run it is said again and again."""
    return (one.target, one.before, one.reason) == (other.target, other.before, other.reason)


def _described(pool: Pool, epoch: float, history: bool) -> dict[str, Any]:
    config, decision = pool.config, pool.decision
    told = {
        "min": config.min,
        "max": config.max,
        "dry_run": config.dry_run,
        "target": pool.target,
        "startup_s": pool.startups.seconds,
        "last": _told(decision, epoch) if decision is not None else None,
    }
    changes = {"changes": [_told(change, epoch) for change in reversed(pool.changes)]} if history else {}
    return told | changes


def _told(decision: Decision, epoch: float) -> dict[str, Any]:
    return {**asdict(decision), "at": decision.at + epoch}
