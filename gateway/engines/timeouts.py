"""Bounds in time for calls of engines, cheap enough for every request: a timer of its own for each
once took a tenth of the gateway's time.
"""

from __future__ import annotations

import asyncio
from types import TracebackType

from gateway.errors import DeadlinePassed


class Deadline:
    """`async with Deadline(at):` ends what is inside with `DeadlinePassed`, at a time on the event
    loop's clock; `None` is no deadline.
    """

    __slots__ = ("_at", "_timeout")

    def __init__(self, at: float | None) -> None:
        self._at = at
        self._timeout: asyncio.Timeout | None = None

    async def __aenter__(self) -> None:
        if self._at is not None:
            self._timeout = asyncio.timeout_at(self._at)
            await self._timeout.__aenter__()

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._timeout is None:
            return
        try:
            await self._timeout.__aexit__(kind, error, traceback)
        except TimeoutError:
            raise DeadlinePassed("the request's deadline has passed") from None


class CallTimeouts:
    """Whose calls run, and until when: one timer for all of them. Belongs to one event loop."""

    def __init__(self) -> None:
        self._calls: dict[CallTimeout, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._fires_at = 0.0

    def limit(self, timeout_s: float) -> CallTimeout:
        """`with timeouts.limit(60):` raises TimeoutError from inside when the time is over."""
        return CallTimeout(self, timeout_s)

    def add(self, call: CallTimeout, loop: asyncio.AbstractEventLoop) -> None:
        self._calls[call] = None
        if self._timer is None or call.ends_at < self._fires_at:
            self._schedule(loop, call.ends_at)

    def remove(self, call: CallTimeout) -> None:
        self._calls.pop(call, None)

    def _schedule(self, loop: asyncio.AbstractEventLoop, fires_at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._fires_at = fires_at
        self._timer = loop.call_at(fires_at, self._fire, loop)

    def _fire(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        for call in [one for one in self._calls if one.ends_at <= now]:
            self.remove(call)
            call.end()
        if self._calls:
            self._schedule(loop, min(call.ends_at for call in self._calls))


class CallTimeout:
    """What `asyncio.timeout` does, under a common timer."""

    __slots__ = ("_cancelling", "_is_over", "_task", "_timeout_s", "_timeouts", "ends_at")

    def __init__(self, timeouts: CallTimeouts, timeout_s: float) -> None:
        self._timeouts, self._timeout_s = timeouts, timeout_s
        self._is_over = False
        self.ends_at = 0.0

    def __enter__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a call is limited within a task")
        loop = task.get_loop()
        self._task, self._cancelling = task, task.cancelling()
        self.ends_at = loop.time() + self._timeout_s
        self._timeouts.add(self, loop)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._timeouts.remove(self)
        if not self._is_over:
            return
        nobody_else_cancelled = self._task.uncancel() <= self._cancelling
        if nobody_else_cancelled and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise TimeoutError from error

    def end(self) -> None:
        self._is_over = True
        self._task.cancel()
