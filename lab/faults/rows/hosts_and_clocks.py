"""Replicas that die, a clock that jumps, a GPU that is gone."""

from __future__ import annotations

import asyncio
import os
import signal

from lab.faults.experiment import Experiment
from lab.faults.fault import GONE, Fault, Signs, Strike
from lab.faults.service import NotHere
from lab.faults.stores import GPU_TOOL

_JUMP_LASTS_S = 5.0
_TWO_HOURS_S = 7200
_AWAY_S = 4.0


async def start_replicas(at: Experiment) -> None:
    """Two, with one storage for batches; callers turn to both."""
    storage = {"GATEWAY_BATCH_FOLDER": str(at.folder / "batches"), "GATEWAY_BATCH_LEASE_S": "3"}
    for _ in range(2):
        await at.start_beside(at.service.engine_url, variables=storage)
    at.load.has_jobs = True


async def kill_replica(at: Experiment) -> None:
    """One of them; after some seconds another is started in its place."""
    os.kill(at.beside[0].pid, signal.SIGKILL)
    await asyncio.sleep(_AWAY_S)
    at.beside[0].start()
    await at.wait_ready(at.beside[0], at.beside[0].url)
    at.lift()


async def start_gateway_with_clock(at: Experiment) -> None:
    """Its wall clock is the host's, and what a file adds."""
    set_clock(at, 0)
    storage = {"GATEWAY_BATCH_FOLDER": str(at.folder / "batches"), "GATEWAY_BATCH_LEASE_S": "3"}
    await at.start_beside(at.service.engine_url, clock=at.folder / "clock", variables=storage)
    at.load.has_jobs = True


def jump(by_s: int) -> Strike:
    """The clock, and back again."""

    async def strike(at: Experiment) -> None:
        set_clock(at, by_s)
        await asyncio.sleep(_JUMP_LASTS_S)
        set_clock(at, 0)
        at.lift()

    return strike


def set_clock(at: Experiment, by_s: int) -> None:
    """Whole or not at all: the gateway reads it all the time."""
    part = at.folder / "clock.part"
    part.write_text(str(by_s), encoding="ascii")
    part.replace(at.folder / "clock")


async def lose_gpu(at: Experiment) -> None:
    """As after a GPU's fall: the core dies, and nvidia-smi hangs when the crash card asks."""
    tool = at.stores.gpu_tool
    if not tool.is_used:
        raise NotHere("the service was given by its address: it has an nvidia-smi of its own")
    at.exits.callback(tool.answer)
    tool.hang()
    os.kill(await at.service.find("core"), signal.SIGKILL)


FAULTS = (
    Fault(
        "replica-killed",
        "one of two gateways with one storage is killed, and another started in its place",
        kill_replica,
        Signs("", "TargetDown"),
        "beside",
        allows=GONE,
        prepare=start_replicas,
    ),
    Fault(
        "clock-forward",
        "the gateway's clock jumps two hours ahead, and back",
        jump(_TWO_HOURS_S),
        Signs(),
        "beside",
        prepare=start_gateway_with_clock,
    ),
    Fault(
        "clock-back",
        "the gateway's clock jumps two hours back, and ahead again",
        jump(-_TWO_HOURS_S),
        Signs(),
        "beside",
        prepare=start_gateway_with_clock,
    ),
    Fault(
        "gpu-lost",
        "the core dies and nvidia-smi hangs, as after a GPU's fall (a stand-in)",
        lose_gpu,
        Signs("engine_crashed", "EngineDown"),
        needs=(GPU_TOOL,),
    ),
)
