"""Processes of the service killed and stopped, singly and in pairs."""

from __future__ import annotations

import asyncio
import os
import signal
import time

from lab.faults.experiment import Experiment
from lab.faults.fault import GONE, Fault, Signs, Strike

_START_LIMIT_S = 150.0
_PAUSE_S = 4.0


def send(number: signal.Signals, *programs: str) -> Strike:
    """To all of them at once."""

    async def strike(experiment: Experiment) -> None:
        for pid in [await experiment.service.find(one) for one in programs]:
            os.kill(pid, number)

    return strike


def pause(program: str) -> Strike:
    """It goes on by itself, before anybody has taken it for hung."""

    async def strike(experiment: Experiment) -> None:
        pid = await experiment.service.find(program)
        os.kill(pid, signal.SIGSTOP)
        experiment.exits.callback(os.kill, pid, signal.SIGCONT)
        await asyncio.sleep(_PAUSE_S)
        os.kill(pid, signal.SIGCONT)
        experiment.lift()

    return strike


async def kill_gateway_in_start(experiment: Experiment) -> None:
    """The engine is killed, and the gateway as soon as the next one starts."""
    os.kill(await experiment.service.find("core"), signal.SIGKILL)

    async def is_starting() -> bool:
        return await experiment.read_state("engine") == "starting"

    await experiment.wait(is_starting)
    os.kill(await experiment.service.find("gateway"), signal.SIGKILL)


async def kill_launcher(experiment: Experiment) -> None:
    """And another one started when all has ended, as systemd does."""
    service = experiment.service
    service.send(signal.SIGKILL)
    await experiment.wait(service.is_gone, _START_LIMIT_S)
    ended_s = time.monotonic() - experiment.began_at
    experiment.notes.append(f"nothing was left of it after {ended_s:.1f} s")
    service.start()
    await experiment.wait_ready(service, service.url, _START_LIMIT_S)


_KILL, _STOP = signal.SIGKILL, signal.SIGSTOP
_CRASHED = Signs("engine_crashed", "EngineDown")
# The launcher ends a hang by a restart, before an alert for one could fire.
_HUNG = Signs("engine_hung", "EngineDown", "NoTokens", "engine: Generation throughput")
_GATEWAY_GONE = Signs("gateway_crashed", "TargetDown")
# The gateway is back long before the engine.
_BOTH_GONE = Signs("gateway_crashed", "EngineDown")

FAULTS = (
    Fault("kill-core", "the engine's core is killed", send(_KILL, "core"), _CRASHED),
    Fault("kill-engine", "the engine's API server is killed", send(_KILL, "engine"), _CRASHED),
    Fault(
        "kill-core-and-engine",
        "core and API server are killed at once",
        send(_KILL, "core", "engine"),
        _CRASHED,
    ),
    Fault("pause-core", "the core stands still for 4 s", pause("core"), Signs("", "NoTokens")),
    Fault("stop-core", "the core stands still for good", send(_STOP, "core"), _HUNG),
    Fault("stop-engine", "the API server stands still for good", send(_STOP, "engine"), _HUNG),
    Fault(
        "kill-gateway",
        "the gateway is killed",
        send(_KILL, "gateway"),
        _GATEWAY_GONE,
        allows=GONE,
    ),
    Fault(
        "stop-gateway",
        "the gateway stands still for good",
        send(_STOP, "gateway"),
        Signs("gateway_hung", "TargetDown"),
        allows=GONE,
    ),
    Fault(
        "kill-engine-and-gateway",
        "API server and gateway are killed at once",
        send(_KILL, "engine", "gateway"),
        _BOTH_GONE,
        allows=GONE,
    ),
    Fault(
        "kill-gateway-in-start",
        "the core is killed, and the gateway while the next engine starts",
        kill_gateway_in_start,
        _BOTH_GONE,
        allows=GONE,
    ),
    Fault(
        "pause-launcher",
        "the launcher stands still for 4 s",
        pause("launcher"),
        Signs("", "TargetDown"),
    ),
    Fault(
        "kill-launcher",
        "the launcher is killed, and started again when nothing is left of it",
        kill_launcher,
        Signs("launcher_started", "TargetDown"),
        allows=GONE,
        limit_s=240.0,
    ),
)
