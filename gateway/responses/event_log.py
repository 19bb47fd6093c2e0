"""The events of one response that runs here in the background, until they are in the database.
Who follows it reads them from memory, and what they have missed from there.
"""

from __future__ import annotations

import asyncio
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from gateway.responses.events import build_event, cut_events

_MOST_BYTES = 2**18  # that wait for the database; with more, the engine waits, too
_PACKING_LEVEL = 1


@dataclass(frozen=True, slots=True)
class Piece:
    """Some events in a row."""

    number: int  # of the first
    count: int
    size: int  # of them as they lie in the database
    packed: bytes

    def unpack(self, after: int) -> tuple[int, bytes]:
        """Those after one of them, and the number of the last."""
        events = cut_events(zlib.decompress(self.packed))[:-1]
        rest = events[max(0, after + 1 - self.number) :]
        return self.number + self.count - 1, b"".join(one + b"\n\n" for one in rest)


class EventLog:
    """Numbers its events; all who follow are told of each. `on_full` is told when it is time to
    store some.
    """

    def __init__(self, on_full: Callable[[], None]) -> None:
        self._on_full = on_full
        self._events: list[bytes] = []
        self._first = 0  # the number of the first that is here
        self._size = 0
        self._moved = asyncio.Event()

    def append(self, kind: str, members: Mapping[str, bytes]) -> None:
        event = build_event(kind, self._first + len(self._events), members)
        self._events.append(event)
        self._size += len(event)
        if self.is_full:
            self._on_full()
        self.tell()

    @property
    def is_full(self) -> bool:
        return self._size > _MOST_BYTES

    def has_after(self, number: int) -> bool:
        """Whether what comes after it is here, or will be."""
        return number + 1 >= self._first

    def read(self, after: int) -> tuple[int, bytes]:
        """The number of the last, and those after one of them."""
        found = self._events[max(0, after + 1 - self._first) :]
        return max(after, self._first + len(self._events) - 1), b"".join(found)

    async def wait(self) -> None:
        """Until there is another one, or room for one, or an end."""
        await self._moved.wait()

    def tell(self) -> None:
        moved, self._moved = self._moved, asyncio.Event()
        moved.set()

    async def take(self) -> Piece | None:
        """All that is here, as it is stored; it stays until it is let go of."""
        if not self._events:
            return None
        first, count, data = self._first, len(self._events), b"".join(self._events)
        packed = await asyncio.to_thread(zlib.compress, data, _PACKING_LEVEL)
        return Piece(first, count, len(packed), packed)

    def let_go(self, piece: Piece) -> None:
        """It is in the database."""
        self._size -= sum(map(len, self._events[: piece.count]))
        del self._events[: piece.count]
        self._first += piece.count
        self.tell()
