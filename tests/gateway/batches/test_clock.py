"""A clock that jumps an hour: no batch ends too early or too late for it, no line is lost or
answered twice, nothing is thrown away that is still to be kept.
"""

from __future__ import annotations

import asyncio
import importlib.util
import itertools
import os
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from gateway.batches import coordinator
from gateway.batches.access import BATCHES
from gateway.storage.clock import SteadyClock
from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.batches.conftest import Postgres, ask, open_batches, open_sdk, until
from tests.gateway.batches.test_jobs import check_counts, read_answers
from tests.gateway.batches.test_takeover import check_answers, start, wait_completed
from tests.gateway.conftest import serve_gateway
from tests.gateway.process import serve_process

HOUR_S = 3600.0
BOTH_WAYS = pytest.mark.parametrize("jump_s", [HOUR_S, -HOUR_S])


@dataclass
class Host:
    """Its two clocks."""

    wall_s: float = 1_000_000.0
    passed_s: float = 0.0

    def pass_by(self, seconds: float) -> None:
        self.wall_s += seconds
        self.passed_s += seconds

    def open(self) -> SteadyClock:
        return SteadyClock(lambda: self.wall_s, lambda: self.passed_s)


def test_clock_that_does_not_jump_is_followed() -> None:
    host = Host()
    clock = host.open()
    for _ in range(100):
        host.pass_by(60)
        host.wall_s += 0.05  # slewed by a time server
    assert clock.now() == pytest.approx(host.wall_s, abs=0.01)


@BOTH_WAYS
def test_jump_is_made_up_slowly_and_time_runs_on(jump_s: float) -> None:
    host = Host()
    clock = host.open()
    seen = [clock.now()]
    host.wall_s += jump_s
    for _ in range(600):
        host.pass_by(60)
        seen.append(clock.now())

    steps = [later - earlier for earlier, later in itertools.pairwise(seen)]
    assert steps[0] == pytest.approx(66 if jump_s > 0 else 54)
    assert min(steps) > 50
    assert max(steps) < 70
    assert seen[-1] == pytest.approx(host.wall_s)


@BOTH_WAYS
async def test_batch_and_files_outlive_a_jump(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, jump_s: float
) -> None:
    """Half an hour was theirs."""
    monkeypatch.setattr(coordinator, "_SWEEP_S", 0.05)
    sweeps = count_sweeps(monkeypatch)
    engine, may_go_on = Behaviour(), asyncio.Semaphore(0)
    options: dict[str, Any] = {"batch_folder": tmp_path / "kept", "batch_retention_days": 1 / 48}
    async with serve_gateway(engine, **options) as served, open_batches(served) as batches:
        engine.slots = may_go_on
        own = await batches.upload([ask(100)])
        batch_id = await batches.create([ask(n) for n in range(20)], completion_window="30m")
        await until(lambda: engine.calls)
        served.app[BATCHES].clock.wall = lambda: time.time() + jump_s
        before = len(sweeps)
        await until(lambda: len(sweeps) > before + 2)
        for _ in range(20):
            may_go_on.release()
        batch = await batches.wait(batch_id)
        good = await batches.read(batch.output_file_id)
        left = [file.id async for file in batches.sdk.files.list()]

    assert batch.status == "completed"
    assert read_answers(good) == {f"line-{n}": f"answer:question {n}" for n in range(20)}
    check_counts(batch, good, [])
    assert len(engine.calls) == 20
    assert {own, batch.input_file_id, batch.output_file_id} <= set(left)
    assert batch.created_at <= batch.in_progress_at <= batch.completed_at


def test_clock_that_nobody_had_set_is_left_behind_at_once() -> None:
    host = Host()
    host.wall_s = 60.0  # since 1970
    clock = host.open()
    host.wall_s = 2e9
    host.pass_by(1)

    assert clock.now() == pytest.approx(2e9 + 1)


async def test_batch_made_after_a_jump_has_its_whole_time_for_whoever_starts_later(
    tmp_path: Path,
) -> None:
    """The slow clock is a day behind: a machine was asleep."""
    options: dict[str, Any] = {"batch_folder": tmp_path / "kept"}
    async with serve_gateway(**options) as served, open_batches(served) as batches:
        served.app[BATCHES].clock.wall = lambda: time.time() + 90_000
        batch = await batches.wait(await batches.create([ask(n) for n in range(3)]))
        kept = await batches.sdk.files.retrieve(batch.input_file_id)

    now = time.time() + 90_000
    assert batch.created_at == pytest.approx(now, abs=60)
    assert batch.expires_at is not None
    assert batch.expires_at > now + 86_000
    assert kept.expires_at is not None
    assert kept.expires_at > now


def count_sweeps(monkeypatch: pytest.MonkeyPatch) -> list[None]:
    sweeps: list[None] = []
    sweep: Callable[..., Any] = coordinator.Coordinator._sweep

    async def count(self: coordinator.Coordinator) -> None:
        await sweep(self)
        sweeps.append(None)

    monkeypatch.setattr(coordinator.Coordinator, "_sweep", count)
    return sweeps


@pytest.fixture
def faketime(tmp_path: Path) -> tuple[Path, list[str]]:
    """A file with how far a process's clock is off, and what starts one that looks there."""
    if platform.machine() != "x86_64":
        pytest.skip("the package libfaketime is built for x86-64")
    # Debian 12 has one too, under which no process can sleep.
    spec = importlib.util.find_spec("libfaketime")
    folder = Path(spec.origin).parent if spec and spec.origin else None
    found = sorted(folder.rglob("libfaketime.so.1")) if folder else []
    if not found:
        message = "libfaketime is not here (pip install libfaketime)"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    offset = tmp_path / "offset"
    offset.write_text("+0\n")
    variables = {
        "LD_PRELOAD": found[0],
        "FAKETIME_TIMESTAMP_FILE": offset,
        "FAKETIME_NO_CACHE": 1,
        "FAKETIME_DONT_FAKE_MONOTONIC": 1,  # no kernel lets that one jump
        "NO_FAKE_STAT": 1,
    }
    return offset, ["env", *(f"{name}={value}" for name, value in variables.items())]


@pytest.mark.slow
@BOTH_WAYS
async def test_line_is_answered_once_by_a_process_whose_clock_jumps(
    tmp_path: Path, postgres: Postgres, faketime: tuple[Path, list[str]], jump_s: float
) -> None:
    """Beside another gateway, which would take its batch over."""
    lines, engine = 300, Behaviour()
    offset, wrapper = faketime
    for name in "ab":
        (tmp_path / name).mkdir()
    flags = [f"--batch-folder={tmp_path}", f"--batch-database={postgres.make_database()}"]
    flags.append("--batch-lease-s=3")
    async with (
        serve_app(build_fake_engine(engine)) as url,
        serve_process(tmp_path / "a", url, *flags, wrapper=wrapper) as first,
        open_sdk(first.url) as sdk,
    ):
        engine.calls.clear()
        engine.slots = may_run = asyncio.Semaphore(0)
        batch_id = await start(sdk, lines, completion_window="30m")
        await until(lambda: engine.calls)
        engine.slots = None  # for the other's warm-up; what waits, waits
        async with serve_process(tmp_path / "b", url, *flags) as second:
            await asyncio.to_thread(offset.write_text, f"{jump_s:+.0f}\n")
            await until(lambda: "clock_jumped" in first.read_log())
            for _ in range(lines):
                may_run.release()
            batch = await wait_completed(sdk, batch_id)
            await check_answers(sdk, batch, lines)
            log = first.read_log() + second.read_log()

    asked = [call["messages"][0]["content"] for call in engine.calls if "messages" in call]
    assert len(asked) == len(set(asked)) == lines
    assert "batch_taken_over" not in log
