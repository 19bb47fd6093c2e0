"""The programs that faults are injected into: a launcher with all below it, a gateway beside it."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import psutil

from common.ports import find_free_row
from common.processes import find_session, read_command
from lab.failures import LabFailure
from lab.launched_server import LaunchedServer, launch_program
from lab.load.process_faults import find_pid

_POLL_S = 0.1
_MARK = "LAB_FAULTS_FOLDER"
_CLOCK = "lab.faults.servers.jumping_clock"


class NotHere(Exception):
    """What this machine does not let us inject; says why."""


class NotStarted(LabFailure):
    """A program that was to be injected faults into never came up."""

    exit_code = 3


class Program:
    """One of ours, its log in files of a folder; a start after an end goes on in another file."""

    has_log = True

    def __init__(
        self, name: str, folder: Path, words: Sequence[str], environment: Mapping[str, str]
    ) -> None:
        self.name, self.folder, self.words = name, folder, words
        self.environment = {**environment, _MARK: f"{folder}/"}
        self.logs: list[Path] = []
        self._exits = ExitStack()
        self._launched: LaunchedServer | None = None

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self._exits.close()
        self.logs.append(self.folder / f"{self.name}-{len(self.logs) + 1}.log")
        program = launch_program(self.name, self.words, self.environment, self.logs[-1])
        self._launched = self._exits.enter_context(program)

    async def close(self) -> None:
        """In a thread: what it stops may still need servers of this process."""
        await asyncio.to_thread(self._exits.close)

    @property
    def pid(self) -> int:
        return self._get().process.pid

    @property
    def exit_code(self) -> int | None:
        return self._get().process.poll()

    def send(self, number: signal.Signals) -> None:
        self._get().process.send_signal(number)

    async def wait_ended(self, within_s: float = 60.0) -> int:
        async def has_ended() -> bool:
            return self.exit_code is not None

        if not await poll_until(has_ended, within_s) or self.exit_code is None:
            raise TimeoutError(f"{self.name} has not ended within {within_s:.0f} s")
        return self.exit_code

    async def is_gone(self) -> bool:
        """Nothing that it started is left."""
        return not self.list_processes()

    def read_tail(self, lines: int = 12) -> str:
        return "\n".join(self.logs[-1].read_text(errors="replace").splitlines()[-lines:])

    def tell_end(self) -> str:
        end = self._get().find_end()
        return end.text if end else ""

    def count_log(self) -> list[int]:
        """How far the log has come."""
        return [path.stat().st_size for path in self.logs]

    def read_events(self, since: Sequence[int] = ()) -> list[dict[str, Any]]:
        """What was logged after that."""
        events: list[dict[str, Any]] = []
        for place, path in enumerate(self.logs):
            with path.open("rb") as file:
                file.seek(since[place] if place < len(since) else 0)
                events += _parse_events(file.read())
        return events

    def list_processes(self) -> list[psutil.Process]:
        """Itself and whatever it has started, but for who ends it should this process die."""
        found = [one for one in psutil.process_iter() if _is_marked(one, self.folder)]
        return [one for one in found if not self._is_watcher(one)]

    def _is_watcher(self, process: psutil.Process) -> bool:
        try:
            return process.name() == "parent_death" and os.getsid(process.pid) == self.pid
        except (psutil.Error, OSError):
            return True  # it has just ended

    def _get(self) -> LaunchedServer:
        if self._launched is None:
            raise NotStarted(f"{self.name}: it was not started")
        return self._launched


class Service(Program):
    """`python -m launcher up`: engine and gateway."""

    def __init__(
        self,
        folder: Path,
        environment: Mapping[str, str],
        *options: str,
        port: int | None = None,
        command: str = "up",
    ) -> None:
        port = port or find_free_row(3)
        self.url, self.engine_url, self.status_url = (
            f"http://127.0.0.1:{port + above}" for above in range(3)
        )
        self.port = port
        words = [command, "--port", str(port), "--engine-port", str(port + 1)]
        words += ["--status-port", str(port + 2), "--log-format", "json", *options]
        own = {"LAUNCHER_STATE_DIR": str(folder / "state"), **environment}
        super().__init__("launcher", folder, words, own)

    async def find(self, program: str) -> int:
        """The process id of `core`, `engine` or `gateway`."""
        pid = self.pid if program == "launcher" else await find_pid(self.status_url, program)
        if pid is None:
            raise LookupError(f"the launcher names no {program}")
        return pid


class GivenService(Service):
    """One that somebody else has started on this host, and will end."""

    has_log = False

    def __init__(self, folder: Path, url: str, status_url: str) -> None:
        super().__init__(folder, {})
        self.url, self.status_url = url, status_url
        self.port = urlsplit(url).port or 80
        self.engine_url = f"http://127.0.0.1:{self._read_status().get('engine_port', 0)}"

    def start(self) -> None:
        if self._read_status():
            return
        raise NotStarted(f"no launcher tells its status at {self.status_url}; --status says where")

    def tell_end(self) -> str:
        return ""

    def list_processes(self) -> list[psutil.Process]:
        status = self._read_status()
        pids = [(status.get(name) or {}).get("pid") for name in ("engine", "gateway")]
        return [one for pid in pids if pid for one in find_session(pid)]

    def _read_status(self) -> dict[str, Any]:
        with contextlib.suppress(httpx.HTTPError, ValueError):
            answer = httpx.get(f"{self.status_url}/status", timeout=5, trust_env=False)
            status = answer.json()
            return status if isinstance(status, dict) else {}
        return {}

    def _get(self) -> LaunchedServer:
        raise NotHere("the service was given by its address: its launcher is not ours to end")


class BesideGateway(Program):
    """`python -m gateway` before engines that others have started."""

    def __init__(
        self,
        folder: Path,
        engines: str,
        environment: Mapping[str, str],
        *options: str,
        clock: Path | None = None,
    ) -> None:
        """`clock`: a file that says by how much its clock is wrong."""
        port = find_free_row(1)
        self.url = f"http://127.0.0.1:{port}"
        words = ["--port", str(port), "--engines", engines, "--log-format", "json", *options]
        if clock is None:
            super().__init__("gateway", folder, words, environment)
        else:
            super().__init__(_CLOCK, folder, [str(clock), "gateway", *words], environment)


async def poll_until(
    check: Callable[[], Awaitable[bool]], within_s: float, pause_s: float = _POLL_S
) -> bool:
    deadline = time.monotonic() + within_s
    while not await check():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(pause_s)
    return True


def describe_process(process: psutil.Process) -> str:
    """As the kernel calls it, or by its module where that says nothing."""
    with contextlib.suppress(psutil.Error):
        name = str(process.name())
        words = read_command(process.pid).split()
        modules = [one for one in words if one in ("launcher", "gateway", "vllm")]
        return modules[0] if name.startswith("python") and modules else name
    return ""


def _is_marked(process: psutil.Process, folder: Path) -> bool:
    try:
        environment = Path(f"/proc/{process.pid}/environ").read_bytes()
    except OSError:
        return False
    return process.pid != os.getpid() and f"{_MARK}={folder}/".encode() in environment


def _parse_events(text: bytes) -> Iterator[dict[str, Any]]:
    for line in text.splitlines():
        with contextlib.suppress(ValueError):
            event = json.loads(line)
            if isinstance(event, dict):
                yield event
