"""What a soak does to the processes of the service, and what it sees of the gateway's."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
from dataclasses import dataclass

import psutil

from common import processes
from lab.service import open_http, read_launcher

_MIB = 2**20
# Which process, which signal, and whether it goes on by itself after some seconds.
FAULTS: dict[str, tuple[str, signal.Signals, float]] = {
    "kill-core": ("core", signal.SIGKILL, 0.0),
    "kill-engine": ("engine", signal.SIGKILL, 0.0),
    "stop-core": ("core", signal.SIGSTOP, 0.0),
    "pause-core": ("core", signal.SIGSTOP, 5.0),
    "kill-gateway": ("gateway", signal.SIGKILL, 0.0),
}


@dataclass(frozen=True)
class ProcessSample:
    """What a process holds."""

    memory_mb: float
    sockets: int
    files: int
    threads: int


def take_sample(pid: int) -> ProcessSample | None:
    try:
        process = psutil.Process(pid)
        with process.oneshot():
            memory_mb = processes.read_resident_bytes(pid) / _MIB
            files, threads = process.num_fds(), process.num_threads()
        return ProcessSample(memory_mb, processes.count_sockets(pid), files, threads)
    except psutil.Error:
        return None


async def find_programs(status_url: str) -> dict[str, int]:
    """The processes of this machine that serve; the launcher is who started the gateway."""
    found = {name: await find_pid(status_url, name) for name in ("gateway", "engine", "core")}
    pids = {name: pid for name, pid in found.items() if pid}
    with contextlib.suppress(psutil.Error, KeyError):
        parent = psutil.Process(pids["gateway"]).ppid()
        if "launcher" in processes.read_command(parent):
            pids["launcher"] = parent
    return pids


async def find_pid(status_url: str, program: str) -> int | None:
    """By the launcher's status; the engine's `core` is a child of its server, by name."""
    if not status_url:
        return None
    async with open_http() as client:
        launcher = await read_launcher(status_url, client)
    if program != "core":
        return launcher.pid(program)
    engine = launcher.pid("engine")
    members = processes.find_session(engine) if engine else []
    cores = (one.pid for one in members if "EngineCore" in processes.read_command(one.pid))
    return next(cores, None)


async def strike(pid: int, fault: str) -> None:
    _, number, pause_s = FAULTS[fault]
    os.kill(pid, number)
    if pause_s:
        await asyncio.sleep(pause_s)
        os.kill(pid, signal.SIGCONT)
