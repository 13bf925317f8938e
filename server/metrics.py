"""Numbers for Prometheus. Names begin with `mixbit_`; tokens are those of the requests' own usage."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from mixbit.engine.client import EngineState
from mixbit.engine.protocol import Stats
from mixbit.server.observe import Record
from mixbit.server.service import Services

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_OUTCOMES = ("completed", "cancelled", "failed", "timeout", "refused")
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


_GAUGES = {
    "ready": "1 while requests are taken",
    "requests_running": "Choices in the batch",
    "requests_waiting": "Choices in the queue",
    "cache_bytes": "Allocated for KV and states",
    "expert_memory_bytes": "For experts that are streamed from disk",
    "weights_unreadable": "1 if weights could not be read: see /health",
}
_COUNTERS = {
    "worker_restarts": "Workers that died and were replaced",
    "steps": "Steps of the worker that runs now",
    "preemptions": "Requests that gave up their memory for others",
    "leaks": "Times that something was held when nothing ran",
    "expert_hits": "Streamed experts that steps asked for and found in memory",
    "expert_misses": "Streamed experts that were read from disk",
    "expert_reads_ahead": "Of these, those of which something had been read before they were asked for",
    "expert_reads_unused": "Streamed experts of which something was read in vain, before they might be asked for",
    "expert_read_bytes": "Bytes of streamed experts read from disk",
    "expert_read_seconds": "Time in which the disk was read, each layer for itself",
    "expert_wait_seconds": "Time in which steps waited for the disk",
}


class Metrics:
    """The numbers of one application: a `Meter`."""

    def __init__(self, services: Services) -> None:
        disable_created_metrics()  # type: ignore[no-untyped-call]  # a time for each series: nobody asks
        self._registry = registry = CollectorRegistry()
        self._requests = Counter(
            "mixbit_requests", "Requests for text that reached the engine", ["outcome"], registry=registry
        )
        for outcome in _OUTCOMES:
            self._requests.labels(outcome)
        self._responses = Counter(
            "mixbit_http_responses", "Answers to requests of any kind", ["route", "status"], registry=registry
        )
        self._prompt = Counter("mixbit_prompt_tokens", "Tokens of prompts, those cached included", registry=registry)
        self._cached = Counter("mixbit_cached_tokens", "Tokens of prompts found in the cache", registry=registry)
        self._completion = Counter("mixbit_completion_tokens", "Tokens generated", registry=registry)
        self._first = Histogram(
            "mixbit_time_to_first_token_seconds", "From request to first text", registry=registry, buckets=_SECONDS
        )
        self._between = Histogram(
            "mixbit_inter_token_seconds",
            "Between texts of a choice, by their tokens",
            registry=registry,
            buckets=_BETWEEN,
        )
        registry.register(_EngineCollector(services))
        ProcessCollector(registry=registry)

    def first_token(self, seconds: float) -> None:
        """See Meter."""
        self._first.observe(seconds)

    def next_tokens(self, seconds: float, count: int) -> None:
        """See Meter."""
        self._between.observe(seconds / count)

    def generated(self, count: int) -> None:
        """See Meter."""
        self._completion.inc(count)

    def response(self, route: str, status: int) -> None:
        """See Meter."""
        self._responses.labels(route, str(status)).inc()

    def request(self, record: Record) -> None:
        """See Meter."""
        self._requests.labels(record.outcome).inc()
        self._prompt.inc(record.prompt_tokens)
        self._cached.inc(record.cached_tokens)
        self._completion.inc(record.silent_tokens)

    def text(self) -> bytes:
        """All of it, in Prometheus' text format."""
        return generate_latest(self._registry)


class _EngineCollector(Collector):
    """What the engines say of themselves, read when asked; labelled with the name of the model."""

    def __init__(self, services: Services) -> None:
        self._services = services

    def collect(self) -> Iterator[Metric]:
        """Zero where there is no worker."""
        gauges = {n: GaugeMetricFamily(f"mixbit_{n}", text, labels=["model"]) for n, text in _GAUGES.items()}
        counters = {n: CounterMetricFamily(f"mixbit_{n}", text, labels=["model"]) for n, text in _COUNTERS.items()}
        kv_text = "KV that running requests use, or kept for others"
        kv = GaugeMetricFamily("mixbit_kv_bytes", kv_text, labels=["model", "state"])
        for service in self._services.all:
            name, engine, ready = service.model.name, service.engine, service.engine.ready
            stats = engine.stats or Stats()
            gauges["ready"].add_metric([name], int(engine.state is EngineState.READY))
            gauges["requests_running"].add_metric([name], stats.running)
            gauges["requests_waiting"].add_metric([name], stats.waiting)
            gauges["cache_bytes"].add_metric([name], ready.cache_bytes if ready and engine.stats else 0)
            block_bytes = ready.block_bytes if ready else 0
            kv.add_metric([name, "used"], stats.blocks_used * block_bytes)
            kv.add_metric([name, "cached"], stats.blocks_cached * block_bytes)
            counters["worker_restarts"].add_metric([name], engine.restarts)
            counters["steps"].add_metric([name], stats.steps)
            counters["preemptions"].add_metric([name], stats.preemptions)
            counters["leaks"].add_metric([name], stats.leaks)
            gauges["weights_unreadable"].add_metric([name], int(stats.fault is not None))
            gauges["expert_memory_bytes"].add_metric([name], ready.expert_bytes if ready and engine.stats else 0)
            counters["expert_hits"].add_metric([name], stats.experts.hits)
            counters["expert_misses"].add_metric([name], stats.experts.misses)
            counters["expert_reads_ahead"].add_metric([name], stats.experts.ahead)
            counters["expert_reads_unused"].add_metric([name], stats.experts.unused)
            counters["expert_read_bytes"].add_metric([name], stats.experts.bytes_read)
            counters["expert_read_seconds"].add_metric([name], stats.experts.read_seconds)
            counters["expert_wait_seconds"].add_metric([name], stats.experts.wait_seconds)
        yield from (*gauges.values(), kv, *counters.values())
