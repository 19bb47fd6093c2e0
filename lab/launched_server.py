"""The server under judgement, when the grader starts it itself: `python -m launcher up`."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

from common.json_text import mend, parse_json
from lab.grade.judge import Problem
from launcher.engine.process import bind_to_parent

_STOP_TIMEOUT_S = 120.0
_TAIL_LINES = 12
_QUICK_TIMEOUT_S = 2.0


@dataclass(frozen=True)
class Order:
    """What is to be started. `options` go to the launcher as they are."""

    host: str
    port: int
    model: str = ""
    options: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)

    def command(self) -> list[str]:
        """What a person would type."""
        return [sys.executable, "-m", "launcher", *self.words()]

    def words(self) -> list[str]:
        """The engine's port and the status page's come after the gateway's, unless said."""
        command = ["up"]
        ports = {"host": self.host, "port": self.port}
        ports |= {"engine-port": self.port + 1, "status-port": self.port + 2}
        for name, value in ports.items():
            is_said = f"LAUNCHER_{name.upper().replace('-', '_')}" in os.environ
            if name in ("host", "port") or not is_said:
                command += [f"--{name}", str(value)]
        if self.model:
            command += ["--model", self.model]
        return [*command, *self.options]


@dataclass(frozen=True)
class Started:
    """A launcher at work."""

    process: subprocess.Popen[bytes]
    log_path: Path

    def find_end(self) -> Problem | None:
        """Its end, if it has ended: asked for by nobody."""
        code = self.process.poll()
        if code is None:
            return None
        tail = "\n".join(self.log_path.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
        return Problem("never_started", f"the launcher ended with {code}; {self.log_path}:\n{tail}")


@contextlib.contextmanager
def start_server(order: Order, log_path: Path) -> Iterator[Started]:
    """While inside; then it is asked to stop and waited for, whatever happened inside.

    On a leash: it stops in its own time, too, if this process is killed. Linux ties a leash to the
    thread that starts, so that must be the main one.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            bind_to_parent("launcher", *order.words(), kill_s=_STOP_TIMEOUT_S),
            stdout=log,
            stderr=log,
            env={**os.environ, **order.environment},
            # Ctrl-C is for the grader alone; it stops the launcher in its own time.
            start_new_session=True,
        )
        try:
            yield Started(process, log_path)
        finally:
            _stop(process)


@contextlib.contextmanager
def ended_by_sigterm() -> Iterator[None]:
    """SIGTERM as Ctrl-C: the server that was started is stopped on the way out."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(_STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)  # the leash's watcher, whose work is done


def is_anyone_there(url: str) -> bool:
    """Whether something answers HTTP at this address, ready or not."""
    try:
        with httpx.stream("GET", f"{url}/healthz", timeout=_QUICK_TIMEOUT_S, trust_env=False):
            return True
    except httpx.ReadTimeout:
        return True
    except httpx.HTTPError:
        return False


async def read_model(url: str, client: httpx.AsyncClient) -> str:
    """The served model's name, if the server has /v1/models."""
    with contextlib.suppress(LookupError, TypeError):
        answer = await _read(f"{url}/v1/models", client)
        return mend(str(answer["data"][0]["id"]))
    return ""


async def read_engine(status_url: str, client: httpx.AsyncClient) -> dict[str, Any]:
    """What the launcher says of its engine; empty where there is none to ask."""
    with contextlib.suppress(LookupError, TypeError, ValueError):
        status = await _read(f"{status_url}/status", client)
        seconds = status["engine"]["start_seconds"]
        return {
            "profile": mend(str(status["profile"])),
            "device": mend(str(status["device"])),
            "vllm": mend(str(status["versions"]["vllm"])),
            "fingerprint": mend(str(status["fingerprint"]["name"])),
            "start_seconds": None if seconds is None else float(seconds),
        }
    return {}


async def _read(url: str, client: httpx.AsyncClient) -> Any:
    """None of what is not there, no JSON, or too slow."""
    with contextlib.suppress(httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError):
        async with asyncio.timeout(_QUICK_TIMEOUT_S):
            return parse_json((await client.get(url, timeout=_QUICK_TIMEOUT_S)).content)
    return None
