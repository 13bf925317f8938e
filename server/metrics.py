"""Numbers for Prometheus. Names begin with `mixbit_`; tokens are those of the requests' own usage."""

from __future__ import annotations

from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, ProcessCollector, disable_created_metrics
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from mixbit.engine.client import Engine, EngineState
from mixbit.engine.protocol import Stats
from mixbit.server.observe import Record

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4

_OUTCOMES = ("completed", "cancelled", "failed", "timeout", "refused")
_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)


class Metrics:
    """The numbers of one application: a `Meter`."""

    def __init__(self, engine: Engine) -> None:
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
        registry.register(_EngineCollector(engine))
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
    """What the engine says of itself, read when asked."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    def collect(self) -> Iterator[Metric]:
        """Zero where there is no worker."""
        engine, ready = self._engine, self._engine.ready
        stats = engine.stats or Stats()
        yield _gauge("mixbit_ready", "1 while requests are taken", int(engine.state is EngineState.READY))
        yield _gauge("mixbit_requests_running", "Choices in the batch", stats.running)
        yield _gauge("mixbit_requests_waiting", "Choices in the queue", stats.waiting)
        yield _gauge("mixbit_cache_bytes", "Allocated for KV and states", ready.cache_bytes if ready else 0)
        block_bytes = ready.block_bytes if ready else 0
        kv = GaugeMetricFamily("mixbit_kv_bytes", "KV that running requests use, or kept for others", labels=["state"])
        kv.add_metric(["used"], stats.blocks_used * block_bytes)
        kv.add_metric(["cached"], stats.blocks_cached * block_bytes)
        yield kv
        yield _counter("mixbit_worker_restarts", "Workers that died and were replaced", engine.restarts)
        yield _counter("mixbit_steps", "Steps of the worker that runs now", stats.steps)
        yield _counter("mixbit_preemptions", "Requests that gave up their memory for others", stats.preemptions)
        yield _counter("mixbit_leaks", "Times that something was held when nothing ran", stats.leaks)


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(name, text, value=value)


def _counter(name: str, text: str, value: float) -> CounterMetricFamily:
    return CounterMetricFamily(name, text, value=value)
