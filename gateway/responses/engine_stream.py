"""An engine's stream of a response that runs in the background, as it goes into its log."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from typing import Any

from gateway.config import Settings
from gateway.engines.client import EngineAnswer
from gateway.engines.event_stream import UnfinishedEvent
from gateway.errors import EngineError, EngineTimeout, InvalidRequest
from gateway.records.ledger import Entry
from gateway.request_context import RequestContext
from gateway.responses.event_log import EventLog
from gateway.responses.events import CREATED, cut_events, read_kind, sign_event
from gateway.responses.shapes import Told, copy_members
from gateway.schemas.openai import parse_usage
from gateway.schemas.vllm import parse_engine_error


class LoggedStream:
    """Of one call; `told` is what it has ended with."""

    def __init__(
        self, log: EventLog, own: Mapping[str, Any], context: RequestContext, settings: Settings
    ) -> None:
        self._log, self._own, self._context = log, own, context
        self._idle_s, self._longest_s = settings.stream_idle_timeout_s, settings.engine_timeout_s
        self._chunks = 0
        self.usage: tuple[int, int] | None = None
        self.told: Told | None = None

    @property
    def told_tokens(self) -> int:
        """At least a token for each chunk."""
        return max(self._chunks, self.usage[1] if self.usage else 0)

    async def read(self, answer: EngineAnswer) -> None:
        rest, entry = UnfinishedEvent(), self._context.entry
        try:
            async with asyncio.timeout(self._longest_s):
                while chunk := await self._read_chunk(answer):
                    self._chunks += 1
                    await self._take(rest.complete(chunk), answer, entry)
        except TimeoutError:
            raise EngineTimeout("the engine's stream took too long") from None
        await self._take(rest.take(), answer, entry)
        if self.told is None:
            raise EngineError("the engine's stream ended without its end")

    async def _read_chunk(self, answer: EngineAnswer) -> bytes:
        while self._log.is_full:  # the engine waits while the database is away
            await self._log.wait()
        try:
            async with asyncio.timeout(self._idle_s):
                return await answer.read_chunk()
        except TimeoutError:
            raise EngineTimeout("the engine's stream fell silent") from None

    async def _take(self, events: bytes, answer: EngineAnswer, entry: Entry | None) -> None:
        if entry is not None and events:
            entry.note_answer(events)
        if b'"usage":{' in events:
            self.usage = parse_usage(events) or self.usage
        for event in cut_events(events):
            _, mark, data = event.partition(b"data:")
            if not mark:
                continue  # a comment, or the end of them
            try:
                await self._take_event(data.strip(), answer)
            except InvalidRequest as error:
                answer.is_at_fault = True
                reason = "the engine's stream has an event that cannot be read"
                raise EngineError(reason, code="engine_garbled") from error

    async def _take_event(self, data: bytes, answer: EngineAnswer) -> None:
        members = await copy_members(data)
        kind = read_kind(members)
        if ("error" in members and not kind) or kind == "error":
            answer.is_at_fault = True
            message, _ = parse_engine_error(data)
            raise EngineError(f"the engine's stream ended in an error: {message}")
        if "response" in members:
            self.told = await sign_event(members, self._own) or self.told
        if kind != CREATED and self.told is None:  # its caller has been told that one already
            self._log.append(kind, members)
