"""Whether a program hangs or only computes: an engine by what it counts and a token now and then, a
gateway by whether it answers and, if not, by what the kernel says of it.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable

from common.processes import read_thread_runs
from launcher.engine.probe import Activity, EngineProbe
from launcher.engine.process import ChildProcess, read_member

_COMPILERS = frozenset(("ninja", "nvcc", "cicc", "ptxas", "cudafe++", "cc1plus", "g++", "clang++"))
_STOPPED = ("T", "t")  # by a signal, by a debugger


class HangDetector:
    """Idle, busy or hung, for one life of the engine.

    Hung: work in flight and nothing counted for `limit_s`; a slow probe is no proof. An idle engine
    counts nothing either, so now and then it is given a token to make. Its gauges say only what its
    core told last, so an unanswered token is work in flight too.
    """

    def __init__(
        self,
        limit_s: float,
        canary_interval_s: float,
        probe: EngineProbe,
        child: ChildProcess,
        first: Activity,
    ) -> None:
        self._child = child
        self._limit_s = limit_s
        self._canary_interval_s = canary_interval_s
        self._probe = probe
        self._pause_s = min(2.0, limit_s / 4)
        self._moved_at = time.monotonic()
        self._last = first
        self._canary: asyncio.Task[bool] | None = None

    async def run(self) -> str:
        try:
            while True:
                await asyncio.sleep(self._pause_s)
                self._note(await self._probe.read_activity())
                still_s = time.monotonic() - self._moved_at
                if still_s > self._limit_s and self._has_work():
                    return f"work in flight and no token for {still_s:.0f} s"
        finally:
            if self._canary:
                self._canary.cancel()
                await asyncio.gather(self._canary, return_exceptions=True)

    def _note(self, now: Activity | None) -> None:
        if self._canary and self._canary.done():
            if not self._canary.cancelled() and self._canary.result():
                self._moved_at = time.monotonic()
            self._canary = None
        is_moving = now is not None and now.moved != self._last.moved
        if is_moving or self._is_building():
            self._moved_at = time.monotonic()
        self._last = now or self._last
        idle_s = time.monotonic() - self._moved_at
        wait_s = min(self._canary_interval_s, self._limit_s / 2)
        if self._canary is None and idle_s > wait_s:
            self._canary = asyncio.create_task(self._probe.ask_one_token(10 * self._limit_s))

    def _has_work(self) -> bool:
        is_asked = self._canary is not None and not self._canary.done()
        return is_asked or self._last.in_flight > 0

    def _is_building(self) -> bool:
        """A first request may wait minutes for kernels that are built for it."""
        return any(member.name in _COMPILERS for member in self._child.members())


class SilenceDetector:
    """A program that always has an answer, for one life of it.

    It hangs when it has answered nothing for `limit_s` in which it was stopped or slept, or has
    spent as much on a core. What waits for a core only looks alike: a busy machine is no proof.
    """

    def __init__(self, limit_s: float, pid: int, ask: Callable[[], Awaitable[bool]]) -> None:
        self._limit_s = limit_s
        self._pid = pid
        self._ask = ask
        self._pause_s = min(2.0, limit_s / 4)
        self._last = (0, 0)  # runs, and nanoseconds in them
        self._still_s = self._busy_s = 0.0

    async def run(self) -> str:
        # One question until it is answered, however late: a slow answer is one.
        asking = asyncio.ensure_future(self._ask())
        try:
            while True:
                began = time.monotonic()
                await asyncio.sleep(self._pause_s)
                if asking.done():
                    if asking.result():
                        self._still_s = self._busy_s = 0.0
                    asking = asyncio.ensure_future(self._ask())
                if verdict := self._look(time.monotonic() - began):
                    return verdict
        finally:
            asking.cancel()
            await asyncio.gather(asking, return_exceptions=True)

    def _look(self, took_s: float) -> str:
        member, runs = read_member(self._pid), read_thread_runs(self._pid)
        if member is None:  # its end is noticed elsewhere
            return ""
        if runs is None:
            is_still, ran_s = member.state in _STOPPED, 0.0
        else:
            is_still = runs == self._last and member.state != "R"
            ran_s = (runs[1] - self._last[1]) / 1e9
            self._last = runs
        # This launcher may have stood still itself, with the answer before it: no look counts much.
        most_s = 2 * self._pause_s
        self._still_s = self._still_s + min(took_s, most_s) if is_still else 0.0
        self._busy_s += min(ran_s, most_s)
        if self._still_s > self._limit_s:
            return f"no answer and no work for {self._still_s:.0f} s (state {member.state})"
        if self._busy_s > self._limit_s:
            return f"no answer within {self._busy_s:.0f} s of work"
        return ""
