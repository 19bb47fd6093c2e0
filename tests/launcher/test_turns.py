"""Turns over two programs that sleep, with a gateway's figures made up."""

from __future__ import annotations

import asyncio
import contextlib
import os
import tomllib
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx

from launcher.config import LauncherSettings
from launcher.engine.polling import poll
from launcher.engine.process import ChildProcess
from launcher.engine.supervisor import RestartPolicy, Supervisor
from launcher.engine.terminal import Terminal
from launcher.gateway_process import find_engines_file
from launcher.turns import Turns

_POLICY = RestartPolicy(limit=0, window_s=60, delay_s=0.01, delay_max_s=0.01)


class Sleeper:
    """Ready once it runs."""

    name = "engine"
    start_timeout_s = drain_timeout_s = 20.0
    kill_timeout_s = 5.0
    inherited: Sequence[int] = ()

    def __init__(self, label: str, note: Callable[[str], None]) -> None:
        self._label, self._note = label, note

    def command(self) -> tuple[Sequence[str], Mapping[str, str]]:
        self._note(f"{self._label} starts")
        return ["sleep", "600"], os.environ

    def read_line(self, line: str) -> None: ...

    def find_cause(self, lines: Sequence[str]) -> str:
        return ""

    async def is_up(self) -> bool:
        return True

    async def warm(self) -> None: ...

    async def watch(self, child: ChildProcess) -> str:
        await asyncio.Event().wait()
        return ""

    async def dump(self, child: ChildProcess) -> list[str]:
        return []

    async def drain(self, timeout_s: float) -> None: ...

    def clean_up(self) -> None:
        self._note(f"{self._label} has ended")


@dataclass
class Host:
    """Engines `a` and `b` of one device, of which `a` runs first; `c` has its own."""

    folder: Path
    models: str = "ab"
    held: str = ""  # the model that callers wait for
    on_look: Callable[[], None] = lambda: None
    units: list[Any] = field(default_factory=list)
    events: list[tuple[str, list[str]]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.settings = LauncherSettings(state_dir=self.folder, shortest_turn_s=0)
        self.file = find_engines_file(self.settings)
        for number, model in enumerate(self.models):
            gpus = ("1",) if model == "c" else ("0",)
            own = LauncherSettings(engine_port=9001 + number, takes_turns=True, gpus=gpus)
            (self.folder / model).mkdir()
            program, terminal = Sleeper(model, self.note), cast("Terminal", SimpleNamespace())
            supervisor = Supervisor(program, _POLICY, terminal, self.folder / model, label=model)
            unit = SimpleNamespace(
                label=model,
                model=model,
                takes_turns=True,
                supervisor=supervisor,
                prepared=SimpleNamespace(settings=own),
            )
            self.units.append(unit)

    def note(self, event: str) -> None:
        self.events.append((event, self.read_list()))

    def answer(self, _request: httpx.Request) -> httpx.Response:
        self.on_look()
        return httpx.Response(200, text=f'gateway_model_held_calls{{model="{self.held}"}} 1\n')

    def read_list(self) -> list[str]:
        urls = tomllib.loads(self.file.read_text())["engines"] if self.file.is_file() else ["?"]
        return [url.removeprefix("http://127.0.0.1:") for url in urls]

    @contextlib.asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        async with httpx.AsyncClient(transport=httpx.MockTransport(self.answer)) as client:
            turns = Turns(self.units, self.settings, client)
            runs = [asyncio.create_task(unit.supervisor.run()) for unit in self.units]
            turning = asyncio.create_task(turns.run())
            try:
                async with asyncio.timeout(60):
                    await self.units[0].supervisor.ready.wait()
                    yield
            finally:
                turning.cancel()
                for unit in self.units:
                    unit.supervisor.ask_to_stop()
                await asyncio.gather(turning, *runs, return_exceptions=True)


async def test_wanted_engine_starts_when_the_other_has_ended(tmp_path: Path) -> None:
    """The device is not enough for both."""
    host = Host(tmp_path, held="b")
    async with host.run():
        await host.units[1].supervisor.ready.wait()
        assert host.events == [
            ("a starts", ["9001"]),
            ("a has ended", ["9002"]),  # nothing new comes to it
            ("b starts", ["9002"]),
        ]


async def test_turn_waits_until_the_list_can_be_written(tmp_path: Path) -> None:
    host = Host(tmp_path)
    async with host.run():
        first, second = (unit.supervisor for unit in host.units)
        host.file.unlink()
        host.file.mkdir()
        host.held = "b"
        await wait_looks(host)
        assert (first.status.state, second.status.state) == ("ready", "parked")
        host.file.rmdir()
        await second.ready.wait()
        assert host.read_list() == ["9002"]


async def test_engine_given_up_leaves_the_list_and_gets_no_turn(tmp_path: Path) -> None:
    host = Host(tmp_path, "abc")
    async with host.run():
        first, second, _ = (unit.supervisor for unit in host.units)
        assert first.status.pid is not None
        os.kill(first.status.pid, 9)
        await wait_until(lambda: host.read_list() == ["9003"])
        host.held = "b"
        await second.ready.wait()
        assert host.read_list() == ["9002", "9003"]
        host.held = "a"
        await wait_looks(host)
        assert (second.status.state, host.read_list()) == ("ready", ["9002", "9003"])


async def wait_looks(host: Host) -> None:
    """Three rounds."""
    looks: list[None] = []
    host.on_look = lambda: looks.append(None)
    await wait_until(lambda: len(looks) > 2)


async def wait_until(check: Callable[[], bool]) -> None:
    await poll(lambda: asyncio.to_thread(check), pause_s=0.02)
