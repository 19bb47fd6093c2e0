"""Several worker processes: one port, and limits and figures that hold across them."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

import httpx
import pytest

from gateway.admission.keys import make_key
from gateway.admission.ledger import FIRST_SLOTS, Ledger, make_ledger_file
from gateway.config import Worker
from tests.fake_engine import MODEL_FOLDER, Behaviour, build_fake_engine, serve_app
from tests.gateway.conftest import until


@dataclass
class Workers:
    """A parent process with its workers, and the engine behind them."""

    process: asyncio.subprocess.Process
    url: str
    key: str
    engine: Behaviour

    async def ask(self, prompt: str) -> httpx.Response:
        """On a connection of its own, so that the kernel spreads the calls."""
        headers = {"Authorization": f"Bearer {self.key}"}
        async with httpx.AsyncClient(timeout=20) as client:
            return await client.post(
                f"{self.url}/predict", json={"prompt": prompt}, headers=headers
            )

    async def get(self, path: str) -> httpx.Response:
        async with httpx.AsyncClient(headers={"Authorization": f"Bearer {self.key}"}) as client:
            return await client.get(f"{self.url}{path}")

    def pids(self) -> list[int]:
        text = Path(f"/proc/{self.process.pid}/task/{self.process.pid}/children").read_text()
        return [int(pid) for pid in text.split()]


@contextlib.asynccontextmanager
async def serve_workers(folder: Path, limits: str = "", *flags: str) -> AsyncIterator[Workers]:
    key, entry = make_key("tester")
    keys_file = folder / "keys.toml"
    keys_file.write_text(f"{entry}admin = true\n{limits}\n")
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))
        port = held.getsockname()[1]
    engine = Behaviour()
    async with serve_app(build_fake_engine(engine)) as engine_url:
        command = ["--workers", "3", "--port", str(port), "--engines", engine_url]
        command += ["--tokenizer", str(MODEL_FOLDER), "--keys-file", str(keys_file)]
        command += ["--warmup-prompts", "2", "--probe-interval-s", "0.1", *flags]
        process = await asyncio.create_subprocess_exec(sys.executable, "-m", "gateway", *command)
        workers = Workers(process, f"http://127.0.0.1:{port}", key, engine)
        try:
            await until(lambda: _all_ready(workers), timeout_s=30)
            yield workers
        finally:
            if process.returncode is None:
                process.send_signal(signal.SIGTERM)
            await asyncio.wait_for(process.wait(), 20)


async def _all_ready(workers: Workers) -> bool:
    """Ten connections in a row, spread over the workers, find all of them ready."""
    try:
        answers = [await workers.get("/readyz") for _ in range(10)]
    except httpx.TransportError:
        return False
    return all(answer.status_code == 200 for answer in answers) and len(workers.pids()) == 3


async def test_workers_hold_a_keys_limit_together(tmp_path: Path) -> None:
    async with serve_workers(tmp_path, "requests_per_minute = 40") as workers:
        first = await workers.get("/usage")
        known = first.json()["keys"]["tester"]["requests"]
        started = time.monotonic()
        answers = await asyncio.gather(*(workers.ask(f"q{number}") for number in range(60)))

        statuses = [answer.status_code for answer in answers]
        refilled = 1 + (time.monotonic() - started + 2) * 40 / 60
        assert 40 - known <= statuses.count(200) <= 40 - known + refilled
        assert statuses.count(429) == 60 - statuses.count(200)


async def test_workers_figures_add_up_over_all(tmp_path: Path) -> None:
    async with serve_workers(tmp_path) as workers:
        answers = await asyncio.gather(*(workers.ask(f"q{number}") for number in range(50)))
        assert [answer.json()["response"] for answer in answers] == [
            f"answer:q{number}" for number in range(50)
        ]

        usage = (await workers.get("/usage")).json()["keys"]["tester"]
        text = (await workers.get("/metrics")).text

        served = re.search(r'gateway_requests_total\{route="/predict",status="200"\} (\S+)', text)
        assert served is not None
        assert float(served[1]) == 50
        assert usage["requests"] == 51
        assert usage["completion_tokens"] == 100
        # One warm-up for all, not one a worker.
        assert sum(len(call["prompt"]) == 2 for call in workers.engine.calls) == 1


async def test_workers_never_run_more_than_the_gate_allows(tmp_path: Path) -> None:
    async with serve_workers(tmp_path, "", "--max-running", "4") as workers:
        workers.engine.delay_s = 0.1
        most = 0

        async def watch() -> None:
            nonlocal most
            while True:
                most = max(most, workers.engine.running)
                await asyncio.sleep(0.005)

        watcher = asyncio.create_task(watch())
        answers = await asyncio.gather(*(workers.ask(f"q{number}") for number in range(30)))
        watcher.cancel()

        assert {answer.status_code for answer in answers} == {200}
        assert 2 <= most <= 4


async def test_workers_that_die_come_back_and_all_stop_together(tmp_path: Path) -> None:
    async with serve_workers(tmp_path) as workers:
        before = workers.pids()
        os.kill(before[0], signal.SIGKILL)
        await until(lambda: len(workers.pids()) == 3 and workers.pids() != before)
        await until(lambda: _all_ready(workers), timeout_s=20)
        assert (await workers.ask("still")).json() == {"response": "answer:still"}
        last = workers.pids()

        workers.process.send_signal(signal.SIGTERM)

        assert await asyncio.wait_for(workers.process.wait(), 20) == 0
        assert not [pid for pid in last if _is_alive(pid)]


async def test_workers_leave_when_their_parent_is_killed(tmp_path: Path) -> None:
    async with serve_workers(tmp_path) as workers:
        pids = workers.pids()

        workers.process.kill()

        await until(lambda: not [pid for pid in pids if _is_alive(pid)], timeout_s=15)


async def test_worker_whose_parent_died_before_it_listened_leaves(tmp_path: Path) -> None:
    make_ledger_file(tmp_path)
    parent = await asyncio.create_subprocess_exec("true")
    await parent.wait()
    orphan = Worker(0, 2, tmp_path, parent.pid)
    command = ["--port", "0", "--tokenizer", str(MODEL_FOLDER)]
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "gateway", *command, env=os.environ | orphan.environment()
    )
    try:
        assert await asyncio.wait_for(process.wait(), 10) == 0
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()


def _is_alive(pid: int) -> bool:
    try:
        return "Z" not in Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return False


def test_ledger_is_common_memory(tmp_path: Path) -> None:
    path = make_ledger_file(tmp_path)
    one, other = Ledger(path), Ledger(path)

    one.row("a")[1] = 2.5
    other.row("b")[1] = 7

    assert (other.row("a")[1], one.row("b")[1], one.row("c")[1]) == (2.5, 7, 0)
    one.close()
    other.close()


@pytest.mark.parametrize("is_shared", [True, False])
def test_ledger_grows_and_loses_nothing(tmp_path: Path, is_shared: bool) -> None:
    path = make_ledger_file(tmp_path) if is_shared else None
    one = Ledger(path)
    other = Ledger(path) if is_shared else one
    count = 4 * FIRST_SLOTS

    for number in range(count):
        (one, other)[number % 2].row(f"key:{number}")[1] = number

    third = Ledger(path) if is_shared else one
    for ledger in (one, other, third):
        assert [ledger.row(f"key:{number}")[1] for number in range(count)] == list(range(count))
    if path is not None:
        assert path.stat().st_size <= 16 * 64 * FIRST_SLOTS
    for ledger in {one, other, third}:
        ledger.close()
