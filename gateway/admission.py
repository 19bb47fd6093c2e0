"""The Gate: how many sequences may be inside the engines, and who waits for how long.

First come, first served. A request larger than the whole gate enters once the gate is empty,
so that no batch is too big to be answered.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from aiohttp import web

from gateway.config import Settings
from gateway.errors import Overloaded
from gateway.metrics import Metrics


class Gate:
    """Counts what is inside; the only limit between a caller and the engines."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._capacity = settings.max_running
        self._max_waiting = settings.max_waiting
        self._queue_timeout_s = settings.queue_timeout_s
        self._queue: deque[tuple[asyncio.Future[None], int]] = deque()
        self._running = 0
        self._waiting = 0
        metrics.running.set_function(lambda: self._running)
        metrics.waiting.set_function(lambda: self._waiting)

    @asynccontextmanager
    async def enter(self, sequences: int) -> AsyncIterator[None]:
        """Holds `sequences` places for as long as the block runs."""
        places = min(sequences, self._capacity)
        await self._take(places)
        try:
            yield
        finally:
            self._give_back(places)

    async def _take(self, places: int) -> None:
        if not self._queue and self._running + places <= self._capacity:
            self._running += places
            return
        if self._waiting + places > self._max_waiting:
            raise Overloaded(
                f"{self._waiting} sequences are waiting already; try again later", retry_after_s=1
            )
        turn = asyncio.get_running_loop().create_future()
        entry = (turn, places)
        self._queue.append(entry)
        self._waiting += places
        try:
            async with asyncio.timeout(self._queue_timeout_s):
                await turn
        except BaseException as error:
            self._leave(entry)
            if isinstance(error, TimeoutError):
                raise Overloaded(
                    f"no place became free within {self._queue_timeout_s:g} s",
                    code="queue_timeout",
                    retry_after_s=1,
                ) from None
            raise

    def _leave(self, entry: tuple[asyncio.Future[None], int]) -> None:
        turn, places = entry
        if turn.done() and not turn.cancelled():
            self._give_back(places)  # admitted in the very moment it gave up
            return
        turn.cancel()
        self._admit()

    def _give_back(self, places: int) -> None:
        self._running -= places
        self._admit()

    def _admit(self) -> None:
        while self._queue:
            turn, places = self._queue[0]
            if not turn.cancelled() and self._running + places > self._capacity:
                self._drop_cancelled()
                return
            self._queue.popleft()
            self._waiting -= places
            if not turn.cancelled():
                self._running += places
                turn.set_result(None)

    def _drop_cancelled(self) -> None:
        """Those who gave up behind the first in line must not count as waiting."""
        gone = [entry for entry in self._queue if entry[0].cancelled()]
        for entry in gone:
            self._queue.remove(entry)
            self._waiting -= entry[1]


GATE = web.AppKey("gate", Gate)
