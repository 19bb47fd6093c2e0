"""When a program that does not answer hangs, and when it only waits for a core."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest

from launcher.engine.hang_detector import SilenceDetector

_LIMIT_S = 0.4
_LOOK_S = 60.0
_SPIN, _SLEEP = "while True: pass", "import time\ntime.sleep(600)"


@contextlib.contextmanager
def program(code: str) -> Iterator[subprocess.Popen[bytes]]:
    """Once it runs."""
    command = [sys.executable, "-c", f"print(flush=True)\n{code}"]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        try:
            yield process
        finally:
            process.kill()


async def never() -> bool:
    await asyncio.Event().wait()
    return True


async def always() -> bool:
    return True


async def test_stopped_program_hangs() -> None:
    with program(_SPIN) as process:
        process.send_signal(signal.SIGSTOP)
        async with asyncio.timeout(_LOOK_S):
            verdict = await SilenceDetector(_LIMIT_S, process.pid, never).run()
    assert verdict.startswith("no answer and no work for ")
    assert verdict.endswith("(state T)")


async def test_program_that_sleeps_and_does_not_answer_hangs() -> None:
    with program(_SLEEP) as process:
        async with asyncio.timeout(_LOOK_S):
            verdict = await SilenceDetector(_LIMIT_S, process.pid, never).run()
    assert verdict.endswith("(state S)")


@pytest.mark.programs
async def test_program_that_computes_and_does_not_answer_hangs() -> None:
    with program(_SPIN) as process:
        async with asyncio.timeout(_LOOK_S):
            verdict = await SilenceDetector(_LIMIT_S, process.pid, never).run()
    assert verdict == "no answer within 0 s of work"


@pytest.mark.programs
@pytest.mark.parametrize("code", [_SLEEP, _SPIN])
async def test_program_that_answers_does_not_hang(code: str) -> None:
    with program(code) as process, pytest.raises(TimeoutError):
        async with asyncio.timeout(3 * _LIMIT_S):
            await SilenceDetector(_LIMIT_S, process.pid, always).run()


@pytest.mark.programs
async def test_program_that_gets_no_core_does_not_hang() -> None:
    core = min(os.sched_getaffinity(0))
    with program(_SPIN) as busy, program(_SPIN) as starved:
        for process in (busy, starved):
            os.sched_setaffinity(process.pid, {core})
        os.sched_setscheduler(starved.pid, os.SCHED_IDLE, os.sched_param(0))
        with pytest.raises(TimeoutError):
            async with asyncio.timeout(5 * _LIMIT_S):
                await SilenceDetector(_LIMIT_S, starved.pid, never).run()
