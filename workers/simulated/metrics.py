"""Prometheus metrics under vLLM's names, labels and buckets."""

from collections.abc import Mapping
from typing import TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.gc_collector import GCCollector
from prometheus_client.platform_collector import PlatformCollector
from prometheus_client.process_collector import ProcessCollector

from workers.simulated.core import Engine, Sequence, Step

M = TypeVar("M", Counter, Gauge)

ENGINE = "0"  # vLLM numbers its data-parallel engines; there is one here

FIRST_TOKEN_BUCKETS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0),
    *(40.0, 80.0, 160.0, 640.0, 2560.0),
)
TOKEN_GAP_BUCKETS = (
    *(
        0.01,
        0.025,
        0.05,
        0.075,
        0.1,
        0.15,
        0.2,
        0.3,
        0.4,
        0.5,
        0.75,
        1.0,
        2.5,
        5.0,
        7.5,
        10.0,
        20.0,
        40.0,
        80.0,
    ),
)
REQUEST_BUCKETS = (
    *(0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 120.0, 240.0, 480.0),
    *(960.0, 1920.0, 7680.0),
)
STEP_TOKENS_BUCKETS = (1, 8, *(2**n for n in range(4, 15)))
PREEMPTION_BUCKETS = (1, 2, 3, 4, 5, 10, 20)
CHOICES_BUCKETS = (1, 2, 5, 10, 20)

FINISH_REASONS = ("stop", "length", "abort", "error", "repetition")


class EngineMetrics:
    """All metrics of one engine, in a registry of their own."""

    def __init__(self, model: str, engine: Engine, max_model_len: int) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        PlatformCollector(registry=self.registry)
        GCCollector(registry=self.registry)
        self._model = model
        self._engine = engine
        self._gauges()
        self._counters()
        self._histograms(_one_two_five(max_model_len))

    def _gauges(self) -> None:
        engine = self._engine
        self._gauge("num_requests_running", "Number of requests in model execution batches.").set_function(
            lambda: engine.num_running
        )
        self._gauge("num_requests_waiting", "Number of requests waiting to be processed.").set_function(
            lambda: engine.num_waiting
        )
        reasons = self._family(
            Gauge, "num_requests_waiting_by_reason", "Number of waiting requests by reason.", "reason"
        )
        reasons.labels(ENGINE, self._model, "capacity").set_function(lambda: engine.num_waiting)
        reasons.labels(ENGINE, self._model, "deferred").set(0)
        self._gauge("kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.").set_function(
            lambda: engine.kv_usage
        )

    def _counters(self) -> None:
        self.prefix_queries = self._counter(
            "prefix_cache_queries", "Prefix cache queries, in queried tokens."
        )
        self.prefix_hits = self._counter("prefix_cache_hits", "Prefix cache hits, in cached tokens.")
        self.external_queries = self._counter(
            "external_prefix_cache_queries", "Prefix cache queries to a KV connector, in tokens."
        )
        self.external_hits = self._counter(
            "external_prefix_cache_hits", "Prefix cache hits from a KV connector, in tokens."
        )
        self.preemptions = self._counter(
            "num_preemptions", "Cumulative number of preemption from the engine."
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Number of prefill tokens processed.")
        self.prompt_tokens_cached = self._counter("prompt_tokens_cached", "Number of cached prompt tokens.")
        sources = self._family(
            Counter, "prompt_tokens_by_source", "Number of prompt tokens by source.", "source"
        )
        self.computed, self.hit, self.loaded = (
            sources.labels(ENGINE, self._model, source)
            for source in ("local_compute", "local_cache_hit", "external_kv_transfer")
        )
        self.generation_tokens = self._counter("generation_tokens", "Number of generation tokens processed.")
        success = self._family(
            Counter, "request_success", "Count of successfully processed requests.", "finished_reason"
        )
        self.success = {reason: success.labels(ENGINE, self._model, reason) for reason in FINISH_REASONS}
        self.http_requests = Counter(
            "http_requests",
            "Total number of requests by method, status and handler.",
            ["handler", "method", "status"],
            registry=self.registry,
        )
        rejections = Counter(
            "vllm:admission_rejections",
            "Number of admission attempts rejected by a queue limit, by reason.",
            ["model_name", "reason"],
            registry=self.registry,
        )
        self.rejections, _ = (
            rejections.labels(self._model, reason)
            for reason in ("max_num_queued_reqs", "max_num_queued_tokens")
        )

    def _histograms(self, tokens: tuple[float, ...]) -> None:
        histogram = self._histogram
        self.request_prompt_tokens = histogram(
            "request_prompt_tokens", "Number of prefill tokens processed.", tokens
        )
        self.request_generation_tokens = histogram(
            "request_generation_tokens", "Number of generation tokens processed.", tokens
        )
        self.step_tokens = histogram(
            "iteration_tokens_total", "Histogram of number of tokens per engine_step.", STEP_TOKENS_BUCKETS
        )
        self.params_n = histogram(
            "request_params_n", "Histogram of the n request parameter.", CHOICES_BUCKETS
        )
        self.params_max_tokens = histogram(
            "request_params_max_tokens", "Histogram of the max_tokens request parameter.", tokens
        )
        self.first_token = histogram(
            "time_to_first_token_seconds", "Histogram of time to first token in seconds.", FIRST_TOKEN_BUCKETS
        )
        self.token_gap = histogram(
            "inter_token_latency_seconds", "Histogram of inter-token latency in seconds.", TOKEN_GAP_BUCKETS
        )
        self.mean_token_gap = histogram(
            "request_time_per_output_token_seconds",
            "Histogram of time_per_output_token_seconds per request.",
            TOKEN_GAP_BUCKETS,
        )
        self.latency = histogram(
            "e2e_request_latency_seconds", "Histogram of e2e request latency in seconds.", REQUEST_BUCKETS
        )
        self.queue_time, self.inference_time, self.prefill_time, self.decode_time = (
            histogram(
                f"request_{name}_time_seconds",
                f"Histogram of time spent in {phase} phase for request.",
                REQUEST_BUCKETS,
            )
            for name, phase in (
                ("queue", "WAITING"),
                ("inference", "RUNNING"),
                ("prefill", "PREFILL"),
                ("decode", "DECODE"),
            )
        )
        self.request_preemptions = histogram(
            "request_num_preemptions",
            "Histogram of the number of times a request was preempted.",
            PREEMPTION_BUCKETS,
        )
        self.prefill_computed = histogram(
            "request_prefill_kv_computed_tokens",
            "Histogram of new KV tokens computed during prefill (excluding cached tokens).",
            tokens,
        )

    def cache_config(self, labels: Mapping[str, object]) -> None:
        """Publish the cache's configuration as labels, which is where routers read the block size."""
        named = {"engine": ENGINE} | {name: str(value) for name, value in labels.items()}
        Gauge(
            "vllm:cache_config_info",
            "Information of the LLMEngine CacheConfig",
            list(named),
            registry=self.registry,
        ).labels(**named).set(1)

    def stepped(self, step: Step) -> None:
        """Count what a step did."""
        for sequence in step.admitted:
            prompt, cached = sequence.content.num_prompt_tokens, sequence.cached_tokens or 0
            loaded = sequence.loaded_tokens
            self.prefix_queries.inc(prompt)
            self.prefix_hits.inc(cached - loaded)
            if self._engine.cpu.capacity:
                self.external_queries.inc(prompt - (cached - loaded))
                self.external_hits.inc(loaded)
            self.prompt_tokens.inc(prompt)
            self.prompt_tokens_cached.inc(cached)
            self.computed.inc(prompt - cached)
            self.hit.inc(cached - loaded)
            self.loaded.inc(loaded)
        self.preemptions.inc(step.preempted)
        self.generation_tokens.inc(len(step.outputs))
        if tokens := step.work.prefill_tokens + step.work.decoding:
            self.step_tokens.observe(tokens)

    def finished(self, sequence: Sequence, reason: str, first: float | None, now: float) -> None:
        """Record a request that has ended; `first` is when its first token came, if one did."""
        self.success[reason].inc()
        outputs = sequence.num_outputs
        self.request_prompt_tokens.observe(sequence.content.num_prompt_tokens)
        self.request_generation_tokens.observe(outputs)
        self.params_max_tokens.observe(sequence.max_tokens)
        self.latency.observe(now - sequence.arrived)
        self.request_preemptions.observe(sequence.preemptions)
        if sequence.scheduled is None or first is None:
            return
        self.queue_time.observe(sequence.scheduled - sequence.arrived)
        self.inference_time.observe(now - sequence.scheduled)
        self.prefill_time.observe(first - sequence.scheduled)
        self.decode_time.observe(now - first)
        self.prefill_computed.observe(sequence.content.num_prompt_tokens - (sequence.cached_tokens or 0))
        if outputs > 1:
            self.mean_token_gap.observe((now - first) / (outputs - 1))

    def exposition(self) -> bytes:
        """The text that /metrics answers."""
        return generate_latest(self.registry)

    def _family(self, kind: type[M], name: str, documentation: str, label: str) -> M:
        return kind(f"vllm:{name}", documentation, ["engine", "model_name", label], registry=self.registry)

    def _gauge(self, name: str, documentation: str) -> Gauge:
        gauge = Gauge(f"vllm:{name}", documentation, ["engine", "model_name"], registry=self.registry)
        return gauge.labels(ENGINE, self._model)

    def _counter(self, name: str, documentation: str) -> Counter:
        counter = Counter(f"vllm:{name}", documentation, ["engine", "model_name"], registry=self.registry)
        return counter.labels(ENGINE, self._model)

    def _histogram(self, name: str, documentation: str, buckets: tuple[float, ...]) -> Histogram:
        labels = ["engine", "model_name"]
        histogram = Histogram(f"vllm:{name}", documentation, labels, buckets=buckets, registry=self.registry)
        return histogram.labels(ENGINE, self._model)


def _one_two_five(limit: int) -> tuple[float, ...]:
    """1, 2, 5, 10, 20, 50 ... up to `limit`: vLLM's buckets for token counts."""
    buckets = [float(digit * 10**power) for power in range(len(str(limit))) for digit in (1, 2, 5)]
    return tuple(bucket for bucket in buckets if bucket <= limit)
