"""Whether an engine hangs or only computes: by what it counts, and a token now and then."""

from __future__ import annotations

import asyncio
import time

from launcher.engine.probe import Activity, EngineProbe
from launcher.engine.process import ChildProcess

_COMPILERS = frozenset(("ninja", "nvcc", "cicc", "ptxas", "cudafe++", "cc1plus", "g++", "clang++"))


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
