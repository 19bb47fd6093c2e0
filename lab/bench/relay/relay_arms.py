"""The programs that are compared, started on free ports and ended again: engine, relay, gateway."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from common.ports import find_free_ports
from lab.bench.bench_figures import BenchFailed
from lab.bench.relay.peers import Contender, build_gateway_command
from lab.bench.relay.relay_connection import RelayConnection
from lab.launched_server import stop_process
from lab.paths import OUT

_READY_TIMEOUT_S = 60.0
_STOP_TIMEOUT_S = 20.0


@dataclass(frozen=True)
class RelayArms:
    """The ports by arm, and the relays' process ids. The first two arms are one and the same."""

    ports: dict[str, int]
    pids: dict[str, int]


@contextlib.asynccontextmanager
async def start_arms(contenders: Sequence[Contender] = ()) -> AsyncIterator[RelayArms]:
    engine, plain, gateway = find_free_ports(3)
    url = f"http://127.0.0.1:{engine}"
    log_path = OUT / "bench-relay.log"
    log_path.parent.mkdir(exist_ok=True)
    stand_in = "lab.bench.relay.stand_in_engine"
    with ExitStack() as exits:
        log = exits.enter_context(log_path.open("wb"))
        engine_process = start_program(exits, log, 0, stand_in, "engine", "--port", str(engine))
        words = ("plain", "--port", str(plain), "--url", url)
        ports = {"plain": plain, "gateway": gateway}
        relays = {
            "plain": start_program(exits, log, 1, stand_in, *words),
            "gateway": start_command(exits, log, 1, build_gateway_command(url, gateway)),
        }
        for one in contenders:
            ports[one.name], metrics = find_free_ports(2)
            command = one.build_command(url, ports[one.name], metrics)
            relays[one.name] = start_command(exits, log, 1, command, one.folder)
        # This process beside the stand-in, away from the relays.
        cores = os.sched_getaffinity(0)
        exits.callback(os.sched_setaffinity, 0, cores)
        os.sched_setaffinity(0, {min(cores)})
        for port in (engine, *ports.values()):
            if not await is_answering(port, [engine_process, *relays.values()]):
                raise BenchFailed(f"the relay comparison did not start; see {log_path}")
        pids = {arm: process.pid for arm, process in relays.items()}
        yield RelayArms({"direct": engine, "control": engine} | ports, pids)


def start_program(
    exits: ExitStack,
    log: IO[bytes],
    core: int,
    module: str,
    *words: str,
    under: Sequence[str] = (),
) -> subprocess.Popen[bytes]:
    """Under another program, if one is named."""
    return start_command(exits, log, core, [*under, sys.executable, "-m", module, *words])


def start_command(
    exits: ExitStack, log: IO[bytes], core: int, command: Sequence[str], folder: Path | None = None
) -> subprocess.Popen[bytes]:
    """On a core of its own where there are two; ended on the way out."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith("GATEWAY_")}
    process = subprocess.Popen(command, stdout=log, stderr=log, env=kept, cwd=folder)
    exits.callback(stop_process, process, _STOP_TIMEOUT_S)
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) > 1:
        os.sched_setaffinity(process.pid, {cores[core]})
    return process


async def is_answering(
    port: int,
    processes: Sequence[subprocess.Popen[bytes]],
    timeout_s: float = _READY_TIMEOUT_S,
) -> bool:
    """Waited for, unless one of the programs has ended."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, BenchFailed):
            connection = await RelayConnection.connect(port)
            await connection.ask(1)
            await connection.close()
            return True
        await asyncio.sleep(0.1)
    return False
