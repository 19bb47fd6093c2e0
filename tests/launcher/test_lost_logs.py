"""A launcher whose output goes nowhere, or who is killed: engine and gateway serve all the same."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import httpx
import pytest

from common.prometheus_text import parse_samples, sum_by_labels
from launcher.engine.polling import poll
from tests.launcher.programs import Launcher, running, wait_for
from tests.outputs import full_disk, full_pipe_nobody_reads
from tests.patience import PROGRAM_S
from tests.plain_http import NO_TLS

pytestmark = pytest.mark.programs


@contextlib.contextmanager
def reader_of_one_line() -> Iterator[int]:
    """As with `| head -1`."""
    reader, writer = os.pipe()
    head = subprocess.Popen(["/usr/bin/head", "-1"], stdin=reader, stdout=subprocess.DEVNULL)
    os.close(reader)
    yield writer
    os.close(writer)
    head.wait(PROGRAM_S)


@pytest.mark.parametrize("place", [full_disk, reader_of_one_line, full_pipe_nobody_reads])
def test_up_whose_output_goes_nowhere_serves_and_stops(
    tmp_path: Path, place: Callable[[], contextlib.AbstractContextManager[int]]
) -> None:
    settings = {"LAUNCHER_ENGINE_LOG": "all"}
    with place() as pipe:
        launcher = Launcher(tmp_path, "up", settings, fake="flood", pipe=pipe)
        with running(launcher):
            wait_for(lambda: is_ready(launcher), "it is ready")
            url = f"http://127.0.0.1:{launcher.port}/predict"
            for number in range(20):
                prompts = [f"one {number}", f"other {number}"]
                reply = httpx.post(url, json={"prompt": prompts}, trust_env=False, verify=NO_TLS)
                assert len(reply.json()["response"]) == 2
            if place is not full_pipe_nobody_reads:  # there, most is still waiting
                metrics = launcher.read("/metrics")
                assert metrics is not None
                lost = sum_by_labels(
                    parse_samples(metrics.text), "launcher_log_lines_dropped_total", "log"
                )
                assert lost[("shown",)] > 0
            assert launcher.stop() == 0
    assert launcher.processes() == []
    kept = sum(f.read_text().count("flood.py") for f in launcher.state.glob("engine.log*"))
    assert kept == 50_000


def is_ready(launcher: Launcher) -> bool:
    response = launcher.read("/readyz")
    return response is not None and response.status_code == httpx.codes.OK


def test_log_file_that_is_deleted_is_made_anew(tmp_path: Path) -> None:
    launcher = Launcher(tmp_path)
    log = launcher.state / "engine.log"
    with running(launcher):
        launcher.wait_state("ready")
        launcher.order(say="before")
        wait_for(lambda: "before" in log.read_text(), "the line is kept")
        log.unlink()
        launcher.order(say="after")
        wait_for(lambda: log.is_file() and "after" in log.read_text(), "a new file has the line")
        assert "before" not in log.read_text()
        assert launcher.stop() == 0


def test_up_launcher_killed_what_runs_and_waits_is_answered(tmp_path: Path) -> None:
    """A batch in several calls, one that waits its turn, a stream: as when it is told to stop."""
    settings = {
        "GATEWAY_MAX_RUNNING": "3",
        "GATEWAY_MAX_PROMPTS_PER_CALL": "1",
        "LAUNCHER_DRAIN_TIMEOUT_S": "30",
    }
    launcher = Launcher(tmp_path, "up", settings)

    def has_some() -> bool:
        return bool(launcher.order().get("running", 0) >= 3)

    async def scenario() -> list[httpx.Response]:
        url = f"http://127.0.0.1:{launcher.port}"
        async with httpx.AsyncClient(
            base_url=url, trust_env=False, timeout=30, verify=NO_TLS
        ) as client:
            stream = {"prompt": "s", "stream": True, "model": "demo"}
            calls = [
                client.post("/v1/completions", json=stream),
                client.post("/predict", json={"prompt": ["a", "b"]}),
                client.post("/predict", json={"prompt": ["c", "d"]}),
                client.post("/predict", json={"prompt": "e"}),
            ]
            tasks = [asyncio.ensure_future(call) for call in calls]
            async with asyncio.timeout(20):
                await poll(partial(asyncio.to_thread, has_some), pause_s=0.02)
            launcher.send(signal.SIGKILL)
            return await asyncio.gather(*tasks)

    with running(launcher):
        wait_for(lambda: is_ready(launcher), "it is ready")
        launcher.order(delay_s=3)
        stream, *batches = asyncio.run(scenario())
        assert stream.text.endswith("data: [DONE]\n\n")
        assert [batch.status_code for batch in batches] == [200, 200, 200]
        assert ["errors" in batch.json() for batch in batches] == [False] * 3
        launcher.wait()
        wait_for(lambda: not launcher.processes(), "engine and gateway end")
