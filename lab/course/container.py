"""An image built and a container run by the `docker` command, with what each takes and says.

What is not here: what is asked of the container, and what that is worth.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.failures import LabFailure
from lab.paths import ROOT
from lab.readiness import Problem
from lab.reports.console import ProgressLine

PORT = 8000
NAME = "vllm-gateway-judged"
_QUICK_S = 60.0
_POLL_S = 0.5
_TAIL_LINES = 15


class NoDocker(LabFailure):
    """There is no docker to ask, or it refuses; says what it said."""


class BuildFailed(LabFailure):
    """The image was not built; `problem` says why."""

    def __init__(self, problem: Problem) -> None:
        super().__init__(problem.text)
        self.problem = problem


def build_image(
    tag: str, options: Sequence[str], limit_s: float, log_path: Path, progress: ProgressLine
) -> float:
    """Seconds. As the judge does it, this checkout's Dockerfile; all output goes to the log."""
    began = time.monotonic()
    command = ["docker", "build", "--progress=plain", "--tag", tag, *options, "."]
    with log_path.open("wb") as log:
        environment = {**os.environ, "DOCKER_BUILDKIT": "1"}
        process = _start(command, stdout=log, stderr=log, env=environment, cwd=ROOT)
        try:
            while process.poll() is None and (seconds := time.monotonic() - began) < limit_s:
                progress.working(f"building, {seconds:.0f} of {limit_s:g} s; log: {log_path}")
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(_POLL_S)
        finally:
            progress.close()
            is_late = process.poll() is None
            if is_late:
                process.terminate()
                process.wait()
    if is_late:
        raise BuildFailed(Problem("build_too_slow", f"not built within {limit_s:g} s"))
    if process.returncode:
        text = f"docker build ended with {process.returncode}; {log_path}:\n{_read_tail(log_path)}"
        raise BuildFailed(Problem("build_failed", text))
    return time.monotonic() - began


@dataclass(frozen=True)
class Container:
    """One that runs, and how it is reached."""

    url: str
    started: float
    log_path: Path

    def find_end(self) -> Problem | None:
        """Its end, asked for by nobody; or that its own health check has given it up."""
        state = self.read_state()
        if state["Running"] and self.read_health() != "unhealthy":
            return None
        said = f"ended with {state['ExitCode']}" if not state["Running"] else "is unhealthy"
        self.save_log()
        tail = _read_tail(self.log_path)
        return Problem("never_started", f"the container {said}; {self.log_path}:\n{tail}")

    def read_health(self) -> str:
        """Of its HEALTHCHECK: starting, healthy or unhealthy; empty where it has none."""
        return str((self.read_state().get("Health") or {}).get("Status", ""))

    def read_state(self) -> dict[str, Any]:
        state: dict[str, Any] = json.loads(_ask("inspect", NAME))[0]["State"]
        return state

    def save_log(self) -> None:
        with self.log_path.open("wb") as log:
            _start(["docker", "logs", NAME], stdout=log, stderr=log).wait()


@contextlib.contextmanager
def run_container(
    image: str, options: Sequence[str], log_path: Path, *, published: int | None
) -> Iterator[Container]:
    """While inside, on a network without a way out, unless its port is published: Docker can do
    that on no such network. What an earlier one left is removed first.
    """
    _remove()
    try:
        if published is None:
            _ask("network", "create", "--internal", NAME)
            network = ["--network", NAME]
        else:
            network = ["--publish", f"127.0.0.1:{published}:{PORT}"]
        started = time.monotonic()
        _ask("run", "--detach", "--name", NAME, *network, *options, image)
        url = f"http://127.0.0.1:{published}" if published else f"http://{_find_address()}:{PORT}"
        container = Container(url, started, log_path)
        try:
            yield container
        finally:
            container.save_log()
    finally:
        _remove()


def _find_address() -> str:
    networks = json.loads(_ask("inspect", NAME))[0]["NetworkSettings"]["Networks"]
    return str(networks[NAME]["IPAddress"])


def _remove() -> None:
    for words in (("rm", "--force", NAME), ("network", "rm", NAME)):
        with contextlib.suppress(NoDocker):
            _ask(*words)


def _ask(*words: str) -> str:
    process = _start(["docker", *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        out, err = process.communicate(timeout=_QUICK_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise NoDocker(f"docker {words[0]} takes over {_QUICK_S:.0f} s; does it work?") from None
    if process.returncode:
        raise NoDocker(f"docker {words[0]}: {err.decode('utf-8', 'replace').strip()}")
    return out.decode("utf-8", "replace")


def _start(command: Sequence[str], **options: Any) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(command, stdin=subprocess.DEVNULL, **options)
    except OSError as error:
        raise NoDocker(
            f"cannot run docker ({error.strerror}); install it, or grade a server: make grade"
        ) from None


def _read_tail(path: Path) -> str:
    return "\n".join(path.read_text(errors="replace").splitlines()[-_TAIL_LINES:])
