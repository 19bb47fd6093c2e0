"""An OpenTelemetry collector that keeps what it is sent; a real port, the real wire format."""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import threading
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from tests.fake_engine import serve_app
from tests.patience import PROGRAM_S


@dataclass(frozen=True)
class SeenSpan:
    """One span, as it arrived."""

    service: str
    name: str
    trace_id: str
    span_id: str
    parent_id: str
    began_ns: int
    ended_ns: int
    is_error: bool
    attributes: dict[str, Any]


@dataclass
class Collector:
    """Everything that came so far."""

    url: str = ""
    spans: list[SeenSpan] = field(default_factory=list)

    def named(self, name: str) -> list[SeenSpan]:
        return [span for span in self.spans if span.name == name]

    def take(self, body: bytes) -> None:
        for resource in ExportTraceServiceRequest.FromString(body).resource_spans:
            service = _read(resource.resource.attributes).get("service.name", "")
            for scope in resource.scope_spans:
                for span in scope.spans:
                    self.spans.append(
                        SeenSpan(
                            service,
                            span.name,
                            span.trace_id.hex(),
                            span.span_id.hex(),
                            span.parent_span_id.hex(),
                            span.start_time_unix_nano,
                            span.end_time_unix_nano,
                            span.status.code == span.status.STATUS_CODE_ERROR,
                            _read(span.attributes),
                        )
                    )


def _read(attributes: Any) -> dict[str, Any]:
    return {one.key: getattr(one.value, one.value.WhichOneof("value")) for one in attributes}


def build_collector(collector: Collector) -> web.Application:
    async def traces(request: web.Request) -> web.Response:
        body = await request.read()
        if body[:2] == b"\x1f\x8b":
            body = gzip.decompress(body)
        collector.take(body)
        return web.Response(content_type="application/x-protobuf")

    app = web.Application(client_max_size=2**26)
    app.router.add_post("/v1/traces", traces)
    return app


@contextlib.asynccontextmanager
async def serve_collector() -> AsyncIterator[Collector]:
    collector = Collector()
    async with serve_app(build_collector(collector)) as url:
        collector.url = url
        yield collector


@contextlib.contextmanager
def run_collector() -> Iterator[Collector]:
    """The same in a thread of its own, for tests that wait in plain code."""
    started: list[Collector] = []
    is_up = threading.Event()
    loop = asyncio.new_event_loop()

    async def serve() -> None:
        async with serve_collector() as collector:
            started.append(collector)
            is_up.set()
            with contextlib.suppress(asyncio.CancelledError):
                await asyncio.Event().wait()

    task = loop.create_task(serve())
    thread = threading.Thread(target=loop.run_until_complete, args=(task,), daemon=True)
    thread.start()
    if not is_up.wait(PROGRAM_S):
        raise TimeoutError("the collector does not listen")
    try:
        yield started[0]
    finally:
        loop.call_soon_threadsafe(task.cancel)
        thread.join(10)
        loop.close()
