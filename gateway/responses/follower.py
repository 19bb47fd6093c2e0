"""Reads the events of a background response after one of them, until its last: from memory where
it runs here, else from the database, whichever gateway runs it. Loads no database.

The last event is stored nowhere: it tells the response, and that is stored.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from gateway.responses.event_log import EventLog, Piece
from gateway.responses.events import build_event
from gateway.responses.shapes import OPEN

_POLL_S = 0.5
# Who has read an event that its gateway could not store any more has to be told an end, too.
_SUDDEN = ("failed", "cancelled")


@dataclass(frozen=True, slots=True)
class StoredEvents:
    """Of a response that is in this state, some of those that were asked for."""

    status: str
    pieces: Sequence[Piece]


class EventStore(Protocol):
    """Where events and responses are stored."""

    async def read_events(self, owner: str, response_id: str, after: int) -> StoredEvents: ...

    async def count_events(self, response_id: str) -> int: ...

    async def find(self, owner: str, response_id: str) -> bytes: ...


class Follower:
    """One who reads; each call goes on where the last one ended, and may be cancelled."""

    def __init__(
        self,
        store: EventStore,
        find_log: Callable[[str], EventLog | None],
        owner: str,
        response_id: str,
        after: int = -1,
    ) -> None:
        self._store, self._find_log = store, find_log
        self._owner, self._id = owner, response_id
        self.after = after
        self.has_ended = False

    async def read(self) -> bytes:
        while True:
            log = self._find_log(self._id)
            if log is not None and log.has_after(self.after):
                self.after, events = log.read(self.after)
                if events:
                    return events
                await log.wait()
                continue
            stored = await self._store.read_events(self._owner, self._id, self.after)
            if events := self._unpack(stored.pieces):
                return events
            if stored.status not in OPEN:
                return await self._end(stored.status)
            await asyncio.sleep(_POLL_S)

    def _unpack(self, pieces: Sequence[Piece]) -> bytes:
        events: list[bytes] = []
        for piece in pieces:
            self.after, some = piece.unpack(self.after)
            events.append(some)
        return b"".join(events)

    async def _end(self, status: str) -> bytes:
        number = await self._store.count_events(self._id)
        self.has_ended = True
        if status in _SUDDEN:
            number = max(number, self.after + 1)
        if number <= self.after:
            return b""
        response = await self._store.find(self._owner, self._id)
        kind = "response.incomplete" if status == "cancelled" else f"response.{status}"
        self.after = number
        return build_event(kind, number, {"type": f'"{kind}"'.encode(), "response": response})
