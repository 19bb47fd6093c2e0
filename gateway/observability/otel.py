"""OpenTelemetry: a span for each request, in it its wait in the queue and its calls to engines.

Imported only when `GATEWAY_OTLP_ENDPOINT` is set, for it needs the packages of the extra `otel`.
What else there is to say (service name, headers, sampling, batches) the SDK reads from its own
`OTEL_*` variables. The caller's W3C context is taken up, and each engine call carries its own on.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping, MutableMapping
from urllib.parse import urlsplit, urlunsplit

from opentelemetry.context import Context
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace import Span, SpanKind, StatusCode, Tracer, set_span_in_context
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from gateway.observability.request_record import RequestRecord

_TRACES_PATH = "/v1/traces"
_NAMELESS = "unknown_service"
_FLUSH_TIMEOUT_S = 2.0
_SERVER_ERROR = 500
_W3C = TraceContextTextMapPropagator()


class OpenTelemetryTracer:
    """Opens a span for each request; a thread of its own exports them."""

    def __init__(self, endpoint: str) -> None:
        resource = Resource.create()
        if str(resource.attributes["service.name"]).startswith(_NAMELESS):
            resource = resource.merge(Resource({"service.name": "vllm-gateway"}))
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._exporter = OTLPSpanExporter(endpoint=complete_endpoint(endpoint))
        self._provider.add_span_processor(BatchSpanProcessor(self._exporter))
        self._tracer = self._provider.get_tracer("gateway")

    def open_request(
        self, method: str, route: str, headers: Mapping[str, str]
    ) -> OpenTelemetryRequest:
        return OpenTelemetryRequest(self._tracer, method, route, headers)

    async def close(self) -> None:
        """What has not been sent yet is sent, unless nobody takes it."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_FLUSH_TIMEOUT_S):
                await asyncio.to_thread(self._provider.force_flush)
        self._exporter.shutdown()  # type: ignore[no-untyped-call]  # ends its retries
        await asyncio.to_thread(self._provider.shutdown)


class OpenTelemetryRequest:
    """A request's span, and whatever opens those inside it."""

    def __init__(self, tracer: Tracer, method: str, route: str, headers: Mapping[str, str]) -> None:
        self._tracer = tracer
        self._began_ns = time.time_ns()
        self._span = tracer.start_span(
            f"{method} {route}",
            _W3C.extract(headers),
            SpanKind.SERVER,
            {"http.request.method": method, "http.route": route},
            start_time=self._began_ns,
        )
        self._inside = set_span_in_context(self._span, Context())
        own = self._span.get_span_context()
        self.trace_id = f"{own.trace_id:032x}"
        self.is_sampled = own.trace_flags.sampled

    def open_call(self, engine: str, sequences: int) -> OpenTelemetryCall:
        return OpenTelemetryCall(self._tracer, self._inside, engine, sequences)

    def close(self, record: RequestRecord, request_id: str, status: int) -> None:
        if record.queued_at is not None:
            self._add_queue(record, record.queued_at)
        known: dict[str, str | int | None] = {
            "gateway.request_id": request_id,
            "http.response.status_code": status,
            "gateway.prompts": record.n_prompts,
            "gateway.shared_answers": record.shared or None,
            "gateway.chunks": record.stream.chunks or None if record.stream else None,
            "gen_ai.usage.input_tokens": record.prompt_tokens,
            "gen_ai.usage.output_tokens": record.completion_tokens,
            "error.type": record.error_code,
        }
        self._span.set_attributes({key: value for key, value in known.items() if value is not None})
        is_broken_stream = record.stream is not None and record.error_code is not None
        if status >= _SERVER_ERROR or is_broken_stream:
            self._span.set_status(StatusCode.ERROR, record.error_code)
        self._span.end()

    def _add_queue(self, record: RequestRecord, queued_at: float) -> None:
        """After the fact: its times are known, and nothing is called from within it."""
        began_ns = self._began_ns + int((queued_at - record.started) * 1e9)
        waited_s = record.queue_s if record.has_entered else time.perf_counter() - queued_at
        span = self._tracer.start_span("queue", self._inside, start_time=began_ns)
        span.set_attribute("gateway.entered", record.has_entered)
        span.end(began_ns + int(waited_s * 1e9))


class OpenTelemetryCall:
    """One call to an engine."""

    def __init__(self, tracer: Tracer, inside: Context, engine: str, sequences: int) -> None:
        about: dict[str, str | int] = {"server.address": engine, "gateway.sequences": sequences}
        self._span: Span = tracer.start_span("engine", inside, SpanKind.CLIENT, about)

    def put_headers(self, headers: MutableMapping[str, str]) -> None:
        _W3C.inject(headers, set_span_in_context(self._span, Context()))

    def close(self, error_code: str | None = None) -> None:
        if error_code is not None:
            self._span.set_status(StatusCode.ERROR, error_code)
        self._span.end()


def complete_endpoint(text: str) -> str:
    """A collector's address alone gets the path that OTLP has for traces."""
    parts = urlsplit(text)
    return text if parts.path.strip("/") else urlunsplit(parts._replace(path=_TRACES_PATH))
