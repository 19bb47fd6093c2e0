"""`launcher up` and `launcher serve`: engine and gateway together, from start to last breath."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import httpx
import structlog

from common.project import DEMO_MODEL
from common.web.foreign_pages import PageGuard
from launcher.config import PREFIX, LauncherSettings
from launcher.engine.crash_card import CrashCards
from launcher.engine.probe import EngineProbe
from launcher.engine.process import end_leftovers
from launcher.engine.status import SchedulerStatus, StatusSource, serve_status
from launcher.engine.supervisor import RestartPolicy, Supervisor
from launcher.engine.terminal import Terminal, best_effort
from launcher.engine.vllm_log import SchedulerState
from launcher.engine.vllm_server import VllmServer
from launcher.gateway_process import GatewayProcess, check_gateway
from launcher.host_resources import hold_state, list_listeners, make_folder
from launcher.plan.compile_cache import note_start
from launcher.plan.fingerprint import read_versions
from launcher.plan.prepare import Prepared

log = structlog.get_logger("launcher")


async def run(prepared: Prepared, terminal: Terminal, *, with_gateway: bool) -> int:
    settings = prepared.settings
    make_folder(settings.cache_path, "LAUNCHER_CACHE_DIR")
    with hold_state(settings.state_path):
        for name in ("engine", "gateway"):
            await end_leftovers(settings.state_path / f"{name}.json")
        for listener in list_listeners(settings, with_gateway=with_gateway):
            listener.ensure_free()
        if with_gateway:
            await asyncio.to_thread(check_gateway, settings, prepared.plan)
        async with (
            EngineProbe(settings.engine_url, prepared.plan.model.served_name) as probe,
            httpx.AsyncClient(trust_env=False) as client,
        ):
            session = Session(prepared, terminal, probe, client, with_gateway=with_gateway)
            status = (settings.status_host, settings.status_port_used)
            async with serve_status(session.status_source(), *status, build_page_guard(settings)):
                await session.run()
    return 0


def build_page_guard(settings: LauncherSettings) -> PageGuard:
    """Nobody needs a key to the status port, which shows command lines."""
    allowed, variable = settings.status_allowed_hosts, f"{PREFIX}STATUS_ALLOWED_HOSTS"
    return PageGuard(settings.status_host, allowed, variable)


def describe_launch(
    prepared: Prepared, versions: Mapping[str, str], fingerprint: Mapping[str, str]
) -> dict[str, Any]:
    """What the status tells of it and no restart changes."""
    plan = prepared.plan
    return {
        "profile": plan.profile,
        "model": plan.model.served_name,
        "device": plan.device.title,
        # By these a gateway that was started elsewhere knows how much it may send where.
        "engine_port": prepared.settings.engine_port,
        "max_num_seqs": plan.sequences,
        "versions": versions,
        "fingerprint": fingerprint,
        "argv": prepared.command.argv,
    }


class Session:
    """One life of the launcher."""

    def __init__(
        self,
        prepared: Prepared,
        terminal: Terminal,
        probe: EngineProbe,
        client: httpx.AsyncClient,
        *,
        with_gateway: bool,
    ) -> None:
        settings, plan = prepared.settings, prepared.plan
        self._prepared = prepared
        self._terminal = terminal
        self._began = time.monotonic()
        self._policy = policy = RestartPolicy(
            settings.restart_limit,
            settings.restart_window_s,
            settings.restart_delay_s,
            settings.restart_delay_max_s,
        )
        folder = settings.state_path
        # Whoever holds its writing end needs the engine: this process, and the gateway, which may
        # outlive it by its last requests.
        users, held = os.pipe() if with_gateway else (None, None)
        engine = VllmServer(prepared.command, settings, probe, plan.model.served_name, users=users)
        fingerprint = prepared.fingerprint.describe()
        versions = read_versions(prepared.vllm)
        self.cards = CrashCards(folder / "crashes", prepared.command, engine, versions, fingerprint)
        self.engine = Supervisor(engine, policy, terminal, folder, self.cards.add)
        engine.lines = self.engine.lines
        self.gateway: Supervisor | None = None
        self._gateway: GatewayProcess | None = None
        if held is not None:
            style = "json" if terminal.is_json else "console"
            ready = self.engine.ready
            self._gateway = GatewayProcess(
                settings,
                plan,
                client,
                log_format=style,
                engine_ready=ready,
                inherited=(held,),
            )
            self.gateway = Supervisor(self._gateway, policy, terminal, folder)
        self._facts = describe_launch(prepared, versions, fingerprint)
        self._progress = lambda: asdict(engine.progress) if engine.progress else None
        self._scheduler = partial(describe_scheduler, plan.scheduler, engine)
        self._signals = 0
        self._stop = asyncio.Event()

    async def run(self) -> None:
        """Whatever ends first, a signal or a program given up, ends the rest in order."""
        plan = self._prepared.plan
        log.info(
            "launcher_started",
            profile=plan.profile,
            device=plan.device.title,
            model=plan.model.name,
            vllm=self._prepared.vllm.version,
            scheduler=plan.scheduler,
            log_file=str(self.engine.lines.path),
        )
        for note in plan.notes:
            log.info("tuned_profile", note=note)
        for warning in plan.warnings:
            log.warning("plan_compromised", why=warning)
        supervisors = [s for s in (self.gateway, self.engine) if s]
        tasks = {s: asyncio.create_task(s.run()) for s in supervisors}
        announcing = asyncio.create_task(self._announce())
        stopping = asyncio.create_task(self._stop.wait())
        with self._signal_handlers():
            await asyncio.wait({stopping, *tasks.values()}, return_when=asyncio.FIRST_COMPLETED)
            announcing.cancel()
            if self._signals:
                log.info("launcher_stopping", note="a second signal ends everything at once")
            for supervisor in supervisors:  # the gateway first: it lets running requests finish
                supervisor.ask_to_stop()
                await asyncio.wait({tasks[supervisor]})
        stopping.cancel()
        await asyncio.gather(announcing, stopping, return_exceptions=True)
        for task in tasks.values():
            task.result()
        log.info("launcher_stopped")

    def status_source(self) -> StatusSource:
        programs = {"engine": self.engine.status}
        if self.gateway:
            programs["gateway"] = self.gateway.status
        labels = {
            "vllm": self._prepared.vllm.version,
            "model": self._facts["model"],
            "profile": self._facts["profile"],
            "device": self._facts["device"],
            "fingerprint": self.cards.fingerprint["name"],
        }
        return StatusSource(
            programs,
            self._facts,
            labels,
            self._progress,
            lambda: self.cards.last,
            self._policy,
            self._scheduler,
            self._count_dropped,
            has_gpu=self._prepared.plan.device.is_gpu,
        )

    def _count_dropped(self) -> dict[str, int]:
        logs = [one.lines for one in (self.engine, self.gateway) if one]
        return {"shown": self._terminal.dropped} | {one.path.name: one.dropped for one in logs}

    async def _announce(self) -> None:
        await self.engine.ready.wait()
        seconds = self.engine.status.start_seconds or 0.0
        settings, plan = self._prepared.settings, self._prepared.plan
        with best_effort(settings.cache_path):
            note_start(settings.cache_path, self._prepared.fingerprint.name, seconds)
        await (self.gateway or self.engine).ready.wait()
        what = f"{plan.model.served_name} ready in {time.monotonic() - self._began:.0f} s"
        if not self._gateway:
            self._terminal.announce(f"{what} at {settings.engine_url} (vLLM itself; no gateway)")
            return
        body = json.dumps({"prompt": _example(settings)}, ensure_ascii=False)
        page = f" (page: {settings.gateway_url}/ui)" if await self._gateway.has_page() else ""
        self._terminal.announce(
            f"{what} at {settings.gateway_url}{page}  try: curl -s {settings.gateway_url}/predict "
            f"-H 'Content-Type: application/json' -d '{body}'"
        )

    def _on_signal(self) -> None:
        """Only notes it; the loop acts. A second signal hurries."""
        self._signals += 1
        self._stop.set()
        if self._signals > 1:
            for supervisor in (self.gateway, self.engine):
                if supervisor:
                    supervisor.hurry()

    @contextlib.contextmanager
    def _signal_handlers(self) -> Iterator[None]:
        loop = asyncio.get_running_loop()
        numbers = (signal.SIGINT, signal.SIGTERM)
        for number in numbers:
            loop.add_signal_handler(number, self._on_signal)
        try:
            yield
        finally:
            for number in numbers:
                loop.remove_signal_handler(number)


def describe_scheduler(planned: str, engine: VllmServer) -> SchedulerStatus:
    said = engine.scheduler or SchedulerState("")
    return SchedulerStatus(planned, said.state, said.reason, engine.scheduler_fallbacks)


def _example(settings: LauncherSettings) -> str:
    """A question that the demo model knows; another model is asked something general."""
    questions = DEMO_MODEL.parent / "questions.jsonl"
    if settings.model == str(DEMO_MODEL) and questions.is_file():
        with questions.open(encoding="utf-8") as file:
            return str(json.loads(file.readline())["question"])
    return "What is a CUDA warp?"
