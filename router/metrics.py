"""Every metric of the router, once.

Prometheus names with the prefix `herd_` and base units. The series of a model are looked up once.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, partial

from prometheus_client import CollectorRegistry, Gauge, ProcessCollector

from router.core.fleet import Fleet, State, Trust
from router.core.trust import Cause, Doubt, trust_with
from router.series import Counter, Counters, Histogram, Histograms

# From a cached one-block prompt on a small model to a 100k-token prefill behind a queue.
TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60)
DURATION_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
# From what one prefill makes others wait to what nobody waits for.
WAIT_BUCKETS = (0.01, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
# Around 1, where predictions come true: within a tenth, a fifth, half; then how far they are off.
RATIO_BUCKETS = (0.1, 0.25, 0.5, 0.67, 0.8, 0.9, 1, 1.1, 1.25, 1.5, 2, 4, 10)
# The router's own share: microseconds when idle, milliseconds when its loop is behind.
OVERHEAD_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1)
# A body of the size limit holds the loop for 0.1 s; router.watchdog ends a process that is held for 10.
LAG_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)

# Why a try failed: no connection to the replica, its reply was cut, or it said that it failed. `refused`: no
# budget was left for another.
RETRY_REASONS = ("connect", "cut", "failed", "refused")
# What became of streams that broke: they went on elsewhere, lacked only their counts, or could not go on.
CONTINUATIONS = ("continued", "finished", "impossible")
# Why a request was not let in: the line was full, it waited too long, or was too late for its SLO.
REFUSALS = ("full", "waited", "late")
# What became of datagrams between router processes: those of a process that is not known, whose signature is
# another's, or that are no newer than what is known, are dropped.
DATAGRAM_FATES = ("sent", "unsent", "taken", "stale", "unknown", "forged", "malformed")
# Whether the owner of a request answered it; where it failed the request was served by the first router.
OWNER_OUTCOMES = ("passed", "failed")

# Of each model, by the field of ModelMetrics: its name for Prometheus, and what it is.
COUNTERS = (
    ("prompt_tokens", "prompt_tokens", "Prompt tokens, as engines reported them."),
    ("cached_tokens", "cached_tokens", "Prompt tokens found in KV cache, as engines reported them."),
    ("output_tokens", "output_tokens", "Tokens generated, as engines reported them."),
    ("events", "stream_events", "Events of streams passed on to clients."),
    ("disconnects", "client_disconnects", "Requests given up because the client left."),
    ("truncated", "streams_truncated", "Streams that ended in an error after their first byte."),
    ("replica_failures", "replica_failures", "Times a replica was taken out of traffic."),
    ("event_gaps", "kv_event_gaps", "Times that KV events were missing, and asked for again."),
    ("events_lost", "kv_events_lost", "Times that KV events were lost, and what a cache holds with them."),
    (
        "blocks_unkeyed",
        "kv_blocks_unkeyed",
        "Blocks of KV events that follow an unknown one, or came without tokens, and are not known.",
    ),
    (
        "replayed_prefixes",
        "replayed_prefixes",
        "Prefixes that a replica was asked to compute since another left, or it had just come.",
    ),
    ("replayed_tokens", "replayed_tokens", "Tokens of these that were not cached there."),
    ("predictions", "predictions", "Predictions of cached tokens that an engine's report was compared with."),
    ("predicted_cached", "predicted_cached_tokens", "Prompt tokens predicted to be cached, of these."),
    ("reported_cached", "reported_cached_tokens", "Prompt tokens reported to be cached, of these."),
)
TENANT_COUNTERS = (
    ("prompt_tokens", "prompt_tokens", "Prompt tokens of a tenant, as engines reported them."),
    ("cached_tokens", "cached_tokens", "Prompt tokens of a tenant found in KV cache, of these."),
    ("output_tokens", "output_tokens", "Tokens generated for a tenant."),
)
HISTOGRAMS = (
    (
        "ttft",
        "time_to_first_token_seconds",
        "From the request's last byte to the first token passed on.",
        TTFT_BUCKETS,
    ),
    (
        "waited",
        "line_wait_seconds",
        "From the request's last byte until it left the waiting line for a replica, of those that waited.",
        WAIT_BUCKETS,
    ),
    (
        "duration",
        "request_duration_seconds",
        "From the request's last byte to the reply's last.",
        DURATION_BUCKETS,
    ),
    (
        "ttft_ratio",
        "ttft_prediction_ratio",
        "Time to first token over what was predicted of it, where the prompt was known.",
        RATIO_BUCKETS,
    ),
)


@dataclass(frozen=True, slots=True)
class ModelMetrics:
    """What is counted and timed of one model's requests."""

    ttft: Histogram
    waited: Histogram
    duration: Histogram
    ttft_ratio: Histogram
    prompt_tokens: Counter
    cached_tokens: Counter
    output_tokens: Counter
    events: Counter
    disconnects: Counter
    truncated: Counter
    replica_failures: Counter
    event_gaps: Counter
    events_lost: Counter
    blocks_unkeyed: Counter
    replayed_prefixes: Counter
    replayed_tokens: Counter
    predictions: Counter
    predicted_cached: Counter
    reported_cached: Counter
    retries: dict[str, Counter]
    continuations: dict[str, Counter]
    refused: dict[str, Counter]
    misses: dict[Cause, Counter]
    trust_changes: dict[Doubt | None, Counter]


@dataclass(frozen=True, slots=True)
class TenantMetrics:
    """What is counted of one tenant. `requests`: by HTTP status."""

    requests: Callable[[str], Counter]
    prompt_tokens: Counter
    cached_tokens: Counter
    output_tokens: Counter


class Metrics:
    """The metrics of one router process, in a registry of its own so that several can live in one test."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        requests = self._counter("requests", "Requests answered, by HTTP status.", "model", "path", "code")
        self._retries = self._counter(
            "retries", "Tries that a replica failed, by how it did.", "model", "reason"
        )
        self._continuations = self._counter(
            "stream_continuations", "Streams that broke, by what became of them.", "model", "outcome"
        )
        self._refused = self._counter(
            "requests_refused", "Requests that the waiting line refused.", "model", "reason"
        )
        self._misses = self._counter(
            "prediction_misses", "Predictions that were off by more than a block.", "model", "cause"
        )
        self._trust_changes = self._counter(
            "trust_changes", "Times that the trust in a replica's cache changed.", "model", "to", "reason"
        )
        self.decisions = self._counter(
            "route_decisions", "Placements, by what they came to for the prompt's cache.", "policy", "branch"
        )
        self._of_model = {field: self._counter(name, help_) for field, name, help_ in COUNTERS} | {
            field: self._histogram(name, help_, bounds, "model") for field, name, help_, bounds in HISTOGRAMS
        }
        self.overhead = self._histogram(
            "router_overhead_seconds",
            "From the request's last byte until it was sent to a replica, less its wait in line.",
            OVERHEAD_BUCKETS,
        ).labels()
        self.loop_lag = self._histogram(
            "event_loop_lag_seconds",
            "How much later than due the event loop came to a timer: what every request there waits as well.",
            LAG_BUCKETS,
        ).labels()
        datagrams = self._counter("gossip_datagrams", "Datagrams between router processes.", "fate")
        self.datagrams = {fate: datagrams.labels(fate) for fate in DATAGRAM_FATES}
        relayed = self._counter(
            "relayed_to_owner", "Requests passed on to the router process that owns them.", "outcome"
        )
        self.relayed_to_owner = {outcome: relayed.labels(outcome) for outcome in OWNER_OUTCOMES}
        self._tenant_requests = self._counter(
            "tenant_requests", "Requests answered to a tenant, by HTTP status.", "tenant", "code"
        )
        self._of_tenant = {
            field: self._counter(f"tenant_{name}", help_, "tenant") for field, name, help_ in TENANT_COUNTERS
        }
        self.tenants_file_refused = self._gauge(
            "tenants_file_refused",
            "1 while the file of tenants is wrong and the one before it counts.",
        )
        self.peers = self._gauge("gossip_peers", "Other router processes that speak.")
        self.connections = self._gauge("client_connections", "Open client connections.")
        self._waiting = self._gauge("requests_waiting", "Requests in the waiting line.", "model")
        self._waiting_tokens = self._gauge(
            "waiting_tokens", "Prompt tokens to be computed of the requests in the waiting line.", "model"
        )
        self._replicas = self._gauge("replicas", "Replicas by state.", "model", "state")
        self._target = self._gauge(
            "replicas_target",
            "How many replicas there are to be, as the routers decided; where that is not theirs to decide, "
            "as many as there are, and one at least.",
            "model",
        )
        self._scaled: set[str] = set()
        self._needed = self._gauge(
            "replicas_needed",
            "How many replicas what is asked would take, before hysteresis and bounds.",
            "model",
        )
        self._in_flight = self._gauge("requests_in_flight", "Requests at a replica now.", "model", "replica")
        self._trust = self._gauge(
            "replica_trust",
            "How well a replica's cache is known: 1 at its state.",
            "model",
            "replica",
            "state",
        )
        self._backlog = self._gauge(
            "replica_backlog_seconds", "Prefill promised to a replica and not done yet.", "model", "replica"
        )
        self._factors = self._gauge(
            "step_model_factor",
            "What a replica's step times are, times those of its kind of engine, as learnt.",
            "model",
            "replica",
            "phase",
        )
        self._index_blocks = self._gauge("index_blocks", "Blocks of KV cache that the index knows.")
        self._index_bytes = self._gauge("index_bytes", "Memory that the index takes.")
        self.requests = requests.labels  # (model, path, code)
        self.of = cache(self._born)  # (model), only of models that exist

    def observe(self, fleet: Fleet, promised: Iterable[str], now: float) -> None:
        """Sets what is a state of the fleet, not an event; called when metrics are read.

        Replicas that left are forgotten, since ids are new with every start. A model's counters begin at zero
        when it is known: `increase()` does not see a counter that is born at one.
        """
        for gauge in (self._replicas, self._in_flight, self._trust, self._backlog, self._factors):
            gauge.clear()
        self._index_blocks.set(len(fleet.index))
        self._index_bytes.set(fleet.index.nbytes)
        tally = Tally((model, s.state) for s in fleet for model in s.replica.models)
        for model in {*promised, *fleet.models()}:
            self.of(model)
            for state in State:
                self._replicas.labels(model, state).set(tally[model, state])
            if model not in self._scaled:
                self._target.labels(model).set(max(1, sum(tally[model, state] for state in State)))
        for standing in fleet:
            labels = (standing.replica.models[0], standing.id)
            self._in_flight.labels(*labels).set(standing.in_flight)
            for trust in Trust if standing.judged else ():
                self._trust.labels(*labels, trust).set(trust is standing.trust)
            self._backlog.labels(*labels).set(standing.backlog_s(now))
            self._factors.labels(*labels, "prefill").set(standing.steps.prefill.value)
            self._factors.labels(*labels, "decode").set(standing.steps.decode.value)

    def tenant(self, name: str) -> TenantMetrics:
        """What is counted of a tenant; only of those that are configured."""
        tokens = {field: family.labels(name) for field, family in self._of_tenant.items()}
        return TenantMetrics(partial(self._tenant_requests.labels, name), **tokens)

    def show_line(self, model: str, requests: Callable[[], float], tokens: Callable[[], float]) -> None:
        """From now on the length of a model's waiting line is asked for when metrics are read."""
        self._waiting.labels(model).set_function(requests)
        self._waiting_tokens.labels(model).set_function(tokens)

    def scaled(self, model: str, target: int, needed: int) -> None:
        """How many replicas of a model there are to be, and how many are needed."""
        self._scaled.add(model)
        self._target.labels(model).set(target)
        self._needed.labels(model).set(needed)

    def _born(self, model: str) -> ModelMetrics:
        retries = {reason: self._retries.labels(model, reason) for reason in RETRY_REASONS}
        children = {name: family.labels(model) for name, family in self._of_model.items()}
        return ModelMetrics(
            **children,
            retries=retries,
            continuations={outcome: self._continuations.labels(model, outcome) for outcome in CONTINUATIONS},
            refused={reason: self._refused.labels(model, reason) for reason in REFUSALS},
            misses={cause: self._misses.labels(model, cause) for cause in Cause},
            trust_changes={
                kind: self._trust_changes.labels(model, trust_with(kind), kind or "proven")
                for kind in (None, *Doubt)
            },
        )

    def _counter(self, name: str, help_: str, *labels: str) -> Counters:
        return Counters(self.registry, f"herd_{name}", help_, labels or ("model",))

    def _histogram(self, name: str, help_: str, bounds: tuple[float, ...], *labels: str) -> Histograms:
        return Histograms(self.registry, f"herd_{name}", help_, labels, bounds)

    def _gauge(self, name: str, help_: str, *labels: str) -> Gauge:
        return Gauge(f"herd_{name}", help_, labels, registry=self.registry)
