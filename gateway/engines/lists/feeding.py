"""How what is too large for the engines comes in: by pieces, each when there is room for it, which
gives its places back as its sequences end.

Who is let in when is the gate's matter (`admission/queue.py`), what a piece asks of an engine that
of `batch.py` and `long_lists.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Protocol


class Room(Protocol):
    """Room for so many sequences."""

    count: int

    def give_back(self, count: int) -> None: ...


class Gate(Protocol):
    """Whoever lets sequences in."""

    @property
    def is_alone(self) -> bool:
        """Whether nobody waits for room that is given back early."""

    @property
    def piece(self) -> int:
        """The fewest sequences that are let in at a time, where more are left."""

    async def take(self, most: int) -> Room: ...

    def give_all_back(self) -> None:
        """For who has nothing of its own to run for now."""


@dataclass(slots=True)
class Piece:
    """Prompts that are one call, unless it is refused or lost."""

    places: Sequence[int]
    room: Room | None = None
    held: int = 0  # of that room
    is_stream: bool = False

    def give_back(self, count: int) -> None:
        count = min(count, self.held)
        self.held -= count
        if self.room is not None:
            self.room.give_back(count)

    def leave(self, task: asyncio.Task[None]) -> None:
        # What is cut short ends the batch, which is charged for the places that it has then.
        if not task.cancelled() and task.exception() is None:
            self.give_back(self.held)


async def take_places(
    gate: Gate | None, total: int, copies: int = 1
) -> AsyncIterator[tuple[range, Room | None]]:
    """The places of so many prompts, as many at a time as there is room for; each takes `copies`
    sequences. Without a gate all at once.
    """
    start = 0
    while start < total:
        room = await gate.take((total - start) * copies) if gate else None
        stop = total if room is None else min(total, start + max(1, room.count // copies))
        yield range(start, stop), room
        start = stop


@contextlib.asynccontextmanager
async def open_group() -> AsyncIterator[asyncio.TaskGroup]:
    """For the tasks of all pieces. The first failure ends the others, and is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            yield group
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None  # one reason is enough for one caller
