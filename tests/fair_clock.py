"""A clock that stands still while this process is kept from working, and an event loop that lives
by it.

Where a test serves both the gateway and its engine, it tells every pause and time-out of the two. A
machine on which a hundred other programs run is then as slow at ending a time-out as it is at doing
the work before it. What runs in other processes has its own time.
"""

from __future__ import annotations

import asyncio
import selectors
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

_read_wall_clock = time.monotonic
_SHORT_S = 0.002


class FairClock:
    """The CPU time of the thread that made it, and how long that thread had nothing to do."""

    def __init__(self) -> None:
        self._cpu_clock = time.pthread_getcpuclockid(threading.get_ident())
        self._read_at = self._now = self._told = _read_wall_clock()
        self._idle_s = self._now - time.clock_gettime(self._cpu_clock)

    def read(self) -> float:
        wall = _read_wall_clock()
        # Asking for the CPU time takes long, and within so little the two clocks hardly differ.
        if wall - self._read_at > _SHORT_S:
            self._read_at = wall
            self._now = self._idle_s + time.clock_gettime(self._cpu_clock)
        self._told = max(self._told, self._now + wall - self._read_at)
        return self._told

    def count_idle(self, seconds: float) -> None:
        self._idle_s += seconds

    @contextmanager
    def rule(self) -> Iterator[None]:
        """Every module that asks `time.monotonic` is told this clock's time."""
        time.monotonic = self.read
        try:
            yield
        finally:
            time.monotonic = _read_wall_clock


class FairLoop(asyncio.SelectorEventLoop):
    """Its timers go by when a round of callbacks began: a thread's CPU clock is slow to read."""

    def __init__(self) -> None:
        self.clock = FairClock()
        self._rounds = _IdleCounter(self.clock)
        super().__init__(self._rounds)

    def time(self) -> float:
        return self._rounds.began

    def run_forever(self) -> None:
        with self.clock.rule():
            super().run_forever()


class _IdleCounter(selectors.DefaultSelector):
    def __init__(self, clock: FairClock) -> None:
        super().__init__()
        self._clock = clock
        self.began = clock.read()

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        events = self._select(timeout)
        self.began = self._clock.read()
        return events

    def _select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if (events := super().select(0)) or (timeout is not None and timeout <= 0):
            return events
        began = _read_wall_clock()
        events = super().select(timeout)
        idle_s = _read_wall_clock() - began
        if timeout is not None and idle_s >= timeout:
            # Woken late is not idle for longer, and what came is taken to have come in time.
            idle_s = timeout * 0.9 if events else timeout
        self._clock.count_idle(idle_s)
        return events
