"""Replicas that die, a clock that jumps, a GPU that is gone."""

from __future__ import annotations

import asyncio
import os
import signal
from pathlib import Path

from lab.faults.experiment import Experiment
from lab.faults.fault import GONE, Fault, Signs, Strike
from lab.faults.rows.starts_and_ends import NEVER_READY
from lab.faults.service import NotHere

_LIBRARY = "libfaketimeMT.so.1"
_JUMP_LASTS_S = 5.0
_AWAY_S = 4.0
_NVIDIA_SMI = """#!/bin/sh
# The plan sees a card, and whoever asks later sees none.
[ -e {gone} ] && {{ echo "No devices were found" >&2; exit 6; }}
case "$*" in
  *compute_cap*) echo "NVIDIA H200, 143771, 0, 9.0, 580.65"; touch {gone};;
  *) exit 6;;
esac
"""


async def start_replicas(at: Experiment) -> None:
    """Two, with one storage for batches; callers turn to both."""
    storage = {"GATEWAY_BATCH_FOLDER": str(at.folder / "batches"), "GATEWAY_BATCH_LEASE_S": "3"}
    for _ in range(2):
        await at.start_beside(at.service.engine_url, **storage)
    at.load.has_jobs = True


async def kill_replica(at: Experiment) -> None:
    """One of them; after some seconds another is started in its place."""
    os.kill(at.beside[0].pid, signal.SIGKILL)
    await asyncio.sleep(_AWAY_S)
    at.beside[0].start()
    await at.wait_ready(at.beside[0], at.beside[0].url)
    at.lift()


def find_library() -> Path | None:
    return next(Path("/usr/lib").glob(f"*/faketime/{_LIBRARY}"), None)


async def start_gateway_with_clock(at: Experiment) -> None:
    """Its clock is the host's, and what a file adds."""
    library = find_library()
    if library is None:
        raise NotHere("no libfaketime here; your distribution's package has it")
    clock = at.folder / "clock"
    clock.write_text("+0", encoding="ascii")
    variables = {
        "LD_PRELOAD": str(library),
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",
        "GATEWAY_BATCH_FOLDER": str(at.folder / "batches"),
        "GATEWAY_BATCH_LEASE_S": "3",
    }
    await at.start_beside(at.service.engine_url, **variables)
    at.load.has_jobs = True


def jump(by: str) -> Strike:
    """The clock, and back again."""

    async def strike(at: Experiment) -> None:
        clock = at.folder / "clock"
        clock.write_text(by, encoding="ascii")
        await asyncio.sleep(_JUMP_LASTS_S)
        clock.write_text("+0", encoding="ascii")
        at.lift()

    return strike


async def lose_gpu(at: Experiment) -> None:
    """A stand-in of nvidia-smi shows a card to the plan alone; vLLM finds none."""
    program = at.folder / "nvidia-smi"
    program.write_text(_NVIDIA_SMI.format(gone=at.folder / "gone"), encoding="ascii")
    program.chmod(0o755)
    at.service.environment["PATH"] = f"{at.folder}:{os.environ['PATH']}"
    at.service.start()
    at.load.start()
    at.exit_code = await at.service.wait_ended(within_s=150.0)
    at.notes.append(at.service.read_tail(1))


FAULTS = (
    Fault(
        "replica-killed",
        "one of two gateways with one storage is killed, and another started in its place",
        kill_replica,
        Signs("batch_taken_over", "TargetDown"),
        "beside",
        allows=GONE,
        prepare=start_replicas,
    ),
    Fault(
        "clock-forward",
        "the gateway's clock jumps two hours ahead, and back",
        jump("+2h"),
        Signs(),
        "beside",
        prepare=start_gateway_with_clock,
    ),
    Fault(
        "clock-back",
        "the gateway's clock jumps two hours back, and ahead again",
        jump("-2h"),
        Signs(),
        "beside",
        prepare=start_gateway_with_clock,
    ),
    Fault(
        "gpu-lost",
        "the GPU is gone between the plan and the engine's start",
        lose_gpu,
        Signs("engine_crashed", "EngineCrashLoop"),
        "own",
        allows=GONE,
        ends_with=NEVER_READY,
        limit_s=200.0,
    ),
)
