"""Figures of this machine's processes: CPU time, memory, children, sockets; what this one gives
back of its memory, and how it is told to stop.

/proc is read by psutil, but for one clock: psutil gives CPU time in ticks of 10 ms, and a process's
own CPU clock counts all its threads in nanoseconds (/proc/PID/schedstat: the main thread alone).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import psutil

_M_MMAP_THRESHOLD = -3  # of <malloc.h>
_MAPPED_BYTES = 2**20
_BUSY = ("user", "nice", "system", "irq", "softirq", "steal")


def read_cpu_s(pid: int) -> float:
    """A Linux process's CPU clock has the number that its id makes; see clock_getcpuclockid."""
    return time.clock_gettime_ns((~pid << 3) | 2) / 1e9


def sum_cpu_s(pids: Iterable[int]) -> float:
    total = 0.0
    for pid in pids:
        try:
            total += read_cpu_s(pid)
        except OSError:  # it has ended
            continue
    return total


def read_thread_runs(pid: int) -> tuple[int, int] | None:
    """Of the main thread alone: how often a core has taken it up, and its nanoseconds there. None
    where the kernel does not tell.
    """
    try:
        words = Path(f"/proc/{pid}/schedstat").read_text(encoding="ascii").split()
    except OSError:
        return None
    return int(words[2]), int(words[0])


def find_tree(root: int) -> list[int]:
    """The process and all below it; a look at every process, so not between two measured calls."""
    try:
        return [root, *(child.pid for child in psutil.Process(root).children(recursive=True))]
    except psutil.Error:
        return [root]


def find_session(leader: int) -> list[psutil.Process]:
    """Of those that a process started with a session of its own: itself and what it started."""
    found = []
    for process in psutil.process_iter():
        try:
            if os.getsid(process.pid) == leader:
                found.append(process)
        except OSError:
            continue
    return found


def read_command(pid: int) -> str:
    try:
        return " ".join(psutil.Process(pid).cmdline())
    except psutil.Error:
        return ""


def read_resident_bytes(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


def read_shared_bytes(process: psutil.Process) -> int:
    """Its share of what is resident: pages of several processes count once among them."""
    try:
        return int(process.memory_full_info().pss)
    except psutil.Error:
        return 0


def count_sockets(pid: int) -> int:
    return len(psutil.Process(pid).net_connections(kind="all"))


def read_busy_s() -> float:
    """Seconds that all cores together have worked so far."""
    times = psutil.cpu_times()
    return sum(float(getattr(times, name)) for name in _BUSY)


def map_large_blocks() -> None:
    """A freed block that was mapped by itself goes back to the system at once. glibc raises the
    size from which it maps to that of the largest such block, and then keeps the next bodies of
    megabytes in its heap, in pieces, for good. Other libraries of C have no such calls.
    """
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, _MAPPED_BYTES)


def return_freed_memory() -> None:
    """Of smaller blocks, which one that is in use keeps from going back with those around it."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


@contextlib.contextmanager
def told_of_stop(tell: Callable[[], None]) -> Iterator[None]:
    """Each SIGINT or SIGTERM calls it, in the loop that runs."""
    loop = asyncio.get_running_loop()
    numbers = (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, tell)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)
