"""Several processes on one port: the parent starts them, brings a dead one back, stops them all.

It serves nothing itself. The workers share the port (the kernel spreads connections over them), one
ledger for limits and one folder for metrics.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

import structlog
from prometheus_client.multiprocess import mark_process_dead

from gateway.admission.ledger import make_ledger_file
from gateway.config import Settings, Worker

log = structlog.get_logger("gateway")
_SHORTEST_LIFE_S = 5.0
_LONGEST_PAUSE_S = 30.0


async def run_workers(settings: Settings, arguments: list[str]) -> int:
    """Until a signal; then every worker drains. 1 if the workers cannot even start."""
    stop = asyncio.Event()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop.set)
    with tempfile.TemporaryDirectory(prefix="vllm-gateway-") as name:
        folder = Path(name)
        make_ledger_file(folder)
        count, parent = settings.workers, os.getpid()
        workers = [Worker(index, count, folder, parent) for index in range(count)]
        keepers = [asyncio.create_task(_keep(worker, arguments, stop)) for worker in workers]
        codes = await asyncio.gather(*keepers)
    return max(codes)


async def _keep(worker: Worker, arguments: list[str], stop: asyncio.Event) -> int:
    """One worker's place: filled until told to stop."""
    failures = 0
    while True:
        started = time.monotonic()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            "-m",
            "gateway",
            *arguments,
            env=os.environ | worker.environment(),
            # A Ctrl-C reaches the parent alone, which drains in order. It is not a session: whoever
            # started the parent in one ends all of us by it.
            process_group=0,
        )
        code = await _watch(process, stop)
        mark_process_dead(process.pid, str(worker.folder))  # type: ignore[no-untyped-call]
        if stop.is_set():
            return code
        if code == 2:
            stop.set()  # bad settings do not get better
            return code
        lived_s = time.monotonic() - started
        failures = failures + 1 if lived_s < _SHORTEST_LIFE_S else 0
        log.error("worker_died", worker=worker.index, code=code, lived_s=round(lived_s, 1))
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), min(0.1 * 2**failures, _LONGEST_PAUSE_S))
            return 0


async def _watch(process: asyncio.subprocess.Process, stop: asyncio.Event) -> int:
    exited = asyncio.create_task(process.wait())
    stopped = asyncio.create_task(stop.wait())
    await asyncio.wait((exited, stopped), return_when=asyncio.FIRST_COMPLETED)
    stopped.cancel()
    if not exited.done():
        process.send_signal(signal.SIGTERM)
    return await exited
