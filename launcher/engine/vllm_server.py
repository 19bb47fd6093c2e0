"""The engine as a program to supervise: how it starts, answers, hangs and drains."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import structlog

from launcher.config import Settings
from launcher.engine import vllm_log
from launcher.engine.polling import poll
from launcher.engine.probe import Activity, EngineProbe
from launcher.engine.process import ChildProcess
from launcher.engine.terminal import LineLog
from launcher.engine.vllm_log import Progress
from launcher.plan.command import EngineCommand, engine_environment, leash

log = structlog.get_logger("launcher")
_RETRY_S = 0.2
_ABORT_PATIENCE_S = 5.0
_PROGRESS_PAUSE_S = 2.0
_COMPILERS = frozenset(("ninja", "nvcc", "cicc", "ptxas", "cudafe++", "cc1plus", "g++", "clang++"))


class Engine:
    name = "engine"

    def __init__(
        self, command: EngineCommand, settings: Settings, probe: EngineProbe, served_name: str
    ) -> None:
        self._command = command
        self._settings = settings
        self._probe = probe
        self._served_name = served_name
        self.start_timeout_s = settings.start_timeout_s
        self.drain_timeout_s = float(settings.drain_timeout_s)
        self.kill_timeout_s = settings.kill_timeout_s
        self.progress: Progress | None = None
        self.killed_children: list[tuple[int, str]] = []
        self.lines: LineLog | None = None
        self._progress_shown_at = 0.0
        self._first_activity: Activity | None = None

    def command(self) -> tuple[Sequence[str], Mapping[str, str]]:
        self.progress = None
        self.killed_children = []
        command = self._command
        argv = leash(command.module, *command.arguments, kill_s=self.kill_timeout_s)
        return argv, engine_environment(command, os.environ)

    def read_line(self, line: str) -> None:
        if killed := vllm_log.find_killed_child(line):
            self.killed_children.append(killed)
        progress = vllm_log.read_progress(line)
        if progress and progress != self.progress:
            self._show(progress)

    def find_cause(self, lines: Sequence[str]) -> str:
        cause = vllm_log.find_cause(lines)
        if not self.killed_children:
            return cause
        pid, name = self.killed_children[0]
        return f"its process {pid} was killed by {name}"

    async def is_up(self) -> bool:
        return await self._probe.is_up()

    async def warm(self) -> None:
        await poll(partial(self._probe.ask_one_token, self.start_timeout_s), pause_s=_RETRY_S)
        self._first_activity = await self._probe.read_activity()

    async def watch(self, child: ChildProcess) -> str:
        """Hung: work in flight and nothing counted for `hang_timeout_s`; a slow probe is no proof.

        An idle engine counts nothing either, so now and then it is given a token to make. Its
        gauges say only what its core told last, so an unanswered token is work in flight too.
        """
        limit_s = self._settings.hang_timeout_s
        if not limit_s:
            await asyncio.Event().wait()
        interval_s = self._settings.canary_interval_s
        first = self._first_activity or await self._find_activity(interval_s)
        return await _Watch(limit_s, interval_s, self._probe, child, first).run()

    async def _find_activity(self, interval_s: float) -> Activity:
        """Without counters (`disable-log-stats`) busy and hung look the same; one look may fail."""
        log.warning("watchdog_off", why="the engine publishes no counters")
        activity = await poll(self._probe.read_activity, pause_s=interval_s)
        log.info("watchdog_on")
        return activity

    async def dump(self, child: ChildProcess) -> list[str]:
        """State and stacks of every process; the stacks cost its life (faulthandler on SIGABRT)."""
        began = time.monotonic()
        members = child.members()
        rows = [f"{m.pid} {m.name}: state {m.state}, in {_kernel_place(m.pid)}" for m in members]
        for member in members:
            for number in (signal.SIGABRT, signal.SIGCONT):  # a stopped process gets none otherwise
                with contextlib.suppress(ProcessLookupError):
                    os.kill(member.pid, number)
        deadline = began + _ABORT_PATIENCE_S
        while child.members() and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_RETRY_S)
        await child.read_rest()
        return rows + (self.lines.tail(200, since=began) if self.lines else [])

    async def drain(self, timeout_s: float) -> None:
        await self._probe.wait_idle(timeout_s)

    def _show(self, progress: Progress) -> None:
        now = time.monotonic()
        is_new = self.progress is None or self.progress.stage != progress.stage or progress.detail
        self.progress = progress
        if is_new or now - self._progress_shown_at > _PROGRESS_PAUSE_S:
            self._progress_shown_at = now
            extra = {"percent": progress.percent} if progress.percent is not None else {}
            detail = {"detail": progress.detail} if progress.detail else {}
            log.info("engine_progress", stage=progress.stage, **extra, **detail)


class _Watch:
    """Decides between idle, busy and hung from samples; one life of the engine."""

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


def _kernel_place(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/wchan").read_text(encoding="ascii") or "user space"
    except OSError:
        return "?"
