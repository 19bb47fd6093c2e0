"""What the gateway counts; one object an app, its own registry, bounded labels.

The names start with `gateway_`; `vllm:` belongs to the engine. With several workers each counts
into files of a shared folder, and whichever is asked answers for all.
"""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.multiprocess import MultiProcessCollector
from prometheus_client.openmetrics.exposition import generate_latest
from prometheus_client.registry import Collector

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PROMPTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 358, 512, 1024, 2048, 4096, 10_000)


class Metrics:
    """The instruments, by name; `render` is the body of GET /metrics."""

    def __init__(self, folder: Path | None = None) -> None:
        self.registry = CollectorRegistry()
        self._folder = folder
        self._live: list[Collector] = []

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"gateway_{name}", text, labels, registry=self.registry)

        def histogram(name: str, text: str, *labels: str, buckets: Any = SECONDS) -> Histogram:
            return Histogram(
                f"gateway_{name}", text, labels, buckets=buckets, registry=self.registry
            )

        def gauge(name: str, text: str, *labels: str, mode: Any = "livemostrecent") -> Gauge:
            return Gauge(
                f"gateway_{name}", text, labels, registry=self.registry, multiprocess_mode=mode
            )

        self.requests = counter("requests", "Requests answered.", "route", "status")
        self.request_seconds = histogram(
            "request_seconds", "From a request's first byte to its answer's last.", "route"
        )
        self.queue_seconds = histogram("queue_seconds", "Time a request waited to enter.", "route")
        self.first_chunk_seconds = histogram(
            "first_chunk_seconds",
            "From a request's first byte to the first chunk of its stream.",
            "route",
        )
        self.predict_prompts = histogram(
            "predict_prompts", "Prompts in a /predict call.", buckets=PROMPTS
        )
        self.prompts_failed = counter(
            "prompts_failed", "Prompts of /predict that got no answer.", "code"
        )
        self.tokens = counter("tokens", "Tokens by the engine's count.", "direction")
        self.deduplicated = counter(
            "deduplicated_prompts", "Greedy prompts answered by the answer to an identical one."
        )
        self.retried = counter("retried_prompts", "Prompts run again because an engine lost them.")
        self.refused = counter("refused", "Requests refused before an engine saw them.", "reason")
        self.engine_ready = gauge(
            "engine_ready", "1 when the engine has answered its warm-up.", "engine", mode="livemax"
        )
        self.warmup_seconds = gauge(
            "warmup_seconds", "How long the last warm-up batch took.", "engine"
        )

        self.tokens_in = self.tokens.labels("in")
        self.tokens_out = self.tokens.labels("out")
        self._requests_by = lru_cache(maxsize=1024)(self.requests.labels)
        self._seconds_by = lru_cache(maxsize=64)(self.request_seconds.labels)

    def count_request(self, route: str, status: int, duration_s: float) -> None:
        """Finding a label's child costs more than counting on it, so the children are kept."""
        self._requests_by(route, status).inc()
        self._seconds_by(route).observe(duration_s)

    def add_live(self, collector: Collector) -> None:
        """Figures that are read where they are kept, at the moment of asking."""
        self._live.append(collector)
        if self._folder is None:
            self.registry.register(collector)

    def render(self) -> bytes:
        """OpenMetrics text; with several workers, their sum."""
        registry = self.registry
        if self._folder is not None:
            registry = CollectorRegistry()
            MultiProcessCollector(registry, str(self._folder))  # type: ignore[no-untyped-call]
            for collector in self._live:
                registry.register(collector)
        return bytes(generate_latest(registry))  # type: ignore[no-untyped-call]


METRICS = web.AppKey("metrics", Metrics)
