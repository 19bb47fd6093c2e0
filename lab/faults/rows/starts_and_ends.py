"""Starts that cannot succeed, and ends at every stage: each with its documented exit code."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import time
from contextlib import closing

from aiohttp import web

from lab.faults.experiment import Experiment
from lab.faults.fault import GONE, Fault, Signs, Strike
from lab.faults.service import Service, poll_until

_ASKED, _BAD_SETTINGS, _CRASH_LOOP = 0, 2, 4
_REFUSAL_S = 60.0
_START_S = 150.0


async def take_port(at: Experiment) -> None:
    """Somebody else listens where the gateway is to."""
    with closing(socket.socket()) as other:
        other.bind(("127.0.0.1", at.service.port))
        other.listen()
        at.service.start()
        at.exit_code = await at.service.wait_ended(_REFUSAL_S)
    at.notes.append(at.service.read_tail(1))


async def start_second_launcher(at: Experiment) -> None:
    """With the same ports and folder as the one that serves."""
    second = Service(at.folder, at.service.environment, port=at.service.port)
    at.exits.push_async_callback(second.close)
    second.start()
    code = await second.wait_ended(_REFUSAL_S)
    at.notes.append(f"it ended with {code}: {second.read_tail(1)}")
    if code != _BAD_SETTINGS:
        at.problems.append(f"the second ended with {code} instead of {_BAD_SETTINGS}")
    at.lift()


def terminate_in(state: str) -> Strike:
    """While the engine is in this state; callers ask already."""

    async def strike(at: Experiment) -> None:
        async def is_there() -> bool:
            return await at.read_state("engine") == state

        at.service.start()
        at.load.start()
        await at.wait(is_there, _START_S)
        at.note_in_flight()
        at.service.send(signal.SIGTERM)
        at.exit_code = await at.service.wait_ended()

    return strike


async def terminate_in_download(at: Experiment) -> None:
    """While the model comes from a hub that has stopped answering."""
    asked = asyncio.Event()

    async def hang(_: web.Request) -> web.Response:
        asked.set()
        await asyncio.Event().wait()
        return web.Response()

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", hang)
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=0.1)
    await runner.setup()
    at.exits.push_async_callback(runner.cleanup)
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    hub = f"http://127.0.0.1:{runner.addresses[0][1]}"
    folder = str(at.folder / "hub")
    at.service.environment |= {"HF_ENDPOINT": hub, "HF_HOME": folder, "HF_HUB_OFFLINE": "0"}
    at.service.words = [*at.service.words, "--model", "nobody/nothing"]
    at.service.start()
    async with asyncio.timeout(_REFUSAL_S):
        await asked.wait()
    at.service.send(signal.SIGTERM)
    at.exit_code = await at.service.wait_ended()


async def crash_in_loop(at: Experiment) -> None:
    """More often than it may: here, at all."""
    at.service.environment["LAUNCHER_RESTART_LIMIT"] = "0"
    at.service.start()
    await at.wait_ready(at.service, at.service.url, _START_S)
    at.load.start()
    await at.wait_at_work()
    os.kill(await at.service.find("core"), signal.SIGKILL)
    at.exit_code = await at.service.wait_ended()


async def terminate_at_work(at: Experiment) -> None:
    """Once: what runs is finished first, and nobody else is let in."""
    at.load.closing_from = time.monotonic()
    at.service.send(signal.SIGTERM)
    at.exit_code = await at.service.wait_ended()


async def terminate_in_drain(at: Experiment) -> None:
    """Twice: the second ends everything at once."""
    at.service.send(signal.SIGTERM)

    async def is_draining() -> bool:
        return any(one.get("event") == "gateway_draining" for one in at.service.read_events())

    if not await poll_until(is_draining, _REFUSAL_S):
        at.problems.append("it did not drain")
    at.service.send(signal.SIGTERM)
    at.exit_code = await at.service.wait_ended()


_STOPPED = Signs("launcher_stopped", "TargetDown")

FAULTS = (
    Fault(
        "port-taken",
        "somebody else listens at the gateway's port when the launcher starts",
        take_port,
        Signs("", "TargetDown"),
        "own",
        ends_with=_BAD_SETTINGS,
    ),
    Fault(
        "second-launcher",
        "a second launcher is started on the ports and the folder of the one that serves",
        start_second_launcher,
        Signs(),
    ),
    Fault(
        "term-in-download",
        "SIGTERM while the model is fetched from a hub that hangs",
        terminate_in_download,
        Signs("", "TargetDown"),
        "own",
        ends_with=_ASKED,
    ),
    Fault(
        "term-in-start",
        "SIGTERM while the engine starts",
        terminate_in("starting"),
        _STOPPED,
        "own",
        allows=GONE,
        ends_with=_ASKED,
    ),
    Fault(
        "term-in-warm-up",
        "SIGTERM while the engine answers its first batch",
        terminate_in("warming"),
        _STOPPED,
        "own",
        allows=GONE,
        ends_with=_ASKED,
        limit_s=200.0,
    ),
    Fault(
        "crash-loop",
        "the core is killed where no crash is forgiven (LAUNCHER_RESTART_LIMIT=0)",
        crash_in_loop,
        Signs("engine_crashed", "EngineCrashLoop"),
        "own",
        allows=GONE,
        ends_with=_CRASH_LOOP,
        limit_s=240.0,
    ),
    Fault(
        "term-at-work",
        "SIGTERM while callers of all kinds are served",
        terminate_at_work,
        _STOPPED,
        allows=("refused",),
        ends_with=_ASKED,
    ),
    Fault(
        "term-in-drain",
        "a second SIGTERM while running requests are finished",
        terminate_in_drain,
        _STOPPED,
        allows=GONE,
        ends_with=_ASKED,
    ),
)
