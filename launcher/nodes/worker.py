"""`launcher up --join HEAD`: this host's part of an engine, for as long as the head wants it."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Coroutine, Mapping, Sequence
from functools import partial
from typing import Any, TypeVar, cast

import httpx
import structlog

from common.errors import SettingsError
from common.processes import told_of_stop
from launcher.config import LauncherSettings
from launcher.engine.crash_card import CrashCards
from launcher.engine.process import ChildProcess, end_leftovers
from launcher.engine.status import (
    SchedulerStatus,
    StatusSource,
    build_page_guard,
    serve_status,
)
from launcher.engine.supervisor import ExitReport, ProgramStatus, RestartPolicy, Supervisor
from launcher.engine.terminal import Terminal
from launcher.engine.vllm_server import VllmProcess
from launcher.host_resources import hold_state, make_folder
from launcher.nodes.agreement import Host, build_command, find_differences, look_at_host
from launcher.nodes.head_link import HeadAway, HeadClient, HeadLink
from launcher.nodes.messages import MOST_BEAT_S, Answer
from launcher.plan.command import EngineCommand
from launcher.plan.fingerprint import read_versions

log = structlog.get_logger("launcher")
_POLL_S = 0.2
T = TypeVar("T")


class HeadlessPart(VllmProcess):
    """vLLM without a server; whether it answers, only the head can tell."""

    def __init__(self, settings: LauncherSettings, link: HeadLink, host: Host) -> None:
        super().__init__(build_command(host, link.answer), settings)
        self._link = link
        self.host = host
        self.facts: dict[str, Any] = {"argv": self._command.argv}  # of the status
        self.start_timeout_s = sys.maxsize  # the head's limit is the one

    def command(self) -> tuple[Sequence[str], Mapping[str, str]]:
        self._command = build_command(self.host, self._link.answer)
        self.facts["argv"] = self._command.argv
        return super().command()

    @property
    def told(self) -> EngineCommand:
        return self._command

    async def is_up(self) -> bool:
        return self._link.head_state == "ready"

    async def warm(self) -> None:
        """The head has."""

    async def watch(self, child: ChildProcess) -> str:
        await asyncio.Event().wait()  # one that hangs has the head's engine hang
        return ""

    async def drain(self, timeout_s: float) -> None:
        """The head asks its own engine."""


class Worker:
    """One life of the launcher of a host that joins."""

    def __init__(
        self, settings: LauncherSettings, terminal: Terminal, client: httpx.AsyncClient
    ) -> None:
        self._settings = settings
        self._terminal = terminal
        self._head = HeadClient(settings, client)
        self._stop = asyncio.Event()
        self._supervisor: Supervisor | None = None
        self.has_abandoned = False  # a fetch that still runs in its thread

    async def run(self) -> None:
        with told_of_stop(self._on_signal):
            first = await self._until_stopped(self._find_head())
            if first is not None:
                await self._serve(first)
        log.info("launcher_stopped")

    async def _serve(self, first: Answer) -> None:
        settings = self._settings
        link = HeadLink(self._head, first, settings)
        host = await self._until_stopped(self._agree(link, first))
        if host is None:
            return
        part = HeadlessPart(host.settings, link, host)
        versions = read_versions(host.vllm)
        cards = CrashCards(settings.state_path / "crashes", part.told, part, versions, {})

        async def note_crash(report: ExitReport, status: ProgramStatus) -> None:
            await link.note_end(report, status)
            cards.command = part.told
            await cards.add(report, status)

        self._supervisor = supervisor = Supervisor(
            part, None, self._terminal, settings.state_path, note_crash, peers=link
        )
        part.lines = supervisor.lines
        source = self._describe(supervisor, cards, part, versions)
        status = (settings.status_host, settings.status_port_used)
        log.info("node_joins", head=self._head.title, address=self._head.address)
        async with serve_status(source, *status, build_page_guard(settings)):
            await self._supervise(supervisor, link, part)

    async def _supervise(self, supervisor: Supervisor, link: HeadLink, part: HeadlessPart) -> None:
        tasks = [
            asyncio.create_task(one)
            for one in (supervisor.run(), link.keep(), self._watch_plan(link, part))
        ]
        running, *others = tasks
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
        for task in (stopping, *others):
            task.cancel()
        await asyncio.gather(stopping, *others, return_exceptions=True)
        await link.leave()
        supervisor.ask_to_stop()
        await asyncio.wait({running})
        for task in tasks:
            if not task.cancelled():
                task.result()

    async def _find_head(self) -> Answer:
        """However long it takes: hosts may be started in any order."""
        told = ""
        while True:
            try:
                return await self._head.look()
            except HeadAway as error:
                if str(error) != told:
                    told = str(error)
                    log.warning("head_away", head=self._head.title, why=told)
            await asyncio.sleep(MOST_BEAT_S / 2)

    async def _watch_plan(self, link: HeadLink, part: HeadlessPart) -> None:
        """A head that was started anew may want something else."""
        while True:
            await asyncio.sleep(_POLL_S)
            answer = link.answer
            if answer.part != link.agreed:
                part.host = await self._agree(link, answer)
                link.agree(answer.part)

    async def _agree(self, link: HeadLink, answer: Answer) -> Host:
        try:
            host = await run_unwaited(
                partial(look_at_host, self._settings, answer.part, self._head.address)
            )
            differences = list(find_differences(host, answer))
        except asyncio.CancelledError:
            self.has_abandoned = True
            raise
        except SettingsError as error:
            await link.refuse(str(error))
            raise
        if differences:
            for difference in differences:
                log.error("node_differs", what=difference)
            told = "; ".join(differences)
            await link.refuse(told)
            raise SettingsError(f"this host cannot join the engine of {self._head.title}: {told}")
        return host

    def _describe(
        self,
        supervisor: Supervisor,
        cards: CrashCards,
        part: HeadlessPart,
        versions: dict[str, str],
    ) -> StatusSource:
        settings, host = self._settings, part.host
        part.facts |= {
            "profile": "",
            "model": host.model.served_name,
            "device": host.device.title,
            "engine_port": settings.engine_port,
            "versions": versions,
            "head": self._head.title,
        }
        labels = {
            "vllm": host.vllm.version,
            "model": host.model.served_name,
            "profile": "",
            "device": host.device.title,
            "fingerprint": "",
        }
        return StatusSource(
            {"engine": supervisor.status},
            part.facts,
            labels,
            lambda: None,
            lambda: cards.last,
            RestartPolicy(0, settings.restart_window_s, 0, 0),
            lambda: SchedulerStatus(""),
            lambda: {"shown": self._terminal.dropped, "engine.log": supervisor.lines.dropped},
            has_gpu=host.device.is_gpu,
        )

    async def _until_stopped(self, work: Coroutine[Any, Any, T]) -> T | None:
        working = asyncio.create_task(work)
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if working.done():
            return working.result()
        working.cancel()
        await asyncio.gather(working, return_exceptions=True)
        return None

    def _on_signal(self) -> None:
        """A second one hurries."""
        if self._stop.is_set() and self._supervisor:
            self._supervisor.hurry()
        self._stop.set()


async def run_unwaited(call: Callable[[], T]) -> T:
    """In a thread, as `asyncio.to_thread`; when it is cancelled nobody waits for that thread."""
    loop = asyncio.get_running_loop()
    answer: asyncio.Future[T] = loop.create_future()

    def settle(result: T | None, error: Exception | None) -> None:
        if answer.done():
            return
        if error:
            answer.set_exception(error)
        else:
            answer.set_result(cast("T", result))

    def work() -> None:
        result, error = None, None
        try:
            result = call()
        except Exception as problem:  # noqa: BLE001 - it is raised where this is awaited
            error = problem
        with contextlib.suppress(RuntimeError):  # the loop is closed
            loop.call_soon_threadsafe(settle, result, error)

    threading.Thread(target=work, name="unwaited", daemon=True).start()
    return await answer


async def run_worker(settings: LauncherSettings, terminal: Terminal) -> int:
    make_folder(settings.cache_path, "LAUNCHER_CACHE_DIR")
    with hold_state(settings.state_path):
        await end_leftovers(settings.state_path / "engine.json")
        async with httpx.AsyncClient(trust_env=False) as client:
            worker = Worker(settings, terminal, client)
            await worker.run()
    if worker.has_abandoned:
        # A hub's client has threads of its own, for which Python would wait: a download's time.
        terminal.finish()
        os._exit(0)
    return 0
