"""The programs that are compared, started on free ports and ended again: engine, relay, gateway."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack
from dataclasses import dataclass

from common.ports import find_free_ports
from lab.bench.bench_figures import BenchFailed
from lab.bench.relay.relay_connection import RelayConnection
from lab.launched_server import stop_process
from lab.paths import OUT

_READY_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class RelayArms:
    """The ports by arm, and the relays' process ids."""

    ports: dict[str, int]
    pids: dict[str, int]


@contextlib.asynccontextmanager
async def start_arms() -> AsyncIterator[RelayArms]:
    engine, plain, gateway = find_free_ports(3)
    url = f"http://127.0.0.1:{engine}"
    flags = ["--port", str(gateway), "--engines", url, "--prompt-style", "raw"]
    flags += ["--warmup-prompts", "1", "--log-format", "json"]
    with ExitStack() as stack:
        start = _RelayPrograms(stack)
        start("lab.bench.relay.stand_in_engine", 0, "engine", "--port", str(engine))
        plain_pid = start(
            "lab.bench.relay.stand_in_engine", 1, "plain", "--port", str(plain), "--url", url
        )
        gateway_pid = start("gateway", 1, *flags)
        stack.enter_context(_pinned(0))
        for port in (engine, plain, gateway):
            await start.wait_answering(port)
        ports = {"direct": engine, "control": engine, "plain": plain, "gateway": gateway}
        yield RelayArms(ports, {"plain": plain_pid, "gateway": gateway_pid})


class _RelayPrograms:
    """Starts programs, each on a core of its own where there are two."""

    def __init__(self, stack: ExitStack) -> None:
        self._stack = stack
        self._log = OUT / "bench-relay.log"
        self._log.parent.mkdir(exist_ok=True)
        self._file = stack.enter_context(self._log.open("wb"))
        self._processes: list[subprocess.Popen[bytes]] = []

    def __call__(self, module: str, core: int, *words: str) -> int:
        kept = {k: v for k, v in os.environ.items() if not k.startswith("GATEWAY_")}
        process = subprocess.Popen(
            [sys.executable, "-m", module, *words],
            stdout=self._file,
            stderr=self._file,
            env=kept,
        )
        self._stack.callback(stop_process, process, _STOP_TIMEOUT_S)
        self._processes.append(process)
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) > 1:
            os.sched_setaffinity(process.pid, {cores[core]})
        return process.pid

    async def wait_answering(self, port: int) -> None:
        deadline = time.monotonic() + _READY_TIMEOUT_S
        while time.monotonic() < deadline:
            if any(process.poll() is not None for process in self._processes):
                break
            with contextlib.suppress(OSError, asyncio.IncompleteReadError, BenchFailed):
                connection = await RelayConnection.connect(port)
                await connection.ask(1)
                await connection.close()
                return
            await asyncio.sleep(0.1)
        raise BenchFailed(f"the relay comparison did not start; see {self._log}")


@contextlib.contextmanager
def _pinned(core: int) -> Iterator[None]:
    """This process beside the stand-in, away from the relays."""
    before = os.sched_getaffinity(0)
    cores = sorted(before)
    os.sched_setaffinity(0, {cores[core]})
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
