"""The launcher as people start it, over the fake vLLM or the real one; and what it leaves."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from common.ports import find_free_ports
from common.project import DEMO_MODEL
from launcher.config import LauncherSettings
from launcher.engine.process import list_group
from tests.patience import PROGRAM_S
from tests.plain_http import NO_TLS

ROOT = Path(__file__).parents[2]
FAKE_VLLM = Path(__file__).parent / "fake_vllm"
MODEL = DEMO_MODEL
_PLAIN: dict[str, Any] = {"trust_env": False, "verify": NO_TLS}


def wait_for(check: Callable[[], Any], what: str, *, within_s: float = PROGRAM_S) -> Any:
    deadline = time.monotonic() + within_s
    while time.monotonic() < deadline:
        if found := check():
            return found
        time.sleep(0.05)
    raise AssertionError(f"not within {within_s} s: {what}")


def share_vllm_cache(folder: Path) -> None:
    """Of `make serve` too: the real vLLM takes 8 s to look at a model's class, in an empty one."""
    shared, own = LauncherSettings().cache_path / "vllm", folder / "cache" / "vllm"
    shared.mkdir(parents=True, exist_ok=True)
    own.parent.mkdir(parents=True, exist_ok=True)
    own.symlink_to(shared)


@dataclass
class Launcher:
    """One `python -m launcher …`, its ports, its files."""

    folder: Path
    command: str = "serve"
    settings: dict[str, str] = field(default_factory=dict)
    fake: str | None = ""
    arguments: tuple[str, ...] = ()
    path: str = ""
    pipe: int | None = None  # for both its outputs, instead of files
    within: tuple[str, ...] = ()  # what starts it elsewhere: `ip netns exec …`

    def __post_init__(self) -> None:
        self.port, self.engine_port, self.status_port = find_free_ports(3)
        self.state = self.folder / "state"
        self.process: subprocess.Popen[bytes] | None = None
        if self.fake is None:
            share_vllm_cache(self.folder)

    def environment(self) -> dict[str, str]:
        kept = {k: v for k, v in os.environ.items() if not k.startswith(("LAUNCHER_", "GATEWAY_"))}
        own = {
            "LAUNCHER_MODEL": str(MODEL),
            "LAUNCHER_PORT": str(self.port),
            "LAUNCHER_ENGINE_PORT": str(self.engine_port),
            "LAUNCHER_STATUS_PORT": str(self.status_port),
            "LAUNCHER_STATE_DIR": str(self.state),
            "LAUNCHER_CACHE_DIR": str(self.folder / "cache"),
            "LAUNCHER_RESTART_DELAY_S": "0.05",
            "LAUNCHER_KILL_TIMEOUT_S": "1",
            "LAUNCHER_DRAIN_TIMEOUT_S": "5",
            "LAUNCHER_LOG_FORMAT": "console",
            "PYTHONDONTWRITEBYTECODE": "1",
            "STARTED_BY_TEST_IN": f"{self.folder}/",  # of no meaning: `processes` looks for it
        }
        if self.fake is not None:
            own |= {"FAKE_VLLM": self.fake, "PYTHONPATH": f"{self.path}{FAKE_VLLM}:{ROOT}"}
        return {**kept, **own, **self.settings}

    def start(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        argv = [*self.within, sys.executable, "-m", "launcher", self.command, *self.arguments]
        with (self.folder / "out").open("ab") as out, (self.folder / "err").open("ab") as err:
            own = (out, err) if self.pipe is None else (self.pipe, self.pipe)
            self.process = subprocess.Popen(
                argv, cwd=ROOT, env=self.environment(), stdout=own[0], stderr=own[1]
            )

    def wait(self, *, within_s: float = PROGRAM_S) -> int:
        assert self.process is not None
        return self.process.wait(within_s)

    def send(self, number: signal.Signals) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def stop(self) -> int:
        self.send(signal.SIGTERM)
        return self.wait()

    @property
    def out(self) -> str:
        return (self.folder / "out").read_text()

    @property
    def err(self) -> str:
        return (self.folder / "err").read_text()

    @property
    def engine_url(self) -> str:
        return f"http://127.0.0.1:{self.engine_port}"

    def read(self, path: str) -> httpx.Response | None:
        with contextlib.suppress(httpx.HTTPError):
            return httpx.get(f"http://127.0.0.1:{self.status_port}{path}", **_PLAIN)
        return None

    def status(self) -> dict[str, Any]:
        response = self.read("/status")
        none = {"engine": {"state": "none", "restarts": {}}}
        return dict(response.json()) if response else none

    def wait_state(
        self, state: str, *, restarts: int = 0, within_s: float = PROGRAM_S
    ) -> dict[str, Any]:
        def check() -> dict[str, Any] | None:
            status = self.status()
            engine = status["engine"]
            is_there = engine["state"] == state and sum(engine["restarts"].values()) >= restarts
            return status if is_there else None

        try:
            return dict(wait_for(check, f"engine {state} after {restarts}", within_s=within_s))
        except AssertionError as error:
            raise AssertionError(f"{error}; it said:\n{self.err[-4000:]}") from None

    def order(self, **what: Any) -> dict[str, Any]:
        with contextlib.suppress(httpx.HTTPError):
            return dict(httpx.post(f"{self.engine_url}/fake", json=what, **_PLAIN).json())
        return {}

    def crash_card(self) -> dict[str, Any]:
        response = self.read("/crash")
        assert response is not None
        return dict(response.json())

    def processes(self) -> list[str]:
        """Whatever it started and left alive: the test's own folder is in their environment."""
        found = []
        for entry in Path("/proc").iterdir():
            with contextlib.suppress(OSError):
                is_ours = f"={self.folder}/".encode() in (entry / "environ").read_bytes()
                if entry.name.isdigit() and is_ours:
                    found.append(f"{entry.name} {(entry / 'comm').read_text().strip()}")
        return found


@contextlib.contextmanager
def running(launcher: Launcher) -> Iterator[Launcher]:
    """Started; and ended with everything it started, whatever the test did."""
    launcher.start()
    try:
        yield launcher
    finally:
        assert launcher.process is not None
        if launcher.process.poll() is None:
            launcher.send(signal.SIGTERM)
            try:
                launcher.process.wait(PROGRAM_S)
            except subprocess.TimeoutExpired:
                launcher.process.kill()
                launcher.process.wait()
        for group in list_sessions(launcher):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(group, signal.SIGKILL)


def list_sessions(launcher: Launcher) -> set[int]:
    """Groups that records of this launcher still name."""
    groups = set()
    for record in launcher.state.glob("*.json"):
        with contextlib.suppress(ValueError, KeyError, OSError):
            groups.add(int(json.loads(record.read_text())["group"]))
    return groups


def members_of(group: int) -> list[int]:
    return [member.pid for member in list_group(group)]


async def ask_many(
    url: str, count: int, *, max_tokens: int = 32, model: str = "demo"
) -> httpx.Response:
    body = {
        "model": model,
        "prompt": [f"question {n}" for n in range(count)],
        "max_tokens": max_tokens,
        "temperature": 0,
        "ignore_eos": True,
    }
    async with httpx.AsyncClient(**_PLAIN, timeout=120) as client:
        return await client.post(f"{url}/v1/completions", json=body)


def ask_in_background(
    url: str, count: int, *, max_tokens: int = 32, model: str = "demo"
) -> asyncio.Task[httpx.Response]:
    return asyncio.create_task(ask_many(url, count, max_tokens=max_tokens, model=model))
