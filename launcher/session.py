"""`launcher up` and `launcher serve`: engines and gateway together, from start to last breath."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import time
from collections.abc import Sequence
from dataclasses import replace

import httpx
import structlog

from common.errors import ProgramError, SettingsError
from common.processes import told_of_stop
from common.project import DEMO_MODEL
from launcher.config import LauncherSettings
from launcher.engine.probe import EngineProbe
from launcher.engine.process import end_leftovers
from launcher.engine.status import StatusSource, build_page_guard, serve_status
from launcher.engine.supervisor import RestartPolicy, Supervisor
from launcher.engine.terminal import Terminal
from launcher.engine_unit import EngineUnit
from launcher.errors import CrashLoop, NeverReady
from launcher.gateway_process import (
    GatewayProcess,
    check_gateway,
    find_engines_file,
    write_engines_file,
)
from launcher.host_resources import hold_state, list_listeners, make_folder
from launcher.nodes.agreement import build_part
from launcher.nodes.head import Head, serve_head
from launcher.plan.prepare import Prepared
from launcher.plan.spreading import find_layout
from launcher.sections import meet
from launcher.turns import Turns

log = structlog.get_logger("launcher")


async def run(engines: Sequence[Prepared], terminal: Terminal, *, with_gateway: bool) -> int:
    """What they have in common is in the first one's settings."""
    settings = engines[0].settings
    make_folder(settings.cache_path, "LAUNCHER_CACHE_DIR")
    async with contextlib.AsyncExitStack() as stack:
        for one in engines:
            stack.enter_context(hold_state(one.settings.state_path))
            for name in ("engine", "gateway"):
                await end_leftovers(one.settings.state_path / f"{name}.json")
        for listener in list_listeners(
            [one.settings for one in engines], with_gateway=with_gateway
        ):
            listener.ensure_free()
        if any(one.settings.takes_turns for one in engines):  # their list must be there
            write_engines_file(find_engines_file(settings), [settings])
        if with_gateway:
            await asyncio.to_thread(check_gateway, settings, engines[0].plan, engines[1:])
        client = await stack.enter_async_context(httpx.AsyncClient(trust_env=False))
        probes = [EngineProbe(one.settings.engine_url, one.plan.served_name) for one in engines]
        for probe in probes:
            await stack.enter_async_context(probe)
        head = build_head(engines[0])
        session = Session(engines, terminal, probes, client, with_gateway=with_gateway, head=head)
        if head:
            await stack.enter_async_context(serve_head(head, settings))
        status = (settings.status_host, settings.status_port_used)
        async with serve_status(session.status_source(), *status, build_page_guard(settings)):
            await session.run()
    return 0


class Session:
    """One life of the launcher."""

    def __init__(
        self,
        engines: Sequence[Prepared],
        terminal: Terminal,
        probes: Sequence[EngineProbe],
        client: httpx.AsyncClient,
        *,
        with_gateway: bool,
        head: Head | None = None,
    ) -> None:
        """With a head the engine, which is then the only one, has parts on other hosts."""
        self._settings = settings = engines[0].settings
        self._terminal = terminal
        self._began = time.monotonic()
        self._policy = policy = RestartPolicy(
            settings.restart_limit,
            settings.restart_window_s,
            settings.restart_delay_s,
            settings.restart_delay_max_s,
        )
        # Whoever holds its writing end needs the engines: this process, and the gateway, which may
        # outlive it by its last requests.
        users, held = os.pipe() if with_gateway else (None, None)
        labels = name_engines(engines)
        self._engines = [
            EngineUnit(one, terminal, probe, policy, users=users, label=label, peers=head)
            for one, probe, label in zip(engines, probes, labels, strict=True)
        ]
        self._head = head
        if head:
            status = self._engines[0].supervisor.status
            head.read_state = lambda: status.state
        takes_turns = any(one.takes_turns for one in self._engines)
        self._turns = Turns(self._engines, settings, client) if takes_turns else None
        self.gateway: Supervisor | None = None
        self._gateway: GatewayProcess | None = None
        if held is not None:
            self._gateway = GatewayProcess(
                settings,
                engines[0].plan,
                client,
                log_format="json" if terminal.is_json else "console",
                engine_ready=self._engines[0].supervisor.ready,
                inherited=(held,),
                others=engines[1:],
            )
            self.gateway = Supervisor(self._gateway, policy, terminal, settings.state_path)
        self._given_up = 0  # engines
        self._signals = 0
        self._stop = asyncio.Event()

    @property
    def _supervisors(self) -> list[Supervisor]:
        """In the order in which they end: the gateway lets running requests finish."""
        engines = [one.supervisor for one in self._engines]
        return [self.gateway, *engines] if self.gateway else engines

    async def run(self) -> None:
        """Whatever ends first, a signal or a program given up, ends the rest in order."""
        for engine in self._engines:
            engine.log_start()
        tasks = [asyncio.create_task(self._run_engine(one)) for one in self._engines]
        gateway = asyncio.create_task(self.gateway.run()) if self.gateway else None
        if gateway:
            tasks.insert(0, gateway)
        announcing = asyncio.create_task(self._announce())
        turning = asyncio.create_task(self._turns.run()) if self._turns else None
        stopping = asyncio.create_task(self._stop.wait())
        with told_of_stop(self._on_signal):
            await asyncio.wait({stopping, *tasks}, return_when=asyncio.FIRST_COMPLETED)
            announcing.cancel()
            if turning:
                turning.cancel()
            if self._signals:
                log.info("launcher_stopping", note="a second signal ends everything at once")
            self._stop.set()
            if self.gateway and gateway:
                self.gateway.ask_to_stop()
                await asyncio.wait({gateway})
            for engine in self._engines:
                engine.supervisor.ask_to_stop()
            await asyncio.wait(tasks)
        stopping.cancel()
        ended = (announcing, stopping, *([turning] if turning else []))
        await asyncio.gather(*ended, return_exceptions=True)
        for task in tasks:
            task.result()
        log.info("launcher_stopped")

    async def _run_engine(self, engine: EngineUnit) -> None:
        """After those before it on its device: vLLM measures what is free there while it starts.

        One whose first start waits for a caller is tried when the others have long been at work: it
        is given up where another that never becomes ready ends the launcher's start.
        """
        is_late = self._is_asleep(engine)
        for other in self._engines[: self._engines.index(engine)]:
            if self._is_asleep(other) or self._is_asleep(engine):
                continue
            if meet(engine.prepared.settings, other.prepared.settings):
                waits = [
                    asyncio.create_task(event.wait())
                    for event in (other.supervisor.ready, self._stop)
                ]
                await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
                for wait in waits:
                    wait.cancel()
        if self._stop.is_set():
            engine.supervisor.ask_to_stop()
        try:
            await engine.supervisor.run()
        except CrashLoop as error:
            await self._give_up(engine, error)
        except (NeverReady, SettingsError) as error:
            if not is_late:
                raise
            await self._give_up(engine, error)

    async def _give_up(self, engine: EngineUnit, error: ProgramError) -> None:
        """The last one's end is the launcher's."""
        self._given_up += 1
        if self._given_up == len(self._engines):
            raise error
        log.error("engine_given_up", engine=engine.label, why=str(error))
        await self._stop.wait()  # the others go on

    def status_source(self) -> StatusSource:
        gateway = self.gateway.status if self.gateway else None
        first, *others = self._engines
        if not others:
            source = first.status_source(gateway, self._policy, self._count_dropped)
            if self._head is None:
                return source
            return replace(source, hosts=self._head.describe, count_hosts=self._head.count)
        host = first.status_source(gateway, self._policy, self._count_dropped)
        engines = (
            one.status_source(None, self._policy, self._count_dropped) for one in self._engines
        )
        programs = {} if gateway is None else {"gateway": gateway}
        return replace(host, programs=programs, facts={}, engines=tuple(engines), gpus=())

    def _count_dropped(self) -> dict[str, int]:
        dropped = {"shown": self._terminal.dropped}
        for one in self._engines:
            name = one.supervisor.lines.path.name
            dropped[f"{one.label}/{name}" if one.label else name] = one.supervisor.lines.dropped
        if self.gateway:
            dropped[self.gateway.lines.path.name] = self.gateway.lines.dropped
        return dropped

    def _is_asleep(self, engine: EngineUnit) -> bool:
        return self._turns is not None and self._turns.is_asleep(engine)

    async def _announce(self) -> None:
        for engine in self._engines:
            if self._is_asleep(engine):
                continue
            await engine.supervisor.ready.wait()
            engine.note_start()
        settings = self._settings
        if self.gateway:
            await self.gateway.ready.wait()
        names = ", ".join(dict.fromkeys(one.prepared.plan.served_name for one in self._engines))
        what = f"{names} ready in {time.monotonic() - self._began:.0f} s"
        if not self._gateway:
            urls = ", ".join(one.prepared.settings.engine_url for one in self._engines)
            self._terminal.announce(f"{what} at {urls} (vLLM itself; no gateway)")
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
            for supervisor in self._supervisors:
                supervisor.hurry()


def build_head(prepared: Prepared) -> Head | None:
    """None where the engine runs here alone, or Ray has its hosts."""
    settings = prepared.settings
    layout = find_layout(settings, prepared.plan)
    if layout is None or settings.nodes_backend == "ray":
        return None
    return Head(build_part(prepared), layout, settings.node_timeout_s)


def name_engines(engines: Sequence[Prepared]) -> list[str]:
    """What tells them apart in the log: the model's name, with the port where it is served twice;
    nothing where there is one alone.
    """
    if len(engines) == 1:
        return [""]
    names = [one.plan.served_name for one in engines]
    return [
        name if names.count(name) == 1 else f"{name}:{one.settings.engine_port}"
        for name, one in zip(names, engines, strict=True)
    ]


def _example(settings: LauncherSettings) -> str:
    """A question that the demo model knows; another model is asked something general."""
    questions = DEMO_MODEL.parent / "questions.jsonl"
    if settings.model == str(DEMO_MODEL) and questions.is_file():
        with questions.open(encoding="utf-8") as file:
            return str(json.loads(file.readline())["question"])
    return "What is a CUDA warp?"
