"""How many requests of batches run at once: as many as the engines bear, found out by trying.

What goes well makes it larger by one a round, what is refused halves it (additive increase,
multiplicative decrease, as TCP's). A request that had to wait for its place in the lane `batch` is
a sign that there is enough: it makes nothing larger. Beside requests whose callers wait for their
answers only a part of it is used. Whose turn it is among batches goes by their
clocks: each request moves that of its batch by the time that is left for it, so what is near its
end runs more often.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections.abc import Callable
from typing import Literal

_FIRST = 8.0
_SMALLEST = 1.0
_SHARE_AFTER_REFUSAL = 0.5
_SHARE_BESIDE_OTHERS = 0.25
_YIELDS_S = 2.0
# A wait for a place that is no sign of anything.
_SHORT_WAIT_S = 0.05
_LONG_WAIT_S = 2.0

End = Literal["answered", "refused", "other"]


class Slot:
    """One request's right to run; whoever has it must leave, however it ends."""

    __slots__ = ("_entered_at", "_window")

    def __init__(self, window: Window, entered_at: float) -> None:
        self._window: Window | None = window
        self._entered_at = entered_at

    def leave(self, end: End = "other", wait_s: float = 0.0, pause_s: float = 0.0) -> None:
        """How it went, how long it waited for its place, and for how long nobody should come."""
        window, self._window = self._window, None
        if window is not None:
            window.close_slot(self._entered_at, end, wait_s, pause_s)


class Window:
    """Slots for requests; one for all batches of this gateway."""

    def __init__(self, most: int, count_others: Callable[[], int] = lambda: 0) -> None:
        """`count_others`: the requests of callers who wait for their answers."""
        self._most = float(most)
        self._count_others = count_others
        self._yields_until = 0.0
        self.limit = min(_FIRST, self._most)
        self.running = 0
        self.clock = 0.0  # of the batch that was served last
        self.last_tries = asyncio.Lock()  # of requests that have been lost before
        self._numbers = itertools.count()
        self._queue: list[tuple[float, int, asyncio.Future[None]]] = []
        self._opens_at = 0.0
        self._round_began_at = 0.0  # of the last halving: what was sent before it says no more
        self._timer: asyncio.TimerHandle | None = None

    async def enter(self, clock: float) -> Slot:
        """When it is this one's turn."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        heapq.heappush(self._queue, (clock, next(self._numbers), turn))
        self._admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self.running -= 1
                self._admit()
            turn.cancel()
            raise
        return Slot(self, loop.time())

    def close_slot(self, entered_at: float, end: End, wait_s: float, pause_s: float) -> None:
        self.running -= 1
        if end == "refused":
            self._shrink(entered_at, pause_s)
        elif end == "answered" and wait_s > _LONG_WAIT_S:
            self._shrink(entered_at, 0.0)
        elif end == "answered" and wait_s < _SHORT_WAIT_S:
            self.limit = min(self._most, self.limit + 1 / self.limit)
        self._admit()

    def _shrink(self, entered_at: float, pause_s: float) -> None:
        now = asyncio.get_running_loop().time()
        if entered_at >= self._round_began_at:
            self.limit = max(_SMALLEST, self.limit * _SHARE_AFTER_REFUSAL)
            self._round_began_at = now
        self._opens_at = max(self._opens_at, now + pause_s)

    def _admit(self) -> None:
        loop = asyncio.get_running_loop()
        if (pause_s := self._opens_at - loop.time()) > 0:
            if self._timer is None and self._queue:
                self._timer = loop.call_later(pause_s, self._reopen)
            return
        while self._queue and self.running < self._find_room(loop.time()):
            clock, _, turn = heapq.heappop(self._queue)
            if not turn.done():
                self.clock = max(self.clock, clock)
                self.running += 1
                turn.set_result(None)

    def _find_room(self, now: float) -> int:
        """An engine's step takes the longer the more sequences are in it, and a chat feels that: so
        beside one, and for a moment after, only a part of the window is used.
        """
        if self._count_others():
            self._yields_until = now + _YIELDS_S
        share = _SHARE_BESIDE_OTHERS if now < self._yields_until else 1.0
        return max(1, int(self.limit * share))

    def _reopen(self) -> None:
        self._timer = None
        self._admit()
