"""The real thing: `launcher up` with the real vLLM and the demo model, once a test run."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from common.ports import find_free_ports
from tests.collector import Collector, run_collector
from tests.launcher.programs import Launcher
from tests.launcher.programs import running as running_launcher
from tests.patience import ENGINE_S, PROGRAM_S
from tests.plain_http import NO_TLS

ROOT = Path(__file__).parent.parent.parent


@dataclass(frozen=True)
class Stack:
    """A running engine and gateway."""

    gateway: str
    engine: str
    start_s: float
    log: Path
    status: str

    def predict(self, prompt: object, **fields: object) -> httpx.Response:
        body = {"prompt": prompt, **fields}
        return httpx.post(f"{self.gateway}/predict", json=body, timeout=300, verify=NO_TLS)


@pytest.fixture(scope="session")
def pairs() -> list[dict[str, str]]:
    """The demo's questions and answers."""
    lines = (ROOT / "demo" / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="session")
def collector() -> Iterator[Collector]:
    """Where engine and gateway send their spans, in a thread that outlives every test's loop."""
    with run_collector() as running:
        yield running


@pytest.fixture(scope="session")
def stack(tmp_path_factory: pytest.TempPathFactory, collector: Collector) -> Iterator[Stack]:
    folder = tmp_path_factory.mktemp("stack")
    environment = {
        "GATEWAY_GRADE_RECORD": str(ROOT / "docs" / "results" / "grade-demo.json"),
        "GATEWAY_RESPONSES_DATABASE": str(folder / "responses.sqlite"),
    }
    flags = ["--otlp-endpoint", collector.url, "--engine-log", "requests"]
    with start_stack(folder, *flags, **environment) as running:
        yield running


@pytest.fixture(scope="session")
def stock_launcher(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Launcher]:
    """Of `stock`; it gives up when its engine dies, as no test waits for another one."""
    settings = {
        "LAUNCHER_SET": "scheduler-cls=",
        "LAUNCHER_RESTART_LIMIT": "0",
        "LAUNCHER_KILL_TIMEOUT_S": "15",
    }
    launcher = Launcher(tmp_path_factory.mktemp("stock"), settings=settings, fake=None)
    with running_launcher(launcher):
        yield launcher


@pytest.fixture(scope="module")
def stock(stock_launcher: Launcher) -> Launcher:
    """A second engine of the demo model, with vLLM's own scheduler and without a gateway; started
    once a test run, and again after a module that has killed it.
    """
    assert stock_launcher.process is not None
    if stock_launcher.process.poll() is not None:
        stock_launcher.start()
    stock_launcher.wait_state("ready", within_s=ENGINE_S)
    return stock_launcher


@contextlib.contextmanager
def start_stack(folder: Path, *flags: str, **variables: str) -> Iterator[Stack]:
    """`launcher up` with these flags, until the end of the block."""
    port, engine_port, status_port = find_free_ports(3)
    command = [sys.executable, "-m", "launcher", "up", "--port", str(port)]
    command += ["--engine-port", str(engine_port), "--status-port", str(status_port), *flags]
    environment = os.environ | {"XDG_STATE_HOME": str(folder), **variables}
    log_path = folder / "up.log"
    started = time.monotonic()
    with log_path.open("wb") as log:
        process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, env=environment)
        try:
            gateway = f"http://127.0.0.1:{port}"
            _wait_ready(gateway, process, log_path)
            start_s = time.monotonic() - started
            status = f"http://127.0.0.1:{status_port}"
            yield Stack(gateway, f"http://127.0.0.1:{engine_port}", start_s, log_path, status)
        finally:
            process.send_signal(signal.SIGTERM)
            code = process.wait(timeout=PROGRAM_S)
    assert code == 0, log_path.read_text()[-3000:]


def _wait_ready(gateway: str, process: subprocess.Popen[bytes], log_path: Path) -> None:
    deadline = time.monotonic() + ENGINE_S
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if httpx.get(f"{gateway}/readyz", verify=NO_TLS).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    pytest.fail(f"the stack is not ready:\n{log_path.read_text()[-3000:]}")
