"""A server of the lab's own: `python -m launcher up` while inside, and stopped whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from lab.readiness import Problem
from lab.reports.console import ProgressLine
from launcher.engine.process import bind_to_parent

_STOP_TIMEOUT_S = 120.0
_TAIL_LINES = 12


@dataclass(frozen=True)
class LaunchCommand:
    """What is to be started; `serve` has no gateway. `options` go to the launcher as they are."""

    host: str
    port: int
    model: str = ""
    options: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    command: Literal["up", "serve"] = "up"

    def words(self) -> list[str]:
        """The engine's port and the status page's come after the gateway's, unless said."""
        words = [self.command, "--host", self.host, "--port", str(self.port)]
        for above, name in enumerate(("engine", "status"), start=1):
            if f"LAUNCHER_{name.upper()}_PORT" not in os.environ:
                words += [f"--{name}-port", str(self.port + above)]
        return [*words, *(["--model", self.model] if self.model else []), *self.options]

    def describe(self) -> str:
        """What a person would type."""
        return " ".join(["-m launcher", *self.words()])


@dataclass(frozen=True)
class LaunchedServer:
    """A launcher at work."""

    process: subprocess.Popen[bytes]
    log_path: Path
    name: str = "launcher"

    def find_end(self) -> Problem | None:
        """Its end, if it has ended: asked for by nobody."""
        code = self.process.poll()
        if code is None:
            return None
        tail = "\n".join(self.log_path.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
        return Problem(
            "never_started", f"the {self.name} ended with {code}; {self.log_path}:\n{tail}"
        )


@contextlib.contextmanager
def launch(
    command: LaunchCommand, log_path: Path, progress: ProgressLine
) -> Iterator[LaunchedServer]:
    """While inside; then it is asked to stop and waited for, whatever happened inside."""
    progress.say(f"starting {command.describe()}; its log is {log_path}")
    with launch_program("launcher", command.words(), command.environment, log_path) as launched:
        yield launched


@contextlib.contextmanager
def launch_program(
    name: str, words: Sequence[str], environment: Mapping[str, str], log_path: Path
) -> Iterator[LaunchedServer]:
    """A program of this project. It stops in its own time, too, if this process is killed. Linux
    ties that to the thread that starts it, so that must be the main one.
    """
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            bind_to_parent(name, *words, kill_s=_STOP_TIMEOUT_S),
            stdout=log,
            stderr=log,
            env={**os.environ, **environment},
            # Ctrl-C is for this program alone; it stops the other in its own time.
            start_new_session=True,
        )
        try:
            yield LaunchedServer(process, log_path, name)
        finally:
            stop_process(process, _STOP_TIMEOUT_S)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # its watcher, whose work is done


def stop_process(process: subprocess.Popen[bytes], timeout_s: float) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
