"""How many requests of batches run at once: as many as the engines bear, found out by trying, for
each model by itself, for one may be away or slow, and no more of all together than a setting says.

What goes well makes it larger by one a round, what is refused halves it (additive increase,
multiplicative decrease, as TCP's). A request that had to wait for its place in the lane `batch` is
a sign that there is enough: it makes nothing larger. Beside requests whose callers wait for their
answers only a part of it is used: a quarter, until it is known how long their streams take to the
first token with and without it; then as much as makes them hardly later, found out in the same way.
Whose turn it is among batches goes by their
clocks: each request moves that of its batch by the time that is left for it, so what is near its
end runs more often.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from collections import deque
from collections.abc import Callable
from typing import Literal
from weakref import WeakValueDictionary

from gateway.admission.throughput import FirstTokens

_FIRST = 8.0
_SMALLEST = 1.0
_SHARE_AFTER_REFUSAL = 0.5
_SHARE_BESIDE_OTHERS = 0.25
_YIELDS_S = 10.0  # what is in the engine then stays until its end, and is felt so long
# Of the time to the first token alone: above the one there is too much beside it, below the other
# there may be more.
_TOO_SLOW, _HARDLY_SLOWER = 1.15, 1.08
# A wait for a place that is no sign of anything.
_SHORT_WAIT_S = 0.05
_LONG_WAIT_S = 2.0

_MOST_KEPT = 32  # windows that no batch has any more

# `away`: there is no engine, which says nothing of how much it bears.
End = Literal["answered", "refused", "away", "other"]


class Slot:
    """One request's right to run; whoever has it must leave, however it ends."""

    __slots__ = ("_round", "_window")

    def __init__(self, window: Window, round_: int) -> None:
        self._window: Window | None = window
        self._round = round_

    def leave(self, end: End = "other", wait_s: float = 0.0, pause_s: float = 0.0) -> None:
        """How it went, how long it waited for its place, and for how long nobody should come."""
        window, self._window = self._window, None
        if window is not None:
            window.close_slot(self._round, end, wait_s, pause_s)


class Windows:
    """The windows of all models, and what they have in common."""

    def __init__(
        self,
        most: int,
        count_others: Callable[[], int] = lambda: 0,
        find_first_tokens: Callable[[str], FirstTokens | None] = lambda _name: None,
    ) -> None:
        """`count_others`: the requests of callers who wait for their answers; and how long a
        model's streams take to their first token.
        """
        self.most = most
        self.find_first_tokens = find_first_tokens
        self.running = 0
        self.clock = 0.0  # of the batch that was served last
        self.numbers = itertools.count()
        self._count_others = count_others
        self._yields_until = 0.0
        # As long as a batch has one, and a few longer: they have learned what their engines bear.
        self._windows: WeakValueDictionary[str, Window] = WeakValueDictionary()
        self._recent: deque[Window] = deque(maxlen=_MOST_KEPT)

    @property
    def limit(self) -> float:
        """Of those in which there is something."""
        return min(self.most, sum(one.limit for one in self._windows.values() if not one.is_idle))

    def find(self, name: str) -> Window:
        """The one of a model."""
        window = self._windows.get(name)
        if window is None:
            window = self._windows[name] = Window(self, name)
        self._recent.append(window)
        return window

    def admit(self) -> None:
        """Whoever's turn it is, of those whose windows have room."""
        now = asyncio.get_running_loop().time()
        yields = self._yields(now)
        while self.running < self.most:
            ready = [one for one in self._windows.values() if one.has_room(now, yields=yields)]
            if not ready:
                return
            min(ready, key=Window.find_next).admit_next()

    def _yields(self, now: float) -> bool:
        """An engine's step takes the longer the more sequences are in it, and a chat feels that: so
        beside one, and for a while after, only a part of each window is used.
        """
        if self._count_others():
            self._yields_until = now + _YIELDS_S
        return now < self._yields_until


class Window:
    """Slots for requests to one model."""

    def __init__(self, windows: Windows, name: str) -> None:
        self._windows = windows
        self._name = name
        self._beside: float | None = None  # that others bear, once that is known
        self.limit = min(_FIRST, float(windows.most))
        self.running = 0
        self.last_tries = asyncio.Lock()  # of requests that have been lost before
        self._queue: list[tuple[float, int, asyncio.Future[None]]] = []
        self._opens_at = 0.0
        self._is_away = False
        self._round = 0  # one more with each halving: what was sent before it says no more
        self._timer: asyncio.TimerHandle | None = None

    @property
    def clock(self) -> float:
        return self._windows.clock

    @property
    def is_idle(self) -> bool:
        return not self.running and not self._queue

    async def enter(self, clock: float) -> Slot:
        """When it is this one's turn."""
        loop = asyncio.get_running_loop()
        turn: asyncio.Future[None] = loop.create_future()
        heapq.heappush(self._queue, (clock, next(self._windows.numbers), turn))
        self._windows.admit()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                self._count(-1)
                self._windows.admit()
            turn.cancel()
            raise
        return Slot(self, self._round)

    def close_slot(self, round_: int, end: End, wait_s: float, pause_s: float) -> None:
        self._count(-1)
        now = asyncio.get_running_loop().time()
        if end == "answered" and self._is_away:  # it is there again
            self._is_away, self._opens_at = False, now
        if end == "refused":
            self._shrink(round_, pause_s)
        elif end == "away":
            self._is_away, self._opens_at = True, max(self._opens_at, now + pause_s)
        elif end == "answered" and wait_s > _LONG_WAIT_S:
            self._shrink(round_, 0.0)
        elif end == "answered" and wait_s < _SHORT_WAIT_S:
            self.limit = min(float(self._windows.most), self.limit + 1 / self.limit)
        self._windows.admit()

    def _shrink(self, round_: int, pause_s: float) -> None:
        if round_ == self._round:
            self.limit = max(_SMALLEST, self.limit * _SHARE_AFTER_REFUSAL)
            self._round += 1
        now = asyncio.get_running_loop().time()
        self._opens_at = max(self._opens_at, now + pause_s)

    def has_room(self, now: float, *, yields: bool) -> bool:
        """Whether somebody waits who may run."""
        while self._queue and self._queue[0][2].done():
            heapq.heappop(self._queue)
        if not self._queue:
            return False
        if (pause_s := self._opens_at - now) > 0:
            if self._timer is None:
                self._timer = asyncio.get_running_loop().call_later(pause_s, self._reopen)
            return False
        return self.running < (self._find_beside() if yields else max(1, int(self.limit)))

    def _find_beside(self) -> int:
        """How many of it beside callers who wait."""
        most = self.limit * _SHARE_BESIDE_OTHERS if self._beside is None else self._beside
        most = max(1, int(min(self.limit, most)))
        first_tokens = self._windows.find_first_tokens(self._name)
        if first_tokens is None:
            return most
        if self.running > most:
            first_tokens.forget_beside()
            return most
        slowdown = first_tokens.take_slowdown()
        if slowdown is None:
            return most
        if slowdown > _TOO_SLOW:
            self._beside = max(_SMALLEST, most * _SHARE_AFTER_REFUSAL)
        elif slowdown < _HARDLY_SLOWER:
            self._beside = min(self.limit, most + 1.0)
        return max(1, int(self._beside or most))

    def find_next(self) -> tuple[float, int]:
        return self._queue[0][:2]

    def admit_next(self) -> None:
        clock, _, turn = heapq.heappop(self._queue)
        self._windows.clock = max(self._windows.clock, clock)
        self._count(1)
        turn.set_result(None)

    def _count(self, change: int) -> None:
        self.running += change
        self._windows.running += change

    def _reopen(self) -> None:
        self._timer = None
        self._windows.admit()
