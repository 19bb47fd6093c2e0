"""An arm's processes: started at once with the others', stopped while another arm is measured.

The unit is a session, as it is in the launcher; only what ends it with its starter runs on.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import httpx
import psutil

from common.ports import find_free_ports
from common.processes import find_session, read_cpu_s
from lab.bench.bench_figures import BenchFailed
from lab.gpu.arms import PlannedArm
from lab.records.record import run_quietly
from launcher.config import LauncherSettings, load_settings
from launcher.engine.process import bind_to_parent, end_group
from launcher.gateway_process import build_environment
from launcher.plan.command import engine_environment

_KILL_S = 20.0
_STOP_TIMEOUT_S = 15.0
_POLL_S = 0.1
_WAKE_TIMEOUT_S = 60.0
_WATCHER = "parent_death"
_ROLES = {"EngineCore": "EngineCore", "Worker": "worker"}


class ProgramSession:
    """One program with all that it starts."""

    def __init__(self, role: str, argv: Sequence[str], env: Mapping[str, str], log: Path) -> None:
        self._role, self.log = role, log
        with log.open("wb") as file:
            self._leader = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=file, stderr=file, env=dict(env),
                start_new_session=True,
            )  # fmt: skip
        self.pid = self._leader.pid
        self._roles: dict[int, str] = {}

    @property
    def has_ended(self) -> bool:
        return self._leader.poll() is not None

    def signal(self, number: signal.Signals) -> None:
        for process in find_session(self.pid):
            with contextlib.suppress(psutil.Error):
                if process.name() != _WATCHER:
                    process.send_signal(number)

    def refresh(self) -> None:
        """Looks at every process of the machine, so not while anything is measured."""
        self._roles = {one.pid: self._name(one) for one in find_session(self.pid)}

    def list_cpu_s(self) -> Iterator[tuple[str, float]]:
        for pid, role in self._roles.items():
            with contextlib.suppress(OSError):  # it has ended
                yield role, read_cpu_s(pid)

    async def end(self) -> None:
        """Asked first: killed, vLLM leaves its shared memory behind."""
        self.signal(signal.SIGCONT)
        self._leader.terminate()
        deadline = time.monotonic() + _STOP_TIMEOUT_S
        while not self.has_ended and time.monotonic() < deadline:  # noqa: ASYNC110
            await asyncio.sleep(_POLL_S)
        await end_group(self.pid)
        self._leader.wait()

    def _name(self, process: psutil.Process) -> str:
        if process.pid == self.pid:
            return self._role
        try:
            title = " ".join([process.name(), *process.cmdline()])
        except psutil.Error:
            return "others"
        return next((role for word, role in _ROLES.items() if word in title), "others")


class RunningArm:
    """The engines of an arm, and the gateway before them where the arm is a profile."""

    def __init__(self, planned: PlannedArm, folder: Path) -> None:
        self.arm, self.planned = planned.arm, planned
        *engines, gateway = find_free_ports(self.arm.copies + 1)
        self.engine_urls = [f"http://127.0.0.1:{port}" for port in engines]
        self.gateway_url = f"http://127.0.0.1:{gateway}" if planned.plan else ""
        self._folder = folder
        self.engines = [self._start_engine(place, port) for place, port in enumerate(engines)]
        self.gateways = [self._start_gateway(gateway)] if planned.plan else []

    def _start_engine(self, place: int, port: int) -> ProgramSession:
        command, each = self.planned.command, self.planned.cards_each
        words = (*command.arguments, "--host", "127.0.0.1", "--port", str(port))
        environment = engine_environment(command, os.environ)
        if seen := list_cards():
            cards = ",".join(seen[place * each : (place + 1) * each])
            environment["CUDA_VISIBLE_DEVICES"] = cards
        argv = bind_to_parent(command.module, *words, kill_s=_KILL_S)
        return ProgramSession("API server", argv, environment, self._log(f"engine{place}"))

    def _start_gateway(self, port: int) -> ProgramSession:
        assert self.planned.plan is not None  # noqa: S101 - a gateway is a profile's
        words = ["--port", str(port), "--status-port", "0"]
        settings = load_settings(LauncherSettings, words)
        environment = build_environment(settings, self.planned.plan, "json")
        environment["GATEWAY_ENGINES"] = ",".join(self.engine_urls)
        argv = bind_to_parent("gateway", kill_s=_KILL_S)
        return ProgramSession("gateway", argv, environment, self._log("gateway"))

    def _log(self, name: str) -> Path:
        arm = self.arm.word.replace("*", "x").replace(" ", ".").replace("/", "_")
        return self._folder / f"{arm}.{name}.log"

    @property
    def sessions(self) -> list[ProgramSession]:
        return [*self.engines, *self.gateways]

    def find_end(self) -> str:
        """Why it cannot be measured; empty while all of it runs."""
        ended = next((session for session in self.sessions if session.has_ended), None)
        if ended is None:
            return ""
        lines = ended.log.read_text("utf-8", "replace").splitlines()
        told = [line for line in lines if "Error" in line]
        return f"{' | '.join((told or lines)[-3:])[-600:]} (all of it: {ended.log})"

    async def wait_ready(self, client: httpx.AsyncClient, deadline: float) -> None:
        paths = [f"{url}/health" for url in self.engine_urls]
        paths += [f"{self.gateway_url}/readyz"] if self.gateway_url else []
        while time.monotonic() < deadline:
            if why := self.find_end():
                raise BenchFailed(f"{self.arm.word} ended: {why}")
            if all([await _answers(client, path) for path in paths]):
                return
            await asyncio.sleep(_POLL_S)
        raise BenchFailed(f"{self.arm.word} was not ready in time; its logs are in {self._folder}")

    async def wake(self, client: httpx.AsyncClient) -> None:
        for session in self.sessions:
            session.signal(signal.SIGCONT)
            session.refresh()
        await self.wait_ready(client, time.monotonic() + _WAKE_TIMEOUT_S)

    def sleep(self) -> None:
        """The gateway first: it would take a stopped engine for a dead one."""
        for session in reversed(self.sessions):
            session.signal(signal.SIGSTOP)

    async def forget_prompts(self, client: httpx.AsyncClient) -> None:
        deadline = time.monotonic() + _WAKE_TIMEOUT_S
        for url in self.engine_urls:
            while not (await client.post(f"{url}/reset_prefix_cache")).json()["success"]:
                if time.monotonic() > deadline:
                    raise BenchFailed(f"{self.arm.word} keeps its prefix cache")
                await asyncio.sleep(_POLL_S)

    def read_cpu_s(self) -> dict[str, float]:
        """So far, by role."""
        spent: defaultdict[str, float] = defaultdict(float)
        for session in self.sessions:
            for role, seconds in session.list_cpu_s():
                spent[role] += seconds
        return spent

    async def end(self) -> None:
        await asyncio.gather(*(session.end() for session in self.sessions))


async def _answers(client: httpx.AsyncClient, url: str) -> bool:
    try:
        return (await client.get(url)).is_success
    except httpx.HTTPError:
        return False


def list_cards() -> list[str]:
    """Those that this process may use, as CUDA_VISIBLE_DEVICES names them; none without a GPU."""
    if (named := os.environ.get("CUDA_VISIBLE_DEVICES")) is not None:
        return [part.strip() for part in named.split(",") if part.strip()]
    listed = run_quietly("nvidia-smi", "--query-gpu=index", "--format=csv,noheader")
    return listed.split()
