"""The service of a run: an engine under its launcher, and a gateway whose event loop is watched."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from common.ports import find_free_row
from common.project import DEMO_MODEL
from lab.fuzz.cases.case import KEY
from lab.fuzz.survival import Watched
from lab.launched_server import LaunchCommand, LaunchedServer, launch, launch_program
from lab.paths import OUT
from lab.readiness import Problem, wait_ready
from lab.reports.console import ProgressLine
from lab.service import open_http

MAX_BODY_BYTES = 1_000_000  # else each case beyond it would have to send 32 MiB
_HOST = "127.0.0.1"
_READY_S = 600.0
_WATCHED_GATEWAY = "lab.fuzz.loop_watch"


def start(
    folder: Path, options: Sequence[str], exits: ExitStack, progress: ProgressLine
) -> Watched:
    """On free ports, until `exits` are closed; what it keeps lies in the folder."""
    port = find_free_row(3)
    url, engine_url, status_url = (f"http://{_HOST}:{port + above}" for above in range(3))
    own = {
        "LAUNCHER_ENGINE_PORT": str(port + 1),
        "LAUNCHER_STATUS_PORT": str(port + 2),
        "LAUNCHER_STATE_DIR": os.environ.get("LAUNCHER_STATE_DIR", str(folder / "state")),
    }
    command = LaunchCommand(_HOST, port, options=options, environment=own, command="serve")
    engine = exits.enter_context(launch(command, OUT / "fuzz-engine.log", progress))
    words = ["--host", _HOST, "--port", str(port), "--engines", engine_url]
    model = os.environ.get("LAUNCHER_MODEL", str(DEMO_MODEL))
    words += ["--launchers", status_url, "--tokenizer", model]
    words += ["--log-format", "json", "--max-body-bytes", str(MAX_BODY_BYTES)]
    words += ["--responses-database", str(folder / "responses.sqlite")]
    words += ["--batch-folder", str(folder / "batches")]
    blocks, log = folder / "blocks.jsonl", OUT / "fuzz-gateway.log"
    gateway = exits.enter_context(
        launch_program(_WATCHED_GATEWAY, [str(blocks), *words], {"GATEWAY_API_KEYS": KEY}, log)
    )
    asyncio.run(_wait_ready(url, (engine, gateway), progress))
    return Watched(url, status_url, gateway.process.pid, log, blocks)


async def _wait_ready(url: str, programs: Sequence[LaunchedServer], progress: ProgressLine) -> None:
    def find_end() -> Problem | None:
        return next(filter(None, (one.find_end() for one in programs)), None)

    async with open_http() as client:
        await wait_ready(url, client, progress, _READY_S, find_end)
