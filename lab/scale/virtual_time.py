"""An event loop whose clock jumps to the next timer as soon as nothing else is left to do.

Sockets are real; only waiting is not. A server that sleeps for 20 ms takes exactly that, however
busy the machine is, so a verdict about times can be asked for to the millisecond. In
`virtual_clocks` the process's own clocks tell that time, too: the gateway's code, which asks them,
then lives in it.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import os
import selectors
import time
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")


def in_virtual_time(test: Callable[P, Coroutine[Any, Any, None]]) -> Callable[P, None]:
    @functools.wraps(test)
    def run(*args: P.args, **kwargs: P.kwargs) -> None:
        with asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
            runner.run(test(*args, **kwargs))

    return run


@contextlib.contextmanager
def virtual_clocks(loop: asyncio.AbstractEventLoop) -> Iterator[None]:
    """`time.monotonic` and `time.perf_counter` of all that asks by these names meanwhile."""
    real = time.monotonic, time.perf_counter
    time.monotonic = time.perf_counter = loop.time
    try:
        yield
    finally:
        time.monotonic, time.perf_counter = real


class VirtualTimeLoop(asyncio.SelectorEventLoop):
    """Threads that the loop has started keep their time: while one works, nothing jumps."""

    def __init__(self) -> None:
        self._now_s = 0.0
        self.threads = _CountedThreads()
        super().__init__(_JumpingSelector(self))
        self.set_default_executor(self.threads)

    def time(self) -> float:
        return self._now_s

    def jump(self, seconds: float) -> None:
        self._now_s += seconds


class _CountedThreads(ThreadPoolExecutor):
    at_work = 0

    def submit(self, fn: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> Future[T]:
        self.at_work += 1
        future = super().submit(fn, *args, **kwargs)
        future.add_done_callback(self._end)
        return future

    def _end(self, _: object) -> None:
        self.at_work -= 1


class _JumpingSelector(selectors.DefaultSelector):
    def __init__(self, loop: VirtualTimeLoop) -> None:
        super().__init__()
        self._loop = loop

    def select(self, timeout: float | None = None) -> list[tuple[selectors.SelectorKey, int]]:
        if timeout is None or timeout <= 0 or self._loop.threads.at_work:
            return super().select(timeout)
        if events := super().select(0):
            return events
        os.sched_yield()  # what is sent through the loopback may arrive a moment later
        if events := super().select(0):
            return events
        if not self._loop.threads.at_work:
            self._loop.jump(timeout)
        return []
