"""What the gateway counts: every figure is declared here, once, with its labels and its meaning.

The names start with `gateway_`; `vllm:` belongs to the engine. Labels are bounded: routes, codes,
engines and keys of the settings, never what a caller sends. Each replica counts its own.
"""

from __future__ import annotations

import asyncio
import re
import time
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple

import prometheus_client
from aiohttp import web
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

from gateway.errors import REFUSALS, GatewayError
from gateway.observability.request_record import RequestRecord, StreamTiming

# A small model answers one question in 10 ms to 2 s, a batch in seconds; a queue lasts minutes.
SECONDS = (
    *(0.001, 0.0025, 0.005, 0.01, 0.015, 0.025, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 0.75),
    *(1, 1.5, 2.5, 5, 10, 30, 60, 120, 300),
)
# Its steps take 1 to 10 ms; what is longer is a stall.
GAP_SECONDS = (
    *(0.0005, 0.001, 0.0015, 0.002, 0.003, 0.004, 0.005, 0.0075, 0.01, 0.015, 0.02, 0.03, 0.05),
    *(0.1, 0.25, 0.5, 1, 2.5, 5, 15, 60),
)
LAG_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
PROMPTS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 358, 512, 1024, 2048, 4096, 10_000)

_LONGEST_STEP_S = 0.005  # of the event loop, at a scrape
_VERSION = re.compile(r"version=([^;,]*)")
_NUMBERS = re.compile(r"[0-9]{1,4}(\.[0-9]{1,4}){0,3}\s*")
_ALL_KEYS = "(all)"  # no key can be called so

# What a gateway that stops turns away: `not_ready` to callers, counted apart because nobody failed.
STOPPING = "stopping"
_GONE, _CALLER_GONE = 499, "caller_gone"
# What is there from the start: `rate` does not see the count with which a series is born.
_STATUSES = (200, 400, 429, _GONE, 500, 502, 503, 504)
_FURTHER_FAILURES = (
    ("engine_garbled", "engine"),
    *(("http_500", "engine"), ("http_503", "engine")),
)
_RETRIED = ("engine_busy", "not_ready", "out_of_files")  # and whatever is the engine's
# Those of batches besides.
_BATCH_RETRIED = ("overloaded", "queue_timeout", "engine_failed", "engine_unreachable")
_PROMPT_REFUSALS = ("empty_prompt", "prompt_too_long", "not_text", "engine_refused")

Rows = Iterable[tuple[Sequence[str], float]]


@dataclass(frozen=True)
class Declared:
    """A row of the table in docs/metrics.md."""

    name: str
    kind: str
    labels: tuple[str, ...]
    meaning: str


class LoopCounter(Counter):
    """Counted by the event loop alone, which also reads it: a lock would cost each request more
    than the counting does.
    """

    def inc(self, amount: float = 1, exemplar: dict[str, str] | None = None) -> None:
        self._value._value += amount  # noqa: SLF001 — its own `inc` has the lock


class LoopHistogram(Histogram):
    """The same; and of twenty buckets, the one is found in five steps."""

    def observe(self, amount: float, exemplar: dict[str, str] | None = None) -> None:
        if exemplar:
            super().observe(amount, exemplar)
            return
        bucket = self._buckets[bisect_left(self._upper_bounds, amount)]
        self._sum._value += amount  # noqa: SLF001
        bucket._value += 1  # noqa: SLF001


class LiveFigure(Collector):
    """Read where it is kept, at the moment of asking: label values with their number."""

    def __init__(
        self, registry: CollectorRegistry, kind: str, name: str, text: str, labels: Sequence[str]
    ) -> None:
        self._family = CounterMetricFamily if kind == "counter" else GaugeMetricFamily
        self._name, self._text, self._labels = name, text, labels
        self.read: Callable[[], Rows] = tuple
        registry.register(self)

    def collect(self) -> Iterator[Metric]:
        family = self._family(self._name, self._text, labels=self._labels)
        for values, number in self.read():
            family.add_metric(values, number)
        yield family


class WithoutKeys(Collector):
    """What is counted by key as one sum: who the callers are is not everybody's business."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            if any("key" in sample.labels for sample in family.samples):
                family.samples = list(self._sum_keys(family.samples))
            yield family

    @staticmethod
    def _sum_keys(samples: Sequence[Sample]) -> Iterator[Sample]:
        sums: dict[tuple[tuple[str, str], ...], float] = {}
        for sample in samples:
            labels = tuple((sample.labels | {"key": _ALL_KEYS}).items())
            sums[labels] = sums.get(labels, 0.0) + sample.value
        for labels, value in sums.items():
            yield Sample(samples[0].name, dict(labels), value)


class _Taken:
    """What was collected, for who writes it down."""

    def __init__(self, families: list[Metric]) -> None:
        self._families = families

    def collect(self) -> list[Metric]:
        return self._families


@dataclass(frozen=True, slots=True)
class RouteFigures:
    """One route's children: finding them costs more than counting on them."""

    request: Histogram
    queue: Histogram
    first_chunk: Histogram
    chunk_gap: Histogram
    longest_chunk_gap: Histogram

    def count_stream(
        self, stream: StreamTiming, started: float, exemplar: dict[str, str] | None
    ) -> None:
        if stream.chunks:
            self.first_chunk.observe(stream.first_chunk_at - started, exemplar)
        if stream.chunks > 1:
            span_s = stream.last_chunk_at - stream.first_chunk_at
            self.chunk_gap.observe(span_s / (stream.chunks - 1), exemplar)
            self.longest_chunk_gap.observe(stream.longest_gap_s, exemplar)


class _ExpectedRoutes(NamedTuple):
    all: tuple[str, ...]
    entering: tuple[str, ...]
    streaming: tuple[str, ...]


class Metrics:
    """The instruments, by name; `render` is the body of GET /metrics."""

    def __init__(self) -> None:
        # The time of each series' first count would be a second series for every one of them.
        prometheus_client.disable_created_metrics()  # type: ignore[no-untyped-call]
        self.registry = CollectorRegistry()
        self.declared: list[Declared] = []
        self._declare_requests()
        self._declare_streams()
        self._declare_admission()
        self._declare_predict()
        self._declare_engines()
        self._declare_batches()
        self._declare_responses()
        self._declare_records()
        self._declare_models()
        self._declare_process()
        self.tokens_in = self.tokens.labels("in")
        self.tokens_out = self.tokens.labels("out")
        for reason in (*REFUSALS, STOPPING):
            self.refused.labels(reason)
        self._failures = _list_failures()
        for code, source in self._failures:
            self.prompts_failed.labels(code)
            if source == "engine" or code in _RETRIED:
                self.retried_calls.labels(code)
        for code in _PROMPT_REFUSALS:
            self.prompts_failed.labels(code)
        self._expected: _ExpectedRoutes | None = None
        self._requests_by = lru_cache(maxsize=1024)(self.requests.labels)
        self._of_route = lru_cache(maxsize=64)(self._find_route)

    def _declare_requests(self) -> None:
        self.requests = self._counter("requests", "Requests answered.", "route", "status")
        self.request_seconds = self._histogram(
            "request_seconds", "From a request's first byte to its answer's last.", "route"
        )
        self.queue_seconds = self._histogram(
            "queue_seconds", "Time that a request which entered had waited.", "route"
        )
        self.errors = self._counter(
            "errors",
            "Requests that ended in an error; source: gateway, engine or caller, whose is any 4xx.",
            *("route", "code", "source"),
        )

    def _declare_streams(self) -> None:
        self.first_chunk_seconds = self._histogram(
            "first_chunk_seconds",
            "From a request's first byte to the first chunk of its stream.",
            "route",
        )
        self.chunk_gap_seconds = self._histogram(
            "chunk_gap_seconds",
            "Mean time between two chunks; one observation a stream.",
            "route",
            buckets=GAP_SECONDS,
        )
        self.longest_chunk_gap_seconds = self._histogram(
            "longest_chunk_gap_seconds",
            "Longest time between two chunks; one observation a stream.",
            "route",
            buckets=GAP_SECONDS,
        )
        self.broken_streams = self._counter(
            "broken_streams", "Streams that ended in an error, after a status of 200.", "route"
        )

    def _declare_admission(self) -> None:
        self.refused = self._counter(
            "refused", "Requests turned away before an engine saw them.", "reason"
        )
        self.running_sequences = self._live_gauge(
            "running_sequences", "Sequences inside the engines.", "lane"
        )
        self.waiting_sequences = self._live_gauge(
            "waiting_sequences", "Sequences waiting to enter.", "lane"
        )
        self.max_running_sequences = self._live_gauge(
            "max_running_sequences",
            "Sequences that may be inside at once: what the engines run and an eighth more, where "
            "that is known; GATEWAY_MAX_RUNNING at most, of each model.",
        )
        self.max_waiting_sequences = self._live_gauge(
            "max_waiting_sequences", "Sequences that may wait (GATEWAY_MAX_WAITING for each model)."
        )
        self.redis_away = self._live_gauge(
            "redis_away", "1 while Redis, which is to keep all gateways' limits, does not answer."
        )
        self.redis_away.read = lambda: [((), 0)]  # where there is none to be away
        self.limits_without_redis = self._counter(
            "limits_without_redis",
            "Calls of keys with limits while Redis was away; outcome is local or refused.",
            "outcome",
        )
        for outcome in ("local", "refused"):
            self.limits_without_redis.labels(outcome)
        self.waiting_refusals = self._live_gauge(
            "waiting_refusals",
            "Refusals that wait their turn; many: a flood of bad requests "
            "(GATEWAY_REFUSALS_PER_S).",
        )
        self.held_body_bytes = self._live_gauge(
            "held_body_bytes",
            "Bytes of request bodies in memory; at most GATEWAY_MAX_HELD_BYTES.",
        )
        self.tokens = self._counter(
            "tokens", "Tokens by the engine's count; direction is in or out.", "direction"
        )
        self.usage_requests = self._live_counter(
            "usage_requests",
            "Requests by key, on GATEWAY_METRICS_PORT; elsewhere their sum.",
            "key",
        )
        self.usage_tokens = self._live_counter(
            "usage_tokens",
            "Tokens by key, as the engine counted them; names as above.",
            "key",
            "direction",
        )

    def _declare_predict(self) -> None:
        self.predict_prompts = self._histogram(
            "predict_prompts", "Prompts in a /predict call.", buckets=PROMPTS
        )
        self.predict_characters = self._counter(
            "predict_characters", "Characters in the answers of /predict."
        )
        self.prompts_failed = self._counter(
            "prompts_failed", "Prompts of /predict that got no answer.", "code"
        )
        self.deduplicated = self._counter(
            "deduplicated_prompts", "Greedy prompts answered by the answer to an identical one."
        )
        last = "of the last /predict call with several prompts"
        self.last_batch_prompts = self._gauge("last_batch_prompts", f"Prompts {last}.")
        self.last_batch_seconds = self._gauge("last_batch_seconds", f"Duration {last}.")
        self.last_batch_tokens = self._gauge("last_batch_tokens", f"New tokens {last}.")
        self.last_batch_characters = self._gauge(
            "last_batch_characters", f"Characters in the answers {last}."
        )

        self.grade = self._live_gauge(
            "grade", "The last grade, from the file GATEWAY_GRADE_RECORD.", "figure", "unit"
        )
        self.grade_timestamp_seconds = self._live_gauge(
            "grade_timestamp_seconds", "When the last grade was taken.", "name"
        )

    def _declare_engines(self) -> None:
        self.engine_ready = self._live_gauge(
            "engine_ready", "1 when the engine has answered its warm-up.", "engine"
        )
        self.engine_info = self._live_gauge(
            "engine_info",
            "1; the model that the engine serves, empty until it has told.",
            "engine",
            "model",
        )
        self.engine_state = self._live_gauge(
            "engine_state", "1 at the present state: down, warming or ready.", "engine", "state"
        )
        self.engine_breaker_open = self._live_gauge(
            "engine_breaker_open",
            "1 while the engine is left alone after failures in a row.",
            "engine",
        )
        self.engine_running_sequences = self._live_gauge(
            "engine_running_sequences",
            "Sequences inside the engine; told until it has finished, also when no longer listed.",
            "engine",
        )
        self.engine_failures = self._counter(
            "engine_failures", "Calls that the engine failed, as the breaker sees them.", "engine"
        )
        self.engine_errors = self._counter(
            "engine_errors",
            "Calls that it answered with an error of its own, not in time, or with a stream that "
            "broke off. The request may have caused that, so the breaker opens only if a question "
            "of the gateway's fails as well.",
            "engine",
        )
        self.breaker_trips = self._counter(
            "breaker_trips", "Times that failures in a row opened the breaker.", "engine"
        )
        self.warmups = self._counter(
            "warmups", "Warm-up batches; outcome is done or failed.", "engine", "outcome"
        )
        self.warmup_seconds = self._gauge(
            "warmup_seconds", "How long the last warm-up batch took.", "engine"
        )
        self.retried_calls = self._counter(
            "retried_calls", "Calls made again, by the code of the first one's failure.", "code"
        )
        self.retried = self._counter(
            "retried_prompts", "Prompts of /predict run again because an engine lost them."
        )

    def _declare_batches(self) -> None:
        self.batch_jobs = self._live_gauge("batch_jobs", "Batches that this gateway runs.")
        self.batch_running = self._live_gauge(
            "batch_running_lines", "Requests of batches that have a slot of the window."
        )
        self.batch_window = self._live_gauge(
            "batch_window_lines",
            "Requests of batches that may run at once, as found out so far for the models that "
            "have any.",
        )
        for figure in (self.batch_jobs, self.batch_running, self.batch_window):
            figure.read = lambda: [((), 0)]  # until batches are turned on
        self.batch_lines = self._counter(
            "batch_lines", "Requests of batches answered; outcome is good or error.", "outcome"
        )
        self.batch_retries = self._counter(
            "batch_retries", "Requests of batches asked again, by the code of the refusal.", "code"
        )
        self.batch_takeovers = self._counter(
            "batch_takeovers", "Batches taken over from a gateway that had fallen silent."
        )
        self.batch_storage_failures = self._counter(
            "batch_storage_failures", "Times that a batch had to wait for its database or disk."
        )
        for outcome in ("good", "error"):
            self.batch_lines.labels(outcome)
        for code in (*_RETRIED, *_BATCH_RETRIED):
            self.batch_retries.labels(code)

    def _declare_responses(self) -> None:
        self.background_responses = self._live_gauge(
            "background_responses", "Background responses that this gateway has queued or running."
        )
        self.background_responses.read = lambda: [((), 0)]  # until responses are stored
        self.responses_stored = self._counter(
            "responses_stored", "Responses that were stored, those in the background at their end."
        )
        self.response_storage_failures = self._counter(
            "response_storage_failures",
            "Times that the database of stored responses did not answer or was full.",
        )

    def _declare_records(self) -> None:
        self.records_away = self._live_gauge(
            "records_away", "1 while the database of usage and audit does not answer."
        )
        self.records_waiting = self._live_gauge(
            "records_waiting",
            "What waits to be written there; kind is usage (sums by key, model and day) or audit "
            "(rows).",
            "kind",
        )
        self.records_away.read = lambda: [((), 0)]  # until usage is kept
        self.records_waiting.read = lambda: [(("usage",), 0), (("audit",), 0)]
        self.records_dropped = self._counter(
            "records_dropped",
            "What was not kept because too much waited; kind is usage, audit or text.",
            "kind",
        )
        for kind in ("usage", "audit", "text"):
            self.records_dropped.labels(kind)

    def _declare_models(self) -> None:
        self.model_ready = self._live_gauge(
            "model_ready", "1 when an engine is ready for the model.", "model"
        )
        self.model_held_calls = self._live_gauge(
            "model_held_calls", "Calls of the model that wait until it has an engine.", "model"
        )
        self.model_running_sequences = self._live_gauge(
            "model_running_sequences", "Sequences inside the model's engines.", "model", "lane"
        )
        self.model_waiting_sequences = self._live_gauge(
            "model_waiting_sequences", "Sequences waiting for the model.", "model", "lane"
        )
        self.model_requests = self._live_counter(
            "model_requests", "Requests that asked the model, as they came.", "model"
        )
        self.model_tokens = self._live_counter(
            "model_tokens",
            "Tokens of the model by its engines' count; direction is in or out.",
            "model",
            "direction",
        )

    def _declare_process(self) -> None:
        self.event_loop_lag_seconds = self._histogram(
            "event_loop_lag_seconds",
            "How much later than asked the event loop woke up, measured twice a second.",
            buckets=LAG_SECONDS,
        )
        self.event_loop_tasks = self._live_gauge(
            "event_loop_tasks",
            "Tasks on the event loop: one for each open connection, and a few dozen that stay.",
        )
        self.log_lines_dropped = self._live_counter(
            "log_lines_dropped",
            "Log lines that were lost: the disk is full, or nobody reads the pipe.",
        )
        self.log_lines_dropped.read = lambda: [((), 0)]  # until there is a log to ask
        self.start_time_seconds = self._live_gauge(
            "start_time_seconds", "When the gateway started."
        )
        self.build_info = self._live_gauge(
            "build_info", "1; the program and its Python.", "version", "python"
        )
        self.config_info = self._live_gauge(
            "config_info",
            "1; the settings, as a fingerprint without secrets, and some of them.",
            *("fingerprint", "prompt_style", "max_tokens", "routing", "dedup"),
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        self._declare(f"{name}_total", "counter", labels, text)
        return LoopCounter(f"gateway_{name}", text, labels, registry=self.registry)

    def _histogram(
        self, name: str, text: str, *labels: str, buckets: Sequence[float] = SECONDS
    ) -> Histogram:
        self._declare(name, "histogram", labels, text)
        return LoopHistogram(
            f"gateway_{name}", text, labels, buckets=buckets, registry=self.registry
        )

    def _gauge(self, name: str, text: str, *labels: str) -> Gauge:
        self._declare(name, "gauge", labels, text)
        return Gauge(f"gateway_{name}", text, labels, registry=self.registry)

    def _live_counter(self, name: str, text: str, *labels: str) -> LiveFigure:
        self._declare(f"{name}_total", "counter", labels, text)
        return LiveFigure(self.registry, "counter", f"gateway_{name}", text, labels)

    def _live_gauge(self, name: str, text: str, *labels: str) -> LiveFigure:
        self._declare(name, "gauge", labels, text)
        return LiveFigure(self.registry, "gauge", f"gateway_{name}", text, labels)

    def _declare(self, name: str, kind: str, labels: tuple[str, ...], meaning: str) -> None:
        self.declared.append(Declared(f"gateway_{name}", kind, labels, meaning))

    def forget_engine(self, url: str) -> None:
        """What is counted of one that is no more."""
        for figure in (self.engine_failures, self.engine_errors, self.breaker_trips):
            figure.remove(url)
        self.warmup_seconds.remove(url)
        for outcome in ("done", "failed"):
            self.warmups.remove(url, outcome)

    def _find_route(self, route: str) -> RouteFigures:
        return RouteFigures(
            self.request_seconds.labels(route),
            self.queue_seconds.labels(route),
            self.first_chunk_seconds.labels(route),
            self.chunk_gap_seconds.labels(route),
            self.longest_chunk_gap_seconds.labels(route),
        )

    def expect_routes(
        self, routes: Iterable[str], *, entering: Iterable[str], streaming: Iterable[str]
    ) -> None:
        """Their series begin at zero, from the first scrape on. Some routes enter the queue, some
        of those stream; others have no histograms yet, because each is 25 lines of every scrape.
        """
        self._expected = _ExpectedRoutes(tuple(routes), tuple(entering), tuple(streaming))

    def _begin_at_zero(self, expected: _ExpectedRoutes) -> None:
        for route in expected.all:
            for status in _STATUSES:
                self.requests.labels(route, status)
            for code, source in (*self._failures, (_CALLER_GONE, "caller")):
                self.errors.labels(route, code, source)
        for route in expected.entering:
            self.request_seconds.labels(route)
            self.queue_seconds.labels(route)
        for route in expected.streaming:
            self._find_route(route)
            self.broken_streams.labels(route)

    def count_request(
        self,
        record: RequestRecord,
        status: int,
        duration_s: float,
        exemplar: dict[str, str] | None = None,
    ) -> None:
        """Once a request, of what was learnt on its way."""
        self._requests_by(record.route, status).inc()
        figures = self._of_route(record.route)
        figures.request.observe(duration_s, exemplar)
        if record.has_entered:
            figures.queue.observe(record.queue_s, exemplar)
        if record.stream is not None:
            figures.count_stream(record.stream, record.started, exemplar)
        if status >= 400 or record.error_code is not None:
            self._count_error(record, status)

    def count_answers(self, record: RequestRecord, characters: int) -> None:
        """Once a /predict call; one with several prompts is a batch."""
        self.predict_characters.inc(characters)
        if record.n_prompts is not None and record.n_prompts > 1:
            self.last_batch_prompts.set(record.n_prompts)
            self.last_batch_seconds.set(record.elapsed_s())
            self.last_batch_tokens.set(record.completion_tokens or 0)
            self.last_batch_characters.set(characters)

    def _count_error(self, record: RequestRecord, status: int) -> None:
        code = record.error_code or (_CALLER_GONE if status == _GONE else f"http_{status}")
        source = record.error_source or "engine"
        if 400 <= status < _GONE or code == _CALLER_GONE:
            source = "caller"  # whoever found it: vLLM refuses a bad prompt, the gateway bad JSON
        self.errors.labels(record.route, code, source).inc()
        if record.stream is not None and record.error_code is not None:
            self.broken_streams.labels(record.route).inc()
        if code == STOPPING or code in REFUSALS:
            self.refused.labels(code).inc()

    async def render(self, accept: str = "", *, by_key: bool) -> tuple[bytes, str]:
        """Text in the form that is asked for, and its type. Of many engines it is a megabyte, whose
        writing would keep all streams waiting: a thread does that.
        """
        encode: Any
        encode, content_type = _choose_form(accept)
        if self._expected is not None:
            # A thousand series, which nobody needs before they are read.
            await asyncio.to_thread(self._begin_at_zero, self._expected)
            self._expected = None
        taken = _Taken(await self._collect(by_key=by_key))
        return bytes(await asyncio.to_thread(encode, taken)), content_type

    async def _collect(self, *, by_key: bool) -> list[Metric]:
        """On the event loop, where what is counted changes, but never for long at a stretch."""
        registry = self.registry if by_key else WithoutKeys(self.registry)
        families = []
        began = time.thread_time()
        for family in registry.collect():
            families.append(family)
            if time.thread_time() - began > _LONGEST_STEP_S:
                await asyncio.sleep(0)
                began = time.thread_time()
        return families


def _list_failures() -> list[tuple[str, str]]:
    """The codes of what is no caller's doing, with who failed."""
    kinds: list[type[GatewayError]] = [GatewayError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    own = {(kind.code, kind.source): None for kind in kinds if kind.status >= 500}
    return [*own, *_FURTHER_FAILURES]


def _choose_form(accept: str) -> tuple[Any, str]:
    """Plain text for who asks for a version that is none: the library would stumble over it."""
    versions = _VERSION.findall(accept)
    return choose_encoder(accept if all(map(_NUMBERS.fullmatch, versions)) else "")


METRICS = web.AppKey("metrics", Metrics)


def list_metrics() -> list[Declared]:
    """Every figure, in order: the table in docs/metrics.md."""
    return Metrics().declared
