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


class FairClock:
    """The CPU time of the thread that made it, and how long that thread had nothing to do."""

    def __init__(self) -> None:
        self._cpu_clock = time.pthread_getcpuclockid(threading.get_ident())
        self._idle_s = _read_wall_clock() - time.clock_gettime(self._cpu_clock)

    def read(self) -> float:
        return self._idle_s + time.clock_gettime(self._cpu_clock)

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
    def __init__(self) -> None:
        self.clock = FairClock()
        super().__init__(_IdleCounter(self.clock))

    def time(self) -> float:
        return self.clock.read()

    def run_forever(self) -> None:
        with self.clock.rule():
            super().run_forever()


class _IdleCounter(selectors.DefaultSelector):
    def __init__(self, clock: FairClock) -> None:
        super().__init__()
        self._clock = clock

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
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
