"""How other routers place requests: what the twin runs beside Herd's own policies.

Each is written anew from what its project publishes, with that project's defaults. Where the source leaves a
choice to a hash map's order, chance decides, from the view's random bits. What is known of caches comes from
Herd's index, which also counts what was just placed: not all of these routers do, so it is in their favour.
"""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import inf
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from loadtests.trace import BLOCK_TOKENS
from router.core.blocks import Keys, Prompt
from router.core.fleet import NOTHING_CACHED, Standing, View
from router.core.placement import Placement, power_of_two
from router.core.step_model import StepModel

if TYPE_CHECKING:
    from loadtests.virtual_engine import Report

Reports = Mapping[str, "Report"]
Baseline = Callable[[View, Prompt, Reports], Placement | None]

# What routers reckon a token to be in text.
TOKEN_CHARS = 4


def cheapest(view: View, costs: Sequence[Any], reason: str) -> Placement | None:
    """The replica of the lowest cost, one of equals by chance; `costs`: one for each replica of the view."""
    if not view.replicas:
        return None
    least = min(costs)
    equals = [s for s, cost in zip(view.replicas, costs, strict=True) if cost == least]
    chosen = equals[view.draw % len(equals)]
    return Placement(chosen, reason)


def fewest_requests(view: View) -> Placement | None:
    """By what this router alone sent."""
    return cheapest(view, [s.in_flight for s in view.replicas], "fewest requests")


def cached_tokens(view: View, standing: Standing) -> int:
    """How much of the prompt the replica has, as far as KV events tell."""
    return view.cached.get(standing.id, NOTHING_CACHED).tokens


def prefill_tokens(view: View, standing: Standing) -> int:
    """Tokens to compute until the request's first: its own, and those of requests that wait for theirs."""
    pending = sum(flight.num_tokens - flight.cached.tokens for flight in standing.prefills.values())
    return pending + view.num_tokens - cached_tokens(view, standing)


def active_tokens(standing: Standing) -> int:
    """Prompt tokens of all requests in flight, whether they decode or wait."""
    return standing.context + sum(flight.num_tokens for flight in standing.prefills.values())


def unbalanced(view: View, absolute: float, relative: float) -> bool:
    """Whether the busiest replica has more requests than the idlest by both thresholds."""
    in_flight = [s.in_flight for s in view.replicas]
    most, fewest = max(in_flight, default=0), min(in_flight, default=0)
    return most - fewest > absolute and most > relative * fewest


class PromptTree:
    """Which replica was sent which blocks: a prefix tree, whose nodes are named by chained keys.

    Knows nothing of what replicas evict. `capacity`: blocks kept for a replica, the least recent go first.
    """

    def __init__(self, capacity: float = inf) -> None:
        self._capacity = capacity
        self._sent: defaultdict[str, OrderedDict[int, None]] = defaultdict(OrderedDict)
        self._holders: defaultdict[int, set[str]] = defaultdict(set)

    def size(self, replica_id: str) -> int:
        """Blocks kept for a replica."""
        return len(self._sent[replica_id])

    def match(self, keys: Keys) -> dict[str, int]:
        """How many leading blocks of a prompt each replica was sent; those with none are left out."""
        depths: dict[str, int] = {}
        for depth, key in enumerate(keys, 1):
            holders = self._holders.get(key)
            if not holders:
                break
            depths.update(dict.fromkeys(holders, depth))
        return depths

    def learn(self, keys: Keys, placement: Placement | None) -> Placement | None:
        """The same placement, remembered."""
        if placement is not None:
            self.insert(keys, placement.standing.id)
        return placement

    def insert(self, keys: Keys, replica_id: str) -> None:
        """A prompt was sent to the replica."""
        sent = self._sent[replica_id]
        for key in reversed(keys):  # so that leaves are older than what they hang on
            sent[key] = None
            sent.move_to_end(key)
            self._holders[key].add(replica_id)
        while len(sent) > self._capacity:
            key, _ = sent.popitem(last=False)
            self._holders[key].discard(replica_id)
            if not self._holders[key]:
                del self._holders[key]


@dataclass(frozen=True, slots=True)
class Smg:
    """SMG (sglang-router before), `cache_aware` over HTTP: where most of the text went, if that is much.

    Else, and while the loads are out of balance, the replica with the fewest requests. Thresholds and the
    tree's size are the defaults of its command line (model_gateway/src/policies/cache_aware.rs).
    """

    cache_threshold: float = 0.3
    balance_abs: float = 64
    balance_rel: float = 1.5
    tree: PromptTree = field(default_factory=lambda: PromptTree(67_108_864 / (BLOCK_TOKENS * TOKEN_CHARS)))

    def __call__(self, view: View, prompt: Prompt, reports: Reports) -> Placement | None:
        keys = prompt.keys(BLOCK_TOKENS)
        return self.tree.learn(keys, self._choose(view, prompt, self.tree.match(keys)))

    def _choose(self, view: View, prompt: Prompt, sent: Mapping[str, int]) -> Placement | None:
        depths = [sent.get(s.id, 0) for s in view.replicas]
        matched = BLOCK_TOKENS * max(depths, default=0)
        followed = matched > self.cache_threshold * prompt.num_tokens
        if not followed or unbalanced(view, self.balance_abs, self.balance_rel):
            return fewest_requests(view)
        return cheapest(view, [-depth for depth in depths], f"was sent {matched} tokens of it")


@dataclass(frozen=True, slots=True)
class SmgEvents:
    """SMG with KV events: the replica that holds most of the prompt, of equals the one with fewest requests.

    The same balance thresholds; no cache threshold, so one block is enough to be followed.
    """

    balance_abs: float = 64
    balance_rel: float = 1.5

    def __call__(self, view: View, prompt: Prompt, reports: Reports) -> Placement | None:
        if unbalanced(view, self.balance_abs, self.balance_rel):
            return fewest_requests(view)
        costs = [(-cached_tokens(view, s), s.in_flight) for s in view.replicas]
        return cheapest(view, costs, "holds most of it")


@dataclass(frozen=True, slots=True)
class RayPrefix:
    """Ray Serve LLM, `PrefixCacheAffinityRouter`: who was sent most of the text, if that is a tenth of it.

    Else who was sent least text in all; of several the one with the fewest requests. Only when loads differ
    by more than a threshold, by default never, two choices at random. Its tree is not bounded by default.
    """

    imbalanced_threshold: float = inf
    match_rate_threshold: float = 0.1
    tree: PromptTree = field(default_factory=PromptTree)

    def __call__(self, view: View, prompt: Prompt, reports: Reports) -> Placement | None:
        keys = prompt.keys(BLOCK_TOKENS)
        return self.tree.learn(keys, self._choose(view, prompt, self.tree.match(keys)))

    def _choose(self, view: View, prompt: Prompt, sent: Mapping[str, int]) -> Placement | None:
        if unbalanced(view, self.imbalanced_threshold, relative=1):
            return power_of_two(view)
        matched = BLOCK_TOKENS * max([sent.get(s.id, 0) for s in view.replicas], default=0)
        if matched < self.match_rate_threshold * prompt.num_tokens:
            sizes = [(self.tree.size(s.id), s.in_flight) for s in view.replicas]
            return cheapest(view, sizes, "was sent least text")
        depths = [(-sent.get(s.id, 0), s.in_flight) for s in view.replicas]
        return cheapest(view, depths, f"was sent {matched} tokens of it")


@dataclass(frozen=True, slots=True)
class Dynamo:
    """NVIDIA Dynamo's KV router: blocks to prefill, its own and those pending, plus blocks in use.

    The least of `prefill_scale` * prefill + active blocks, at temperature 0 (lib/kv-router, selector). Blocks
    that running requests share count for each of them here, once there. Its waiting line, which opens when
    every replica has 16 full steps to prefill, is left out.
    """

    prefill_scale: float = 1.0

    def __call__(self, view: View, prompt: Prompt, reports: Reports) -> Placement | None:
        costs = [self.prefill_scale * prefill_tokens(view, s) + active_tokens(s) for s in view.replicas]
        return cheapest(view, costs, "fewest blocks to prefill and in use")


def range_scores(values: Sequence[float]) -> list[float]:
    """0 for the lowest, 1 for the highest; 1 for all if there is no difference."""
    least, most = min(values, default=0), max(values, default=0)
    return [(value - least) / (most - least) if most > least else 1.0 for value in values]


@dataclass(frozen=True, slots=True)
class Weights:
    """What llm-d's scores count for: prefix, KV cache utilisation, queue."""

    prefix: float
    kv: float
    queue: float

    def highest(self, view: View, reports: Reports, prefix: Sequence[float]) -> Placement | None:
        """The replica of the highest sum; the load is what engines last reported, not what was just sent."""
        kv = [1 - reports[s.id].kv_usage for s in view.replicas]
        queue = range_scores([-reports[s.id].waiting for s in view.replicas])
        costs = [
            -(self.prefix * p + self.kv * k + self.queue * q)
            for p, k, q in zip(prefix, kv, queue, strict=True)
        ]
        return cheapest(view, costs, "highest score")


@dataclass(frozen=True, slots=True)
class LlmdPrecise:
    """llm-d with precise prefix scoring: by KV events 2, utilisation 1, queue 1.

    The prefix score is the share of the prompt that a replica holds (guides/precise-prefix-cache-aware of
    llm-d). Its first releases spread the scores of all holders over 0 to 1 instead, so that one shared block
    drew every prompt to whoever held it first.
    """

    weights: Weights = Weights(2, 1, 1)

    def __call__(self, view: View, prompt: Prompt, reports: Reports) -> Placement | None:
        shares = [cached_tokens(view, s) / prompt.num_tokens for s in view.replicas]
        return self.weights.highest(view, reports, shares)


@dataclass(frozen=True, slots=True)
class Llmd:
    """llm-d as it comes: prefix by routing history 3, utilisation 2, queue 2.

    The history is of a prompt's first 256 blocks of 16 tokens, and 31,250 blocks long for each replica; the
    score is the share of the prompt's blocks that were sent there (prefix-cache-scorer of the Gateway API
    inference extension).
    """

    weights: Weights = Weights(3, 2, 2)
    max_blocks: int = 256 * 16 // BLOCK_TOKENS
    tree: PromptTree = field(default_factory=lambda: PromptTree(31_250 * 16 // BLOCK_TOKENS))

    def __call__(self, view: View, prompt: Prompt, reports: Reports) -> Placement | None:
        keys = prompt.keys(BLOCK_TOKENS)[: self.max_blocks]
        sent = self.tree.match(keys)
        shares = [sent.get(s.id, 0) / max(1, len(keys)) for s in view.replicas]
        return self.tree.learn(keys, self.weights.highest(view, reports, shares))


class Conductor:
    """Mooncake's conductor without its transfers (FAST'25, algorithm 1): the earliest first token.

    In the step times of the engine's kind. With what a step model has learnt of each replica, one that seems
    slow gets nothing, and so goes on seeming slow.
    """

    def __call__(self, view: View, prompt: Prompt, reports: Reports) -> Placement | None:
        return cheapest(view, [self._ttft_s(view, s) for s in view.replicas], "earliest first token")

    @staticmethod
    def _ttft_s(view: View, standing: Standing) -> float:
        model, cached = StepModel(standing.steps.prior), cached_tokens(view, standing)
        promised = standing.backlog_s(view.now) / standing.steps.prefill.value
        own = model.prefill_s(view.num_tokens - cached, cached)
        return model.first_token_s(promised + own, model.step_s(standing.decoding, standing.context))


class LMetric:
    """LMetric (arXiv 2603.15202): the least product of tokens to prefill and requests in the batch."""

    def __call__(self, view: View, prompt: Prompt, reports: Reports) -> Placement | None:
        products = [prefill_tokens(view, s) * (s.in_flight + 1) for s in view.replicas]
        return cheapest(view, products, "least tokens to prefill times requests")


# Makers, one call for each router process: what learns from its own routing learns in each anew.
SHIPPED: Mapping[str, Callable[[], Baseline]] = MappingProxyType(
    {
        "smg": Smg,
        "smg_ev": SmgEvents,
        "ray": RayPrefix,
        "dynamo": Dynamo,
        "dynamo_tuned": partial(Dynamo, prefill_scale=4.0),
        "llmd": Llmd,
        "llmd_precise": LlmdPrecise,
    }
)
# Of papers, not of routers that one could run instead.
PAPERS: Mapping[str, Callable[[], Baseline]] = MappingProxyType({"conductor": Conductor, "lmetric": LMetric})
