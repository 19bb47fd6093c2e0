"""What the gateway counts; one object an app, its own registry, bounded labels.

The names start with `gateway_`; `vllm:` belongs to the engine.
"""

from __future__ import annotations

from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.openmetrics.exposition import generate_latest

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
PROMPTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 358, 512, 1024, 2048, 4096, 10_000)


class Metrics:
    """The instruments, by name; `render` is the body of GET /metrics."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "gateway_requests", "Requests answered.", ["route", "status"], registry=self.registry
        )
        self.request_seconds = Histogram(
            "gateway_request_seconds",
            "From a request's first byte to its answer's last.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.queue_seconds = Histogram(
            "gateway_queue_seconds",
            "Time a request waited to enter.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.first_chunk_seconds = Histogram(
            "gateway_first_chunk_seconds",
            "From a request's first byte to the first chunk of its stream.",
            ["route"],
            buckets=SECONDS,
            registry=self.registry,
        )
        self.predict_prompts = Histogram(
            "gateway_predict_prompts",
            "Prompts in a /predict call.",
            buckets=PROMPTS,
            registry=self.registry,
        )
        self.prompts_failed = Counter(
            "gateway_prompts_failed",
            "Prompts of /predict that got no answer.",
            ["code"],
            registry=self.registry,
        )
        self.tokens = Counter(
            "gateway_tokens",
            "Tokens of /predict by the engine's count.",
            ["direction"],
            registry=self.registry,
        )
        self.running = Gauge(
            "gateway_running_sequences",
            "Sequences inside the engines.",
            ["lane"],
            registry=self.registry,
        )
        self.waiting = Gauge(
            "gateway_waiting_sequences",
            "Sequences waiting to enter.",
            ["lane"],
            registry=self.registry,
        )
        self.usage_requests = Counter(
            "gateway_usage_requests", "Requests by key.", ["key"], registry=self.registry
        )
        self.deduplicated = Counter(
            "gateway_deduplicated_prompts",
            "Greedy prompts answered by the answer to an identical one.",
            registry=self.registry,
        )
        self.retried = Counter(
            "gateway_retried_prompts",
            "Prompts run again because an engine lost them.",
            registry=self.registry,
        )
        self.usage = Counter(
            "gateway_usage_tokens",
            "Tokens by key, as the engine counted them.",
            ["key", "direction"],
            registry=self.registry,
        )
        self.refused = Counter(
            "gateway_refused",
            "Requests refused before an engine saw them.",
            ["reason"],
            registry=self.registry,
        )
        self.engine_ready = Gauge(
            "gateway_engine_ready",
            "1 when the engine has answered its warm-up.",
            ["engine"],
            registry=self.registry,
        )
        self.warmup_seconds = Gauge(
            "gateway_warmup_seconds",
            "How long the last warm-up batch took.",
            ["engine"],
            registry=self.registry,
        )

    def read_usage(self) -> dict[str, dict[str, int]]:
        """Requests and tokens by key."""
        usage: dict[str, dict[str, int]] = {}
        names = {"in": "prompt_tokens", "out": "completion_tokens"}
        for family in self.usage_requests.collect():
            for sample in family.samples:
                if sample.name.endswith("_total"):
                    entry = dict.fromkeys(("requests", *names.values()), 0)
                    usage[sample.labels["key"]] = entry | {"requests": int(sample.value)}
        for family in self.usage.collect():
            for sample in family.samples:
                if sample.name.endswith("_total"):
                    entry = usage[sample.labels["key"]]
                    entry[names[sample.labels["direction"]]] = int(sample.value)
        return usage

    def render(self) -> bytes:
        """OpenMetrics text, which Prometheus and people read."""
        return bytes(generate_latest(self.registry))  # type: ignore[no-untyped-call]


METRICS = web.AppKey("metrics", Metrics)
