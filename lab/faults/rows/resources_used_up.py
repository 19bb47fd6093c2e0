"""What a machine runs out of: disks, file handles, memory; and a clock that jumps."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from common.prometheus_text import sum_samples
from lab.faults.experiment import Experiment
from lab.faults.fault import Fault, Signs, Strike
from lab.faults.service import NotHere, poll_until
from lab.faults.stores import DISK, POSTGRES, Disk

_LASTS_S = 5.0
_NEEDED_S = 40.0
_SPARE_FILES = 2
_SLOW_US = 400_000
_DISK_CALLS = "fsync,fdatasync,openat,pwrite64,rename,unlink"
# Where control groups of memory are made, and the file with a group's limit: version 1 and 2.
_GROUPS = {
    Path("/sys/fs/cgroup/memory"): "memory.limit_in_bytes",
    Path("/sys/fs/cgroup"): "memory.max",
}
_MORE_BYTES = 2**12
_DEATH_S = 30.0


async def fill_batch_disk(at: Experiment) -> None:
    disk = _find(at.stores.batch_disk)
    try:
        disk.fill()
        await _wait_needed(at)
    finally:
        disk.empty()
    at.lift()


async def fill_state_disk(at: Experiment) -> None:
    disk = _find(at.stores.state_disk)
    try:
        disk.fill()
        await asyncio.sleep(_LASTS_S)
    finally:
        disk.empty()
    at.lift()


async def _wait_needed(at: Experiment) -> None:
    """Until a batch has wanted to write, and some seconds more."""
    before = await _count_failures(at)

    async def was_needed() -> bool:
        return await _count_failures(at) > before

    await at.wait(was_needed, _NEEDED_S)
    await asyncio.sleep(_LASTS_S)


async def _count_failures(at: Experiment) -> float:
    return sum_samples(await at.read_samples(), "gateway_batch_storage_failures_total")


async def make_batch_disk_read_only(at: Experiment) -> None:
    disk = _find(at.stores.batch_disk)

    async def is_read_only() -> bool:
        return disk.refuse_writes()

    if not await poll_until(is_read_only, 20.0, pause_s=0.01):
        raise NotHere("somebody always has a file of it open for writing")
    try:
        await _wait_needed(at)
    finally:
        disk.take_writes()
    at.lift()


async def slow_disk(at: Experiment) -> None:
    """The gateway's calls of the kernel that touch a disk return late."""
    pid = await at.service.find("gateway")
    inject = f"inject={_DISK_CALLS}:delay_enter={_SLOW_US}"
    words = ("strace", "-f", "-qq", "-o", os.devnull, "-e", inject, "-p", str(pid))
    tracer = await asyncio.create_subprocess_exec(*words, stderr=subprocess.PIPE)
    try:
        await asyncio.sleep(_LASTS_S)
        if tracer.returncode is not None and tracer.stderr:
            said = (await tracer.stderr.read()).decode(errors="replace")
            raise NotHere(f"strace may not attach: {said.strip()}")
    finally:
        if tracer.returncode is None:
            tracer.send_signal(signal.SIGINT)
            await tracer.wait()
    at.lift()


def use_up_files(program: str) -> Strike:
    """It may open a few more than it has open; what it has is left to it."""

    async def strike(at: Experiment) -> None:
        pid = await at.service.find(program)
        number = _count_files(pid) + _SPARE_FILES
        with _limit(pid, resource.RLIMIT_NOFILE, number):
            await asyncio.sleep(_LASTS_S)
        at.lift()

    return strike


def _count_files(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


@contextmanager
def _limit(pid: int, kind: int, number: int) -> Iterator[None]:
    before = resource.prlimit(pid, kind)
    resource.prlimit(pid, kind, (number, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, kind, before)


async def use_up_memory(at: Experiment) -> None:
    """The engine's core is in a group of its own that may take hardly more than it has."""
    pid = await at.service.find("core")
    group = _make_group()
    at.exits.callback(_remove_group, group)
    try:
        (group / _GROUPS[group.parent]).write_text(str(_MORE_BYTES))
        (group / "cgroup.procs").write_text(str(pid))
    except OSError as error:
        raise NotHere(f"a control group takes no limit here: {error.strerror}") from None

    async def has_died() -> bool:
        try:
            return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
        except psutil.NoSuchProcess:
            return True

    if not await poll_until(has_died, _DEATH_S):
        raise NotHere("the core takes no more memory than it has")


def _make_group() -> Path:
    """What a process has when it comes is not counted in it."""
    why = "no control groups"
    for folder in _GROUPS:
        group = folder / f"faults-{os.getpid()}"
        if not (folder / "cgroup.procs").exists():
            continue
        try:
            group.mkdir()
        except OSError as error:
            why = error.strerror or str(error)
        else:
            return group
    raise NotHere(f"no control group of memory can be made here: {why}")


def _remove_group(group: Path) -> None:
    for pid in (group / "cgroup.procs").read_text().split():
        (group.parent / "cgroup.procs").write_text(pid)
    group.rmdir()


def _find(disk: Disk | None) -> Disk:
    if disk is None:
        raise NotHere("the service has no disk of its own")
    return disk


_BATCHES_WAIT = Signs("batch_waits", "BatchStorageAway")

FAULTS = (
    Fault(
        "disk-full",
        "the disk of files and batches is full until a batch needs it, and 5 s more",
        fill_batch_disk,
        _BATCHES_WAIT,
        needs=(DISK,),
    ),
    Fault(
        "disk-read-only",
        "the disk of files and batches takes no writes until a batch needs it, and 5 s more",
        make_batch_disk_read_only,
        _BATCHES_WAIT,
        # SQLite has files open for writing at all times.
        needs=(DISK, POSTGRES),
    ),
    Fault(
        "disk-slow",
        "each call of the disk of files and batches takes 0.4 s longer",
        slow_disk,
        Signs(),
        needs=(DISK, "strace"),
    ),
    Fault(
        "log-disk-full",
        "the disk of the launcher's logs and records is full for 5 s",
        fill_state_disk,
        Signs(),
        needs=(DISK,),
    ),
    Fault(
        "files-of-gateway",
        "the gateway has as many files open as it may",
        use_up_files("gateway"),
        # Who comes to new connections waits; too few calls fail to call anybody.
        Signs(runbook="ErrorRate", panel="overview: Errors by code"),
    ),
    Fault(
        "files-of-engine",
        "the engine's API server has as many files open as it may",
        use_up_files("engine"),
        # Connections that are open are enough; only new ones would fail.
        Signs(runbook="BreakerOpen", panel="overview: Failed engine calls and retries"),
    ),
    Fault(
        "memory-of-core",
        "the engine's core reaches the memory limit of its control group",
        use_up_memory,
        Signs("engine_crashed", "EngineDown"),
    ),
)
