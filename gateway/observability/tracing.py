"""What the gateway asks of whoever makes spans; `otel.py` does, where they are wanted."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from typing import Protocol

from aiohttp import web

from gateway.observability.request_record import RequestRecord


class CallSpan(Protocol):
    """One call of an engine."""

    def put_headers(self, headers: MutableMapping[str, str]) -> None:
        """So that the engine's own span becomes a child of this one."""

    def close(self, error_code: str | None = None) -> None: ...


class RequestSpan(Protocol):
    """A request."""

    trace_id: str
    is_sampled: bool

    def open_call(self, engine: str, sequences: int) -> CallSpan: ...
    def close(self, record: RequestRecord, request_id: str, status: int) -> None: ...


class Tracer(Protocol):
    """There is none unless spans are wanted."""

    def open_request(self, method: str, route: str, headers: Mapping[str, str]) -> RequestSpan: ...
    async def close(self) -> None: ...


SPAN: web.RequestKey[RequestSpan] = web.RequestKey("span", RequestSpan)
TRACER: web.AppKey[Tracer] = web.AppKey("tracer", Tracer)
