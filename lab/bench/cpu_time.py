"""CPU time of the processes under test: what a noisy machine cannot blur as it blurs the clock."""

from __future__ import annotations

import os
import time
from collections.abc import Iterable

from common import processes
from lab.service import LauncherStatus


class CpuMeter:
    """The trees of two processes of this machine."""

    def __init__(self, gateway_pid: int, engine_pid: int) -> None:
        self._roots = (gateway_pid, engine_pid)
        self.refresh()

    def refresh(self) -> None:
        """Looks for children again; not between two measured calls."""
        self._gateway, self._engine = map(processes.find_tree, self._roots)

    def read(self) -> tuple[float, float]:
        """Seconds so far, of the gateway and of the engine."""
        return processes.sum_cpu_s(self._gateway), processes.sum_cpu_s(self._engine)

    def pids(self) -> list[int]:
        return [*self._gateway, *self._engine]


def build_meter(launcher: LauncherStatus) -> CpuMeter | None:
    """Of the processes that a launcher's /status names, if they are this machine's."""
    gateway = launcher.find_local_pid("gateway", "gateway")
    engine = launcher.find_local_pid("engine", "vllm")
    return CpuMeter(gateway, engine) if gateway and engine else None


class Neighbours:
    """How much of the machine others took, from here until it is asked."""

    def __init__(self, ours: Iterable[int]) -> None:
        self._ours = [*ours, os.getpid()]
        self._started = time.monotonic()
        self._busy_s = processes.read_busy_s()
        self._own_s = processes.sum_cpu_s(self._ours)

    def share(self) -> float:
        """0 to 1 of all cores."""
        elapsed_s = time.monotonic() - self._started
        own_s = processes.sum_cpu_s(self._ours) - self._own_s
        others_s = processes.read_busy_s() - self._busy_s - own_s
        cores = os.cpu_count() or 1
        return min(1.0, max(0.0, others_s / (elapsed_s * cores))) if elapsed_s else 0.0
