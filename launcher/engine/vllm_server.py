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

from launcher.config import LauncherSettings
from launcher.engine import vllm_log
from launcher.engine.hang_detector import HangDetector
from launcher.engine.polling import poll
from launcher.engine.probe import Activity, EngineProbe
from launcher.engine.process import ChildProcess, bind_to_parent
from launcher.engine.temporary_folder import (
    find_temporary_folder,
    make_temporary_folder,
    remove_temporary_folder,
)
from launcher.engine.terminal import LineLog, best_effort
from launcher.engine.vllm_log import Killed, Progress, SchedulerState
from launcher.plan.command import EngineCommand, engine_environment

log = structlog.get_logger("launcher")
_RETRY_S = 0.2
_ABORT_PATIENCE_S = 5.0
_PROGRESS_PAUSE_S = 2.0
_MOST_KILLED = 10  # the first say why; one start has few processes


class VllmProcess:
    """What a server and a part without one (launcher/nodes/) have in common."""

    name = "engine"

    def __init__(
        self, command: EngineCommand, settings: LauncherSettings, *, users: int | None = None
    ) -> None:
        self._command = command
        self._settings = settings
        self.start_timeout_s = settings.start_timeout_s
        self.drain_timeout_s = float(settings.drain_timeout_s)
        self.kill_timeout_s = settings.kill_timeout_s
        self._users = users
        self._temporary = find_temporary_folder(settings.state_path)
        self.inherited: Sequence[int] = () if users is None else (users,)
        self.progress: Progress | None = None
        self.scheduler: SchedulerState | None = None
        self.scheduler_fallbacks = 0  # since the launcher's start
        self.killed: list[Killed] = []
        self.lines: LineLog | None = None
        self._progress_shown_at = 0.0
        self._core_dead_at = 0.0

    def command(self) -> tuple[Sequence[str], Mapping[str, str]]:
        self.progress = self.scheduler = None
        self.killed = []
        self._core_dead_at = 0.0
        command = self._command
        kill_s = self.drain_timeout_s + self.kill_timeout_s  # it drains by itself
        argv = bind_to_parent(command.module, *command.arguments, kill_s=kill_s, users=self._users)
        environment = engine_environment(command, os.environ)
        with best_effort(self._temporary):
            make_temporary_folder(self._temporary)
            environment["TMPDIR"] = str(self._temporary)
            # What is compiled outlives the start.
            compiled = self._settings.compiled_path / "torchinductor"
            environment.setdefault("TORCHINDUCTOR_CACHE_DIR", str(compiled))
        return argv, environment

    def clean_up(self) -> None:
        remove_temporary_folder(self._temporary)

    def read_line(self, line: str) -> None:
        if len(self.killed) < _MOST_KILLED and (killed := vllm_log.find_killed(line)):
            self.killed.append(killed)
        if not self._core_dead_at and vllm_log.is_core_dead(line):
            self._core_dead_at = time.monotonic()
        if scheduler := vllm_log.read_scheduler(line):
            self.scheduler = scheduler
            self.scheduler_fallbacks += scheduler.state == "gave up"
        progress = vllm_log.read_progress(line)
        if progress and progress != self.progress:
            self._show(progress)

    def find_cause(self, lines: Sequence[str]) -> str:
        return str(self.killed[0]) if self.killed else vllm_log.find_cause(lines)

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

    def _show(self, progress: Progress) -> None:
        now = time.monotonic()
        is_new = self.progress is None or self.progress.stage != progress.stage or progress.detail
        self.progress = progress
        if is_new or now - self._progress_shown_at > _PROGRESS_PAUSE_S:
            self._progress_shown_at = now
            extra = {"percent": progress.percent} if progress.percent is not None else {}
            detail = {"detail": progress.detail} if progress.detail else {}
            log.info("engine_progress", stage=progress.stage, **extra, **detail)


class VllmServer(VllmProcess):
    def __init__(
        self,
        command: EngineCommand,
        settings: LauncherSettings,
        probe: EngineProbe,
        *,
        users: int | None = None,
    ) -> None:
        super().__init__(command, settings, users=users)
        self._probe = probe
        self._first_activity: Activity | None = None

    async def is_up(self) -> bool:
        dead_s = time.monotonic() - self._core_dead_at if self._core_dead_at else 0.0
        if dead_s > self.kill_timeout_s:
            raise TimeoutError
        return await self._probe.is_up()

    async def warm(self) -> None:
        await poll(partial(self._probe.ask_one_token, self.start_timeout_s), pause_s=_RETRY_S)
        self._first_activity = await self._probe.read_activity()

    async def fall_asleep(self) -> str:
        return await self._probe.fall_asleep(self._settings.sleep_level, self.start_timeout_s)

    async def wake_up(self) -> str:
        why = await self._probe.wake_up(self._settings.sleep_level, self.start_timeout_s)
        self._first_activity = await self._probe.read_activity()
        return why

    async def watch(self, child: ChildProcess) -> str:
        limit_s = self._settings.hang_timeout_s
        if not limit_s:
            await asyncio.Event().wait()
        interval_s = self._settings.canary_interval_s
        first = self._first_activity or await self._find_activity(interval_s)
        return await HangDetector(limit_s, interval_s, self._probe, child, first).run()

    async def _find_activity(self, interval_s: float) -> Activity:
        """Without counters (`disable-log-stats`) busy and hung look the same; one look may fail."""
        log.warning("watchdog_off", why="the engine publishes no counters")
        activity = await poll(self._probe.read_activity, pause_s=interval_s)
        log.info("watchdog_on")
        return activity

    async def drain(self, timeout_s: float) -> None:
        await self._probe.wait_idle(timeout_s)


def _kernel_place(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/wchan").read_text(encoding="ascii") or "user space"
    except OSError:
        return "?"
