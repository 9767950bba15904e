"""Prometheus metrics: base units, bounded labels. Names of models become labels only once the model is served."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from hfms_cli.types import Chunk

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0)
TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)


class Metrics:
    """All series of one server, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        self.requests = Counter("hfms_requests", "HTTP requests answered.", ["endpoint", "model", "status"], registry=r)
        self.duration = Histogram(
            "hfms_request_duration_seconds", "From request to last byte.", ["endpoint"], buckets=SECONDS, registry=r
        )
        self.first_token = Histogram(
            "hfms_time_to_first_token_seconds", "From call to first token.", ["model"], buckets=SECONDS, registry=r
        )
        self.inter_token = Histogram(
            "hfms_inter_token_latency_seconds",
            "Between two chunks of one choice.",
            ["model"],
            buckets=TOKEN_SECONDS,
            registry=r,
        )
        self.prompt_tokens = Counter("hfms_prompt_tokens", "Tokens read.", ["model"], registry=r)
        self.generation_tokens = Counter("hfms_generation_tokens", "Tokens written.", ["model"], registry=r)
        self.running = Gauge("hfms_requests_running", "Calls that an engine works on.", ["model"], registry=r)
        self.waiting = Gauge("hfms_requests_waiting", "Calls that have not begun.", ["model"], registry=r)
        self.outstanding = Gauge("hfms_tokens_outstanding", "Tokens that calls still ask for.", ["model"], registry=r)
        self.replicas = Gauge("hfms_model_replicas", "Engine processes.", ["model", "state"], registry=r)
        self.models_loaded = Gauge("hfms_models_loaded", "Models in memory.", registry=r)
        self.load_duration = Histogram(
            "hfms_model_load_duration_seconds",
            "Start of the process to ready.",
            ["model"],
            buckets=(0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600),
            registry=r,
        )
        self.unloads = Counter(
            "hfms_model_unloads", "Models that left memory: asked, idle or evicted.", ["model", "why"], registry=r
        )
        self.model_memory = Gauge("hfms_model_memory_bytes", "Memory that a model holds.", ["model"], registry=r)
        self.memory_used = Gauge("hfms_memory_used_bytes", "Memory in use on a device.", ["device"], registry=r)
        self.memory_limit = Gauge("hfms_memory_limit_bytes", "Memory of a device.", ["device"], registry=r)
        self.memory_ratio = Gauge("hfms_memory_utilization_ratio", "Used over limit.", ["device"], registry=r)
        self.hardware_utilization = Gauge(
            "hfms_hardware_utilization_ratio", "Share of a device that is busy.", ["device"], registry=r
        )
        self.storage_operations = Counter(
            "hfms_storage_operations", "Asked of a storage.", ["backend", "operation", "status"], registry=r
        )
        self.storage_bytes = Counter(
            "hfms_storage_bytes", "Of blocks that a storage sent and that were right.", ["backend"], registry=r
        )
        self.storage_duration = Histogram(
            "hfms_storage_operation_duration_seconds",
            "How long a storage took.",
            ["backend", "operation"],
            buckets=SECONDS,
            registry=r,
        )
        self.errors = Counter("hfms_errors", "Answers that are errors.", ["model", "type"], registry=r)
        self.plugin_errors = Counter("hfms_plugin_errors", "Unexpected exceptions.", ["plugin"], registry=r)

    def storage(self, source: str, operation: str, status: str, seconds: float, size: int = 0) -> None:
        """One operation of a storage, as `Router` and `Content` tell it. size: bytes that it sent."""
        self.storage_operations.labels(source, operation, status).inc()
        if size:
            self.storage_bytes.labels(source).inc(size)
        self.storage_duration.labels(source, operation).observe(seconds)

    @contextmanager
    def call(self, model: str, clock: Callable[[], float]) -> Iterator[CallMeasure]:
        """Measure one call from here to the end of the block, however it ends."""
        measure = CallMeasure(self, model, clock)
        try:
            yield measure
        finally:
            measure.end()

    def render(self) -> bytes:
        """The text that Prometheus reads."""
        return generate_latest(self.registry)


class CallMeasure:
    """Times and tokens of one call; token counters are written once, at the end."""

    def __init__(self, metrics: Metrics, model: str, clock: Callable[[], float]) -> None:
        self._metrics, self._model, self._clock = metrics, model, clock
        self._began = clock()
        self._last: dict[int, float] = {}
        self._between = metrics.inter_token.labels(model)
        self.prompt_tokens = 0
        self.completion_tokens = 0

    def chunk(self, chunk: Chunk) -> None:
        self.prompt_tokens += chunk.prompt_tokens
        self.completion_tokens += chunk.tokens
        if chunk.begins:
            return
        now = self._clock()
        if not self._last:
            self._metrics.first_token.labels(self._model).observe(now - self._began)
        elif (before := self._last.get(chunk.index)) is not None:
            self._between.observe(now - before)
        self._last[chunk.index] = now

    def end(self) -> None:
        self._metrics.prompt_tokens.labels(self._model).inc(self.prompt_tokens)
        self._metrics.generation_tokens.labels(self._model).inc(self.completion_tokens)


class _Fixed(Collector):
    """Series that were counted elsewhere."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def summed(texts: Iterable[bytes]) -> bytes:
    """Metrics of several processes as one text: counters and histograms are added, gauges are those of the first."""
    families: dict[str, Metric] = {}
    totals: dict[str, dict[tuple[str, tuple[tuple[str, str], ...]], float]] = {}
    for number, text in enumerate(texts):
        for family in text_string_to_metric_families(text.decode()):
            if number and family.type == "gauge":
                continue
            families.setdefault(family.name, family)
            total = totals.setdefault(family.name, {})
            for sample in family.samples:
                key = sample.name, tuple(sample.labels.items())
                total[key] = total.get(key, 0.0) + sample.value
    for name, family in families.items():
        family.samples = []
        for (sample_name, labels), value in totals[name].items():
            family.add_sample(sample_name, dict(labels), value)
    registry = CollectorRegistry()
    registry.register(_Fixed(list(families.values())))
    return generate_latest(registry)
