"""What may go wrong with a batch: nothing is lost, its state says how it is, a message why."""

from __future__ import annotations

import asyncio
import contextlib
import os
import subprocess
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest

from gateway.engines.pool import POOL
from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.batches.conftest import Postgres, ask, dump, open_batches, open_sdk, until
from tests.gateway.batches.test_jobs import check_counts, read_answers
from tests.gateway.batches.test_takeover import check_answers, start, wait_completed
from tests.gateway.conftest import serve_gateway
from tests.gateway.process import GatewayProcess, serve_process
from tests.plain_http import NO_TLS

pytestmark = pytest.mark.slow
MIB = 2**20


def count_waits(gateway: GatewayProcess) -> int:
    return gateway.read_log().count('"batch_waits"')


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(folder)]
    mounted = subprocess.run(command, check=False, capture_output=True, text=True)
    if mounted.returncode:
        message = f"no disk can be mounted here: {mounted.stderr.strip()}"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)  # noqa: S607


async def test_batch_waits_for_room_on_a_disk_that_fills_up(
    small_disk: Path, tmp_path: Path
) -> None:
    lines, engine = 400, Behaviour(delay_s=0.05)
    ballast = small_disk / "ballast"
    async with (
        serve_app(build_fake_engine(engine)) as engine_url,
        serve_process(tmp_path, engine_url, f"--batch-folder={small_disk}") as gateway,
        open_sdk(gateway.url) as sdk,
    ):
        batch_id = await start(sdk, lines)
        await until(lambda: len(engine.calls) > 40)
        await asyncio.to_thread(fill, ballast)
        await until(lambda: count_waits(gateway) >= 2)
        with pytest.raises(openai.InternalServerError) as full:
            await sdk.files.create(file=dump([ask(0, "x" * 10_000)]), purpose="batch")
        still = await sdk.batches.retrieve(batch_id)
        chats = await sdk.models.list()
        ballast.unlink()
        await check_answers(sdk, await wait_completed(sdk, batch_id), lines)

    assert (full.value.status_code, full.value.code) == (507, "storage_full")
    assert "there is no room left" in full.value.message
    assert still.status == "in_progress"
    assert chats.data
    assert len(engine.calls) < lines * 1.5


def fill(path: Path) -> None:
    with contextlib.suppress(OSError), path.open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


async def test_batch_waits_for_a_database_that_is_long_away(
    tmp_path: Path, postgres: Postgres
) -> None:
    """Through five tries, of which each waits twice as long."""
    lines, engine = 300, Behaviour(delay_s=0.05)
    flags = (f"--batch-folder={tmp_path}", f"--batch-database={postgres.make_database()}")
    async with (
        serve_app(build_fake_engine(engine)) as engine_url,
        serve_process(tmp_path, engine_url, *flags, "--batch-lease-s=1") as gateway,
        open_sdk(gateway.url) as sdk,
    ):
        batch_id = await start(sdk, lines)
        await until(lambda: len(engine.calls) > 40)
        await asyncio.to_thread(postgres.stop)
        try:
            await until(lambda: count_waits(gateway) >= 5)
            asked = len(engine.calls)
            with pytest.raises(openai.InternalServerError) as away:
                await sdk.batches.retrieve(batch_id)
            with pytest.raises(openai.InternalServerError) as refused:
                await sdk.files.create(file=dump([ask(0)]), purpose="batch")
            models = await sdk.models.list()
            later = len(engine.calls)
        finally:
            await asyncio.to_thread(postgres.start)
        await check_answers(sdk, await wait_completed(sdk, batch_id), lines)

    for error in (away.value, refused.value):
        assert (error.status_code, error.code) == (503, "storage_unavailable")
        assert "the database of files and batches does not answer; try again" in error.message
    assert models.data
    assert asked == later  # what cannot be kept is not generated
    assert len(engine.calls) < lines * 1.5


async def test_lines_of_a_model_that_is_gone_are_told_and_the_batch_ends(tmp_path: Path) -> None:
    """Its engine left in the middle, and the hold for another one is over."""
    here, gone = Behaviour(), Behaviour(model="gone")
    options: dict[str, Any] = {"batch_folder": tmp_path / "batches", "restart_hold_s": 0.3}
    async with serve_gateway(here, gone, **options) as served, open_batches(served) as batches:
        gone.slots = may_run = asyncio.Semaphore(0)
        lines = [ask(n, model="gone" if n < 40 else "fake") for n in range(60)]
        batch_id = await batches.create(lines)

        async def has_two() -> bool:
            counts = (await batches.sdk.batches.retrieve(batch_id)).request_counts
            return counts is not None and counts.completed >= 2

        await until(lambda: gone.running > 2)
        for _ in range(2):
            may_run.release()
        await until(has_two)
        pool = served.app[POOL]
        await pool.set_engines([one for one in pool.engines if one.url == served.engine_url])
        await until(lambda: "gone" not in pool.models)
        for _ in range(40):  # what it had begun it may finish
            may_run.release()
        batch = await batches.wait(batch_id)
        good = await batches.read(batch.output_file_id)
        bad = await batches.read(batch.error_file_id)

    assert batch.status == "completed"
    assert {f"line-{n}" for n in (0, 1, *range(40, 60))} <= set(read_answers(good))
    assert len(bad) == 60 - len(good)
    for line in bad:
        assert line["response"]["status_code"] == 404
        assert "gone" in line["response"]["body"]["error"]["message"]
    check_counts(batch, good, bad)


async def test_file_of_as_many_lines_as_may_be_is_taken_and_one_more_is_not(tmp_path: Path) -> None:
    """By the bound that holds without a setting."""
    async with (
        serve_gateway(batch_folder=tmp_path / "batches") as served,
        open_batches(served) as batches,
    ):
        most = dump([ask(n) for n in range(50_000)])
        taken = await batches.sdk.files.create(file=("in.jsonl", most), purpose="batch")
        with pytest.raises(openai.BadRequestError) as refused:
            await batches.upload(most + dump([ask(50_000)]))

    assert taken.bytes == len(most)
    assert refused.value.code == "too_many_lines"
    assert "line 50001: a file may have 50000 requests; cut it in parts" in refused.value.message


async def test_line_of_two_hundred_megabytes_is_refused_before_it_is_there(tmp_path: Path) -> None:
    """What comes of it after that is read and thrown away: its sender is to see the answer."""

    async def send() -> AsyncIterator[bytes]:
        yield b'--b\r\nContent-Disposition: form-data; name="file"; filename="a"\r\n\r\n'
        yield orjson.dumps(ask(0)) + b'\n{"custom_id": "b", "body": "'
        for _ in range(200):
            yield b"x" * MIB
        yield b'"}\n\r\n--b--\r\n'

    kind = {"Content-Type": "multipart/form-data; boundary=b"}
    async with (
        serve_app(build_fake_engine(Behaviour())) as engine_url,
        serve_process(tmp_path, engine_url, f"--batch-folder={tmp_path}") as gateway,
        httpx.AsyncClient(base_url=gateway.url, verify=NO_TLS, timeout=60) as client,
    ):
        before = gateway.rss_bytes()
        refused = await client.post("/v1/files", content=send(), headers=kind)
        grown = gateway.rss_bytes() - before
        listed = (await client.get("/v1/files")).json()["data"]

    assert refused.status_code == 413
    assert refused.json()["error"]["message"].startswith("line 2 is longer than 33554432 bytes")
    assert grown < 100 * MIB
    assert listed == []
