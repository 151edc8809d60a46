"""Every metric of the router, once.

Prometheus names with the prefix `herd_` and base units. Children are looked up once per replica or request
kind, not once per chunk: a label lookup costs more than the observation.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

from router.core.fleet import Fleet, State

# From a cached one-block prompt on a small model to a 100k-token prefill behind a queue.
TTFT_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60)
DURATION_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 60, 120, 300, 600)
# The router's own share: microseconds when idle, milliseconds when its loop is behind.
OVERHEAD_BUCKETS = (0.0001, 0.00025, 0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.5, 1)

# Why a request was placed again: no connection to the replica, or its reply was cut.
RETRY_REASONS = ("connect", "cut")


class Metrics:
    """The metrics of one router process, in a registry of its own so that several can live in one test."""

    def __init__(self) -> None:
        self.registry = registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self.requests = Counter(
            "herd_requests",
            "Requests answered, by model, path and HTTP status.",
            ["model", "path", "code"],
            registry=registry,
        )
        self.in_flight = Gauge(
            "herd_requests_in_flight", "Requests at a replica now.", ["model", "replica"], registry=registry
        )
        self.ttft = Histogram(
            "herd_time_to_first_token_seconds",
            "From the request's last byte to the first token passed on.",
            ["model"],
            buckets=TTFT_BUCKETS,
            registry=registry,
        )
        self.duration = Histogram(
            "herd_request_duration_seconds",
            "From the request's last byte to the reply's last.",
            ["model"],
            buckets=DURATION_BUCKETS,
            registry=registry,
        )
        self.overhead = Histogram(
            "herd_router_overhead_seconds",
            "From the request's last byte until it was sent to a replica.",
            buckets=OVERHEAD_BUCKETS,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "herd_prompt_tokens", "Prompt tokens, as engines reported them.", ["model"], registry=registry
        )
        self.cached_tokens = Counter(
            "herd_cached_tokens",
            "Prompt tokens found in KV cache, as engines reported them.",
            ["model"],
            registry=registry,
        )
        self.output_tokens = Counter(
            "herd_output_tokens", "Tokens generated, as engines reported them.", ["model"], registry=registry
        )
        self.chunks = Counter(
            "herd_stream_events", "Events of streams passed on to clients.", ["model"], registry=registry
        )
        self.retries = Counter(
            "herd_retries",
            "Requests placed again after a replica failed them.",
            ["model", "reason"],
            registry=registry,
        )
        self.aborted = Counter(
            "herd_client_disconnects",
            "Requests given up because the client left.",
            ["model"],
            registry=registry,
        )
        self.truncated = Counter(
            "herd_streams_truncated",
            "Streams that ended in an error after their first byte.",
            ["model"],
            registry=registry,
        )
        self.replicas = Gauge(
            "herd_replicas", "Replicas by model and state.", ["model", "state"], registry=registry
        )
        self.replica_failures = Counter(
            "herd_replica_failures", "Times a replica was taken out of traffic.", ["model"], registry=registry
        )
        self.connections = Gauge("herd_client_connections", "Open client connections.", registry=registry)

    def observe(self, fleet: Fleet, promised: Iterable[str]) -> None:
        """Sets what is a state of the fleet, not an event; called when metrics are read.

        Replicas that left are forgotten, since ids are new with every start. Counters of trouble begin at
        zero for every model: `increase()` does not see a counter that is born at one.
        """
        self.replicas.clear()
        self.in_flight.clear()
        tally = Tally((model, s.state) for s in fleet for model in s.replica.models)
        for model in {*promised, *fleet.models()}:
            self._be_born(model)
            for state in State:
                self.replicas.labels(model, state).set(tally[model, state])
        for standing in fleet:
            self.in_flight.labels(standing.replica.models[0], standing.id).set(standing.in_flight)

    def _be_born(self, model: str) -> None:
        for counter in (self.truncated, self.aborted, self.replica_failures):
            counter.labels(model)
        for reason in RETRY_REASONS:
            self.retries.labels(model, reason)
