"""Bounds in time that cost next to nothing: a timer for each request, and two for each chunk of a
stream, once took a fifth of the gateway's time.

`Watch` ends calls that take too long with one timer for all of them. `Silence` looks after one
stream with one timer that is wound up again when it rings, not when a chunk passes.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from types import TracebackType
from typing import Self

import aiohttp
from aiohttp import web

from gateway.config import SETTINGS
from gateway.errors import EngineTimeout
from gateway.observability.trace import TRACE

KEEP_ALIVE = b": keep-alive\n\n"


class Watch:
    """Whose calls run, and until when. Belongs to one event loop."""

    def __init__(self) -> None:
        self._calls: dict[Call, None] = {}
        self._timer: asyncio.TimerHandle | None = None
        self._rings_at = 0.0

    def call(self, timeout_s: float) -> Call:
        """`with watch.call(60):` raises TimeoutError from inside when the time is over."""
        return Call(self, timeout_s)

    def add(self, call: Call, loop: asyncio.AbstractEventLoop) -> None:
        self._calls[call] = None
        if self._timer is None or call.ends_at < self._rings_at:
            self._wind(loop, call.ends_at)

    def remove(self, call: Call) -> None:
        self._calls.pop(call, None)

    def _wind(self, loop: asyncio.AbstractEventLoop, rings_at: float) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._rings_at = rings_at
        self._timer = loop.call_at(rings_at, self._ring, loop)

    def _ring(self, loop: asyncio.AbstractEventLoop) -> None:
        self._timer = None
        now = loop.time()
        for call in [one for one in self._calls if one.ends_at <= now]:
            self.remove(call)
            call.end()
        if self._calls:
            self._wind(loop, min(call.ends_at for call in self._calls))


class Call:
    """What `asyncio.timeout` does, under a common timer."""

    __slots__ = ("_cancelling", "_is_over", "_task", "_timeout_s", "_watch", "ends_at")

    def __init__(self, watch: Watch, timeout_s: float) -> None:
        self._watch, self._timeout_s = watch, timeout_s
        self._is_over = False
        self.ends_at = 0.0

    def __enter__(self) -> None:
        task = asyncio.current_task()
        if task is None:
            raise RuntimeError("a call is watched within a task")
        loop = task.get_loop()
        self._task, self._cancelling = task, task.cancelling()
        self.ends_at = loop.time() + self._timeout_s
        self._watch.add(self, loop)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._watch.remove(self)
        if not self._is_over:
            return
        nobody_else_cancelled = self._task.uncancel() <= self._cancelling
        if nobody_else_cancelled and kind is not None and issubclass(kind, asyncio.CancelledError):
            raise TimeoutError from error

    def end(self) -> None:
        self._is_over = True
        self._task.cancel()


class Silence:
    """Looks after an engine's stream that stands still: comments for the caller, and an error when
    it stays so or takes too long. A caller who takes nothing is the connection's affair.
    """

    def __init__(
        self,
        request: web.Request,
        content: aiohttp.StreamReader,
        response: web.StreamResponse,
    ) -> None:
        self.is_writing = False
        self.is_inside_event = False  # no place for a comment
        self._content, self._response = content, response
        self._trace, settings = request[TRACE], request.app[SETTINGS]
        self._settings = settings
        self._shortest_s = min(
            settings.keepalive_comment_s, settings.stream_idle_timeout_s, settings.engine_timeout_s
        )
        self._started = self._commented_at = time.perf_counter()
        self._comment: asyncio.Task[None] | None = None
        self._loop = asyncio.get_running_loop()

    def __enter__(self) -> Self:
        self._wind(self._shortest_s)
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()
        if self._comment is not None:
            self._comment.cancel()

    def _wind(self, pause_s: float) -> None:
        self._timer = self._loop.call_later(max(pause_s, 0.001), self._look)

    def _look(self) -> None:
        now = time.perf_counter()
        moved_at = max(self._started, self._trace.last_chunk_at)
        if self.is_writing or (self._comment is not None and not self._comment.done()):
            self._wind(self._shortest_s)  # it is not the engine that is awaited
        else:
            self._look_at_engine(now, moved_at)

    def _look_at_engine(self, now: float, moved_at: float) -> None:
        settings = self._settings
        idle_left_s = moved_at + settings.stream_idle_timeout_s - now
        left_s = self._started + settings.engine_timeout_s - now
        if idle_left_s <= 0 or left_s <= 0:
            reason = "fell silent" if idle_left_s <= 0 else "took too long"
            self._content.set_exception(EngineTimeout(f"the engine's stream {reason}"))
            return
        comment_left_s = max(moved_at, self._commented_at) + settings.keepalive_comment_s - now
        if comment_left_s <= 0:
            comment_left_s = settings.keepalive_comment_s
            self._commented_at = now
            if not self.is_inside_event:
                self._comment = self._loop.create_task(self._send_comment())
        self._wind(min(comment_left_s, idle_left_s, left_s))

    async def _send_comment(self) -> None:
        with contextlib.suppress(ConnectionError):  # he has gone: the handler hears of it itself
            await self._response.write(KEEP_ALIVE)
