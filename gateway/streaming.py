"""A stream of server-sent events, passed on as it comes: `await write` is the back-pressure.

Nothing is parsed of what is only passed on: no queue, no task. One timer a stream looks after what
does not come; it is set anew when it fires, not when a chunk passes, for two timers a chunk once
took a fifth of the gateway's time.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from typing import Any, Self

from aiohttp import web

from gateway.config import SETTINGS
from gateway.engines.client import EngineAnswer
from gateway.engines.event_stream import EVENT_ENDS, UnfinishedEvent
from gateway.errors import EngineError, EngineTimeout, GatewayError
from gateway.observability.request_record import RequestRecord, StreamTiming
from gateway.records.ledger import Entry
from gateway.request_context import CONTEXT
from gateway.responses.events import sign_events
from gateway.responses.follower import Follower
from gateway.responses.shapes import Told
from gateway.responses.turns import Turn
from gateway.schemas.openai import (
    CHOICE_END,
    build_stream_error,
    drop_chunk_usage,
    drop_usage_events,
    has_stream_end,
    name_stream_errors,
    parse_usage,
    read_chunk_usage,
    stamp_last_chunks,
)

KEEP_ALIVE = b": keep-alive\n\n"
_REFUSED = "engine_refused"

Usage = tuple[int, int]  # tokens in and out


class EventStream:
    """One stream on its way to a caller."""

    def __init__(
        self,
        request: web.Request,
        *,
        hides_usage: bool = False,
        hides_chunk_usage: bool = False,
        fingerprint: str = "",
    ) -> None:
        self._request = request
        self._record: RequestRecord = request[CONTEXT].record
        self._hides_usage, self._hides_chunk_usage = hides_usage, hides_chunk_usage
        # The event that is left out has it, so those before it have none.
        self._fingerprint = fingerprint if hides_usage else ""
        self._response: web.StreamResponse | None = None
        self.timing = StreamTiming()
        self.usage: Usage | None = None  # as far as it has been told
        self.chunk_tokens: dict[int, int] = {}  # the same by choice, where chunks tell it
        self.is_writing = False
        self.is_inside_event = False  # no place for a comment

    @property
    def has_started(self) -> bool:
        return self._response is not None

    async def start(self, status: int, headers: Mapping[str, str]) -> None:
        response = web.StreamResponse(status=status, headers=headers)
        response.headers.setdefault("Cache-Control", "no-cache")
        response.headers["X-Accel-Buffering"] = "no"  # nginx would hold a stream back
        self._request[CONTEXT].put_headers(response.headers)
        await response.prepare(self._request)
        self._response, self._record.stream = response, self.timing

    async def copy(self, answer: EngineAnswer) -> None:
        """The path of every chunk, so each line here is felt."""
        read, timing = answer.read_chunk, self.timing
        note_chunk, note_written = timing.note_chunk, timing.note_written
        last, rest = b"", UnfinishedEvent()
        with IdleTimer(self._request, answer, self):
            while chunk := await read():
                note_chunk()
                if rest.is_there or not chunk.endswith(EVENT_ENDS):
                    chunk = rest.complete(chunk)
                    self.is_inside_event = rest.is_there
                if b'"usage":{' in chunk:
                    chunk = self._read_usage(chunk, answer)
                if self._fingerprint and CHOICE_END in chunk:
                    chunk = stamp_last_chunks(chunk, self._fingerprint)
                if b'data: {"error"' in chunk:
                    chunk = self._note_error(chunk, answer)
                if chunk:
                    last = chunk
                    self.is_writing = True
                    await self.write(chunk)
                    self.is_writing = False
                    note_written()
            end = rest.take()
            if answer.status == 200 and not has_stream_end(self._request.path, end or last):
                raise EngineError("the engine's stream ended without its end")
            if end:
                self.is_writing = True
                await self.write(end)
                self.is_writing = False

    async def write(self, data: bytes) -> None:
        assert self._response is not None  # noqa: S101 — it has started
        await self._response.write(data)

    async def end(
        self, error: GatewayError | None = None, number: int | None = None
    ) -> web.StreamResponse:
        """Once its first byte has left, a stream ends as one: a failure is its last event, with its
        number where events have one.
        """
        assert self._response is not None  # noqa: S101 — it has started
        if error is not None:
            self._record.note_error(error.error_code, error.source)
            number = self.timing.chunks if number is None else number
            await self.write(build_stream_error(error, self._record.route, number))
        await self._response.write_eof()
        return self._response

    def _read_usage(self, events: bytes, answer: EngineAnswer) -> bytes:
        """What the caller gets of events that tell the usage."""
        try:
            self.usage = _add(self.usage, parse_usage(events))
        except EngineError:
            answer.is_at_fault = True
            raise
        if b'"choices":[{' in events:
            self.chunk_tokens.update(read_chunk_usage(events))
        if self._hides_chunk_usage:
            events = drop_chunk_usage(events)
        return drop_usage_events(events) if self._hides_usage else events

    @property
    def told_tokens(self) -> int:
        """At least a token for each chunk, and what chunks tell of their own choices."""
        told = self.usage[1] if self.usage else 0
        return max(told, self.timing.chunks, sum(self.chunk_tokens.values()))

    def _note_error(self, events: bytes, answer: EngineAnswer) -> bytes:
        """The engine tells of some failures, and of some refusals, only after its 200."""
        events, is_fault = name_stream_errors(events)
        answer.is_at_fault = is_fault
        own = (EngineError.code, EngineError.source)
        self._record.note_error(*(own if is_fault else (_REFUSED, "caller")))
        return events


class NotedStream(EventStream):
    """One of which is kept what its caller gets."""

    def __init__(self, entry: Entry | None, request: web.Request, **options: Any) -> None:
        super().__init__(request, **options)
        self._entry = entry

    async def write(self, data: bytes) -> None:
        assert self._response is not None  # noqa: S101 — it has started
        if data is not KEEP_ALIVE and self._entry is not None:
            self._entry.note_answer(data)
        await self._response.write(data)


class StoredStream(NotedStream):
    """One whose response is stored: its end is withheld until it is."""

    def __init__(
        self, turn: Turn, entry: Entry | None, request: web.Request, **options: Any
    ) -> None:
        super().__init__(entry, request, **options)
        self._turn: Turn | None = turn
        self.withheld = b""
        self.told: Told | None = None  # what it has ended with

    async def write(self, data: bytes) -> None:
        if self._turn is not None and data is not KEEP_ALIVE:
            if self.withheld:
                self.withheld += data
                return
            if b'"response":' in data:
                data, self.withheld, self.told = await sign_events(self._turn, data)
            if not data:
                return
        await super().write(data)

    async def end(
        self, error: GatewayError | None = None, number: int | None = None
    ) -> web.StreamResponse:
        """Only once what is withheld has been taken, unless it has failed."""
        if error is None and self.is_waiting:
            assert self._response is not None  # noqa: S101 — it has started
            return self._response
        self._turn = None
        return await super().end(error, number)

    @property
    def is_waiting(self) -> bool:
        return self._turn is not None and bool(self.withheld)

    async def end_stored(self) -> web.StreamResponse:
        self._turn = None
        await self.write(self.withheld)
        return await self.end()


STORED_STREAM = web.RequestKey("stored_stream", StoredStream)


def open_stream(request: web.Request, turn: Turn | None = None, **options: Any) -> EventStream:
    entry = request[CONTEXT].entry
    is_audited = entry is not None and entry.is_audited
    if turn is not None:
        stream = StoredStream(turn, entry if is_audited else None, request, **options)
        request[STORED_STREAM] = stream
        return stream
    return NotedStream(entry, request, **options) if is_audited else EventStream(request, **options)


async def follow_events(request: web.Request, follower: Follower) -> web.StreamResponse:
    """Those of a response that runs or has run in the background: who hangs up ends nothing."""
    pause_s = request.app[SETTINGS].keepalive_comment_s
    stream = open_stream(request)
    await stream.start(200, {"Content-Type": "text/event-stream; charset=utf-8"})
    try:
        while not follower.has_ended:
            try:
                async with asyncio.timeout(pause_s):
                    events = await follower.read()
            except TimeoutError:
                events = KEEP_ALIVE
            if events:
                await stream.write(events)
    except GatewayError as error:
        return await stream.end(error, follower.after + 1)
    return await stream.end()


class IdleTimer:
    """Looks after an engine's stream that stands still: comments for the caller, and an error when
    it stays so or takes too long. A caller who takes nothing is the connection's affair.
    """

    def __init__(self, request: web.Request, answer: EngineAnswer, stream: EventStream) -> None:
        settings = request.app[SETTINGS]
        self._answer, self._stream, self._settings = answer, stream, settings
        self._shortest_s = min(
            settings.keepalive_comment_s, settings.stream_idle_timeout_s, settings.engine_timeout_s
        )
        self._started = self._commented_at = time.perf_counter()
        self._comment: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> Self:
        self._schedule(self._shortest_s)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        if self._comment is not None:
            self._comment.cancel()

    def _schedule(self, pause_s: float) -> None:
        self._timer = self._loop.call_later(max(pause_s, 0.001), self._look)

    def _look(self) -> None:
        now = time.perf_counter()
        moved_at = max(self._started, self._stream.timing.last_chunk_at)
        is_commenting = self._comment is not None and not self._comment.done()
        if self._stream.is_writing or is_commenting:
            self._schedule(self._shortest_s)  # it is not the engine that is awaited
        else:
            self._look_at_engine(now, moved_at)

    def _look_at_engine(self, now: float, moved_at: float) -> None:
        settings = self._settings
        quiet_since = self._answer.find_quiet_since(moved_at, now)
        idle_left_s = quiet_since + settings.stream_idle_timeout_s - now
        left_s = self._started + settings.engine_timeout_s - now
        if self._answer.is_in_pieces:
            left_s = idle_left_s
        if idle_left_s <= 0 or left_s <= 0:
            reason = "fell silent" if idle_left_s <= 0 else "took too long"
            self._answer.fail(EngineTimeout(f"the engine's stream {reason}"))
            return
        comment_left_s = max(moved_at, self._commented_at) + settings.keepalive_comment_s - now
        if comment_left_s <= 0:
            comment_left_s = settings.keepalive_comment_s
            self._commented_at = now
            if not self._stream.is_inside_event:
                self._comment = self._loop.create_task(self._send_comment())
        self._schedule(min(comment_left_s, idle_left_s, left_s))

    async def _send_comment(self) -> None:
        with contextlib.suppress(ConnectionError):  # they have gone: the handler hears of it itself
            await self._stream.write(KEEP_ALIVE)


def _add(known: Usage | None, told: Usage | None) -> Usage | None:
    """Anthropic's streams tell the input at their start and the output at their end."""
    if known is None or told is None:
        return told or known
    return max(known[0], told[0]), max(known[1], told[1])
