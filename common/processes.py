"""CPU time of the processes under test: what a noisy machine cannot blur as it blurs the clock.

Read from each process's own CPU clock, which counts all its threads in nanoseconds;
/proc/PID/schedstat is as fine but counts the main thread alone.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

_PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")
_LOOPBACK = ("127.0.0.1", "localhost", "::1")
# Of /proc/stat's line `cpu`: all but idle and iowait, and the guests that user holds already.
_BUSY_COLUMNS = (0, 1, 2, 5, 6, 7)


@dataclass(frozen=True)
class CpuTime:
    """Seconds so far."""

    gateway_s: float
    engine_s: float

    def __sub__(self, earlier: CpuTime) -> CpuTime:
        return CpuTime(self.gateway_s - earlier.gateway_s, self.engine_s - earlier.engine_s)


class CpuMeter:
    """The trees of two processes of this machine."""

    def __init__(self, gateway_pid: int, engine_pid: int) -> None:
        self._roots = (gateway_pid, engine_pid)
        self._trees: tuple[list[int], list[int]] = ([], [])
        self.refresh()

    def refresh(self) -> None:
        """Looks for children again; a look through all of /proc, so not between two calls."""
        children = _read_children()
        gateway, engine = (find_tree(root, children) for root in self._roots)
        self._trees = (gateway, engine)

    def read(self) -> CpuTime:
        gateway, engine = self._trees
        return CpuTime(sum_cpu_s(gateway), sum_cpu_s(engine))

    def pids(self) -> list[int]:
        return [*self._trees[0], *self._trees[1]]


def build_meter(status: dict[str, Any], status_url: str) -> CpuMeter | None:
    """Of the processes that a launcher's /status names, if they are this machine's."""
    if urlsplit(status_url).hostname not in _LOOPBACK:
        return None
    pids = {}
    # A launcher in a container names its processes by numbers that mean others out here.
    for name, word in (("gateway", "gateway"), ("engine", "vllm")):
        pid = (status.get(name) or {}).get("pid")
        if not isinstance(pid, int) or word not in _read_command(pid):
            return None
        pids[name] = pid
    return CpuMeter(pids["gateway"], pids["engine"])


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


def find_tree(root: int, children: dict[int, list[int]] | None = None) -> list[int]:
    known = _read_children() if children is None else children
    found = [root]
    for pid in found:
        found += known.get(pid, [])
    return found


def _read_children() -> dict[int, list[int]]:
    children: dict[int, list[int]] = {}
    for folder in _PROC.iterdir():
        if folder.name.isdigit():
            try:
                text = (folder / "stat").read_text(errors="replace")
            except OSError:
                continue
            # pid (name) state parent …; the name may hold spaces and brackets.
            parent = int(text.rpartition(")")[2].split()[1])
            children.setdefault(parent, []).append(int(folder.name))
    return children


def _read_command(pid: int) -> str:
    try:
        return (_PROC / str(pid) / "cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


class Neighbours:
    """How much of the machine others took, from here until it is asked."""

    def __init__(self, ours: Iterable[int]) -> None:
        self._ours = [*ours, os.getpid()]
        self._started = time.monotonic()
        self._busy_s = _read_busy_s()
        self._own_s = sum_cpu_s(self._ours)

    def share(self) -> float:
        """0 to 1 of all cores."""
        elapsed_s = time.monotonic() - self._started
        others_s = _read_busy_s() - self._busy_s - (sum_cpu_s(self._ours) - self._own_s)
        cores = os.cpu_count() or 1
        return min(1.0, max(0.0, others_s / (elapsed_s * cores))) if elapsed_s else 0.0


def _read_busy_s() -> float:
    columns = (_PROC / "stat").read_text().splitlines()[0].split()[1:]
    return sum(int(columns[column]) for column in _BUSY_COLUMNS) / _TICKS_PER_S


def read_resident_mb(pid: int) -> float:
    for line in (_PROC / str(pid) / "status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0
