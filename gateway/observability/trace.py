"""What is known about one request while it is served; from it come its log line, its headers, its
figures and, where spans are wanted, what they tell.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Protocol

from aiohttp import web


class CallSpan(Protocol):
    """One call to an engine, as spans see it."""

    def put_headers(self, headers: MutableMapping[str, str]) -> None:
        """So that the engine's own span becomes a child of this one."""

    def close(self, error_code: str | None = None) -> None: ...


class RequestSpan(Protocol):
    """A request, as spans see it."""

    trace_id: str
    is_sampled: bool

    def open_call(self, engine: str, sequences: int) -> CallSpan: ...
    def close(self, trace: Trace, status: int) -> None: ...


class SpanSource(Protocol):
    """Whoever makes spans (spans.py); there is none unless they are wanted."""

    def open_request(self, method: str, route: str, headers: Mapping[str, str]) -> RequestSpan: ...
    async def close(self) -> None: ...


# The caller's own trace, which goes on to the engine.
CONTEXT_HEADERS = ("traceparent", "tracestate")


@dataclass(slots=True)
class Trace:
    """Request-long facts, filled in by whoever learns them."""

    request_id: str
    route: str
    started: float = field(default_factory=time.perf_counter)
    span: RequestSpan | None = None
    queued_at: float | None = None
    has_entered: bool = False
    queue_s: float = 0.0
    engine_s: float = 0.0
    calls: int = 0
    carried: Mapping[str, str] = field(default_factory=dict)  # of the caller's, for the engine
    n_prompts: int | None = None
    prompt_tokens: int | None = None
    completion_tokens: int | None = None
    usage: tuple[int, int] | None = None  # of a stream, as far as it has been told
    error_code: str | None = None
    error_source: str | None = None
    shared: int = 0
    deadline: float | None = None
    is_streaming: bool = False
    chunks: int = 0
    first_chunk_at: float = 0.0
    longest_gap_s: float = 0.0
    last_chunk_at: float = 0.0

    def elapsed_s(self) -> float:
        return time.perf_counter() - self.started

    def note_error(self, code: str, source: str) -> None:
        self.error_code, self.error_source = code, source

    def note_queued(self) -> None:
        """It asks to enter now."""
        self.queued_at = time.perf_counter()

    def note_entered(self) -> None:
        """It has asked, waited and entered."""
        self.has_entered = True
        self.queue_s = time.perf_counter() - (self.queued_at or self.started)

    def note_chunk(self) -> None:
        """For each chunk of a stream, so a few additions and nothing else."""
        now = time.perf_counter()
        if not self.chunks:
            self.first_chunk_at = now
        elif now - self.last_chunk_at > self.longest_gap_s:
            self.longest_gap_s = now - self.last_chunk_at
        self.chunks += 1
        self.last_chunk_at = now

    def open_call(self, engine: str, sequences: int) -> tuple[dict[str, str], CallSpan | None]:
        """For each call to an engine: the headers by which it can be followed there, and its span.

        vLLM names its sequences `cmpl-<X-Request-Id>-<place>`, so calls after the first get a
        number of their own.
        """
        self.calls += 1
        name = self.request_id if self.calls == 1 else f"{self.request_id}.{self.calls}"
        headers = {"X-Request-Id": name, **self.carried}
        if self.span is None:
            return headers, None
        call = self.span.open_call(engine, sequences)
        call.put_headers(headers)
        return headers, call

    @property
    def exemplar(self) -> dict[str, str] | None:
        """What leads from a figure to a trace that made it."""
        if self.span is None or not self.span.is_sampled:
            return None
        return {"trace_id": self.span.trace_id}

    def server_timing(self) -> str:
        """The `Server-Timing` header so far: where the time went, in milliseconds."""
        gateway_s = max(0.0, self.elapsed_s() - self.queue_s - self.engine_s)
        shared = f', dedup;desc="{self.shared} shared"' if self.shared else ""
        return (
            f"queue;dur={self.queue_s * 1e3:.2f}, engine;dur={self.engine_s * 1e3:.2f}, "
            f"gateway;dur={gateway_s * 1e3:.2f}{shared}"
        )

    def put_headers(self, headers: MutableMapping[str, str]) -> None:
        """On every answer, streams included, before its headers leave."""
        headers["X-Request-Id"] = self.request_id
        headers["Server"] = "vllm-gateway"
        headers["Server-Timing"] = self.server_timing()

    def log_fields(self) -> dict[str, object]:
        known = {
            "n_prompts": self.n_prompts,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completion_tokens,
            "error_code": self.error_code,
            "trace_id": self.span.trace_id if self.span is not None else None,
        }
        return {name: value for name, value in known.items() if value is not None}


TRACE = web.RequestKey("trace", Trace)
SPAN: web.RequestKey[RequestSpan] = web.RequestKey("span", RequestSpan)
SPANS: web.AppKey[SpanSource] = web.AppKey("spans", SpanSource)
