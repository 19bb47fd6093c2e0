"""Whose CPU time it is, and that the probes find what they stand before."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator

import pytest

from lab.bench.relay.stage_clock import STAGES, StageClock, find_probed
from lab.paths import ROOT


class Time:
    """Goes on by what is done, and not by itself."""

    def __init__(self) -> None:
        self.now = 0

    def __call__(self) -> int:
        return self.now


@pytest.fixture
def sums() -> memoryview:
    return memoryview(bytearray(len(STAGES) * 8)).cast("q")


def test_time_in_a_probed_function_is_no_time_of_its_callers(sums: memoryview) -> None:
    time = Time()
    clock = StageClock(sums, time)

    def work(nanoseconds: int) -> None:
        time.now += nanoseconds

    inner = clock.probe(2, work)

    def call() -> str:
        work(1)
        inner(20)
        work(300)
        return "done"

    outer = clock.probe(1, call)
    work(4000)

    assert outer() == "done"
    assert list(sums[:3]) == [4000, 301, 20]


async def test_time_in_which_a_coroutine_waits_is_not_its_own(sums: memoryview) -> None:
    time = Time()
    clock = StageClock(sums, time)
    woken = asyncio.Event()

    async def wait() -> int:
        time.now += 1
        await woken.wait()
        time.now += 20
        return 7

    async def fail() -> None:
        raise ValueError("no")

    waiting = asyncio.create_task(_run(clock.probe(1, wait)))
    await asyncio.sleep(0)
    time.now += 300
    woken.set()

    assert await waiting == 7
    assert sums[1] == 21
    with pytest.raises(ValueError, match="no"):
        await clock.probe(2, fail)()


async def _run(function: object) -> object:
    return await function()  # type: ignore[operator]


def test_every_probe_finds_its_function() -> None:
    found = list(find_probed())

    assert {stage for stage, _, _ in found} == set(range(1, len(STAGES)))
    assert all(callable(getattr(owner, name)) for _, owner, name in found)


@pytest.mark.slow  # four programs
def test_stages_of_a_request_are_told_for_the_real_gateway() -> None:
    command = [sys.executable, "-m", "lab.bench.relay.stages", "chat", "--rounds", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)

    rows = dict(_read_rows(done.stdout))
    assert {"accept", "keys", "parse", "admit", "choose", "send", "read", "answer"} <= rows.keys()
    assert {"log", "metrics", "a gateway without probes"} <= rows.keys()


def _read_rows(table: str) -> Iterator[tuple[str, str]]:
    for line in table.splitlines()[2:]:
        _, name, number, _, _ = (cell.strip() for cell in line.split("|"))
        yield name, number
