"""What goes with a request from room to room: its name, its deadline, what its engine is told.

What is only learnt about it is its record (`observability/request_record.py`).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from typing import Protocol

from aiohttp import web

from gateway.errors import GatewayError
from gateway.observability.request_record import RequestRecord
from gateway.observability.tracing import CallSpan, RequestSpan
from gateway.records.ledger import Entry

# The caller's own trace, which goes on to the engine.
TRACE_HEADERS = ("traceparent", "tracestate")


class Rates(Protocol):
    """What its key's limits leave, as callers are told."""

    def put_headers(self, headers: MutableMapping[str, str]) -> None: ...


@dataclass(frozen=True, slots=True)
class CutPiece:
    """What ran in the middle when a list of prompts broke off: what its engine has told of the
    sequences that were running, and for how long so many of them had run. `prompt_tokens` where
    nobody has told of them yet.
    """

    told_tokens: int
    seconds: float
    sequences: int
    prompt_tokens: int = 0


@dataclass(slots=True)
class RequestContext:
    """Lives as long as its request."""

    request_id: str
    record: RequestRecord
    span: RequestSpan | None = None
    deadline: float | None = None  # on the event loop's clock
    carried: Mapping[str, str] = field(default_factory=dict)  # the caller's, for the engine
    engine_calls: int = 0
    is_running: bool = False  # an engine has it, or has had it last
    sent_at: float = 0.0  # when it got that, by `time.perf_counter`
    told_tokens: tuple[int, int] = (0, 0)  # in and out, of a batch's sequences that have ended
    cut_pieces: tuple[CutPiece, ...] = ()  # where there is one, the list has not ended well
    ended_by: GatewayError | None = None  # why it was cancelled, where its caller has not gone
    held_bytes: int = 0  # of its body, see `request_body.py`
    read_bytes: int = 0  # all that was read for it, packed and not, stored turns too
    rates: Rates | None = None  # of a key that has limits
    entry: Entry | None = None  # where usage is kept, of a request whose key is known
    cors_headers: Mapping[str, str] | None = None  # for the web page that asks

    def carry(self, headers: Mapping[str, str], names: tuple[str, ...]) -> None:
        self.carried = {name: headers[name] for name in names if name in headers}

    def take_end(self) -> GatewayError | None:
        """For who has caught a cancellation: what the caller is told, if it was not theirs."""
        task = asyncio.current_task()
        if self.ended_by is not None and task is not None:
            task.uncancel()
        return self.ended_by

    def running_s(self) -> float:
        """How long an engine has had it."""
        return time.perf_counter() - self.sent_at if self.is_running else 0.0

    def open_call(self, engine: str, sequences: int) -> tuple[dict[str, str], CallSpan | None]:
        """For each call of an engine: the headers by which it can be followed there, and its span.

        vLLM names its sequences `cmpl-<X-Request-Id>-<place>`, so calls after the first get a
        number of their own.
        """
        self.engine_calls += 1
        number = self.engine_calls
        name = self.request_id if number == 1 else f"{self.request_id}.{number}"
        headers = {"X-Request-Id": name, "Content-Type": "application/json", **self.carried}
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

    def put_headers(self, headers: MutableMapping[str, str]) -> None:
        """On every answer, streams included, before its headers leave."""
        headers["X-Request-Id"] = self.request_id
        headers["Server"] = "vllm-gateway"
        headers["Server-Timing"] = self.record.server_timing()
        if self.rates is not None:
            self.rates.put_headers(headers)
        if self.cors_headers is not None:
            headers.update(self.cors_headers)

    def log_fields(self) -> dict[str, object]:
        fields = self.record.log_fields()
        if self.span is not None:
            fields["trace_id"] = self.span.trace_id
        return fields


CONTEXT = web.RequestKey("context", RequestContext)
