"""Gateways that are killed, frozen or stopped in the middle of a batch, and databases that go away:
each line is answered once.
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import openai
import orjson
import pytest
from sqlalchemy import create_engine, text

from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.batches.conftest import CHAT, Postgres, ask, dump, open_batches, open_sdk, until
from tests.gateway.batches.test_jobs import check_counts, read_answers
from tests.gateway.conftest import serve_gateway
from tests.gateway.process import GatewayProcess, serve_process
from tests.plain_http import NO_TLS

# Gateways of their own, and a database that is stopped: dear, and the same for every Python.
pytestmark = pytest.mark.slow


@contextlib.asynccontextmanager
async def serve_batches(
    folder: Path, engine_url: str, storage: dict[str, Any], *, lease_s: float = 1
) -> AsyncIterator[tuple[GatewayProcess, Any]]:
    await asyncio.to_thread(folder.mkdir, exist_ok=True)
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in storage.items()]
    async with (
        serve_process(folder, engine_url, *flags, f"--batch-lease-s={lease_s}") as gateway,
        open_sdk(gateway.url) as sdk,
    ):
        yield gateway, sdk


async def start(sdk: Any, lines: int, **fields: Any) -> str:
    data = dump([ask(n) for n in range(lines)])
    file = await sdk.files.create(file=("in.jsonl", data), purpose="batch")
    options: dict[str, Any] = {"endpoint": CHAT, "completion_window": "24h"} | fields
    return str((await sdk.batches.create(input_file_id=file.id, **options)).id)


async def wait_completed(sdk: Any, batch_id: str) -> Any:
    found: list[Any] = []

    async def has_ended() -> bool:
        found[:] = [await sdk.batches.retrieve(batch_id)]
        return bool(found[0].status == "completed")

    await until(has_ended)
    return found[0]


async def check_answers(sdk: Any, batch: Any, lines: int) -> None:
    content = (await sdk.files.content(batch.output_file_id)).content
    output = [orjson.loads(line) for line in content.splitlines()]
    assert read_answers(output) == {f"line-{n}": f"answer:question {n}" for n in range(lines)}
    assert batch.error_file_id is None
    check_counts(batch, output, [])


async def test_batch_outlives_three_kills_and_a_restart_of_postgres(
    tmp_path: Path, postgres: Postgres
) -> None:
    lines, engine, batch_id = 2000, Behaviour(delay_s=0.02), ""
    storage = {"batch_folder": tmp_path, "batch_database": postgres.make_database()}
    async with serve_app(build_fake_engine(engine)) as engine_url:
        for _ in range(3):
            async with serve_batches(tmp_path, engine_url, storage) as (gateway, sdk):
                batch_id = batch_id or await start(sdk, lines)
                await kill_after(300, engine, gateway)
        async with serve_batches(tmp_path, engine_url, storage) as (gateway, sdk):
            before = len(engine.calls)
            await until(lambda: len(engine.calls) > before + 100)
            await asyncio.to_thread(postgres.stop)
            with pytest.raises(openai.InternalServerError) as away:
                await sdk.batches.retrieve(batch_id)
            models = await sdk.models.list()
            await asyncio.to_thread(postgres.start)
            await check_answers(sdk, await wait_completed(sdk, batch_id), lines)

    assert away.value.code == "storage_unavailable"
    assert models.data  # all else is served meanwhile
    # What ran when a gateway was killed ran again, and no more than that.
    assert lines <= len(engine.calls) < lines * 1.7


async def kill_after(calls: int, engine: Behaviour, gateway: GatewayProcess) -> None:
    before = len(engine.calls)
    await until(lambda: len(engine.calls) > before + calls)
    gateway.process.kill()
    await gateway.process.wait()


async def test_batch_in_sqlite_outlives_a_kill(tmp_path: Path) -> None:
    lines, engine, storage = 300, Behaviour(delay_s=0.02), {"batch_folder": tmp_path}
    async with serve_app(build_fake_engine(engine)) as engine_url:
        async with serve_batches(tmp_path, engine_url, storage) as (gateway, sdk):
            batch_id = await start(sdk, lines)
            await kill_after(100, engine, gateway)
        async with serve_batches(tmp_path, engine_url, storage) as (gateway, sdk):
            await check_answers(sdk, await wait_completed(sdk, batch_id), lines)


async def test_frozen_gateway_loses_its_batch_and_writes_nothing_any_more(
    tmp_path: Path, postgres: Postgres
) -> None:
    lines, engine = 400, Behaviour(delay_s=0.05)
    storage = {"batch_folder": tmp_path, "batch_database": postgres.make_database()}
    async with (
        serve_app(build_fake_engine(engine)) as engine_url,
        serve_batches(tmp_path / "a", engine_url, storage) as (first, sdk),
        serve_batches(tmp_path / "b", engine_url, storage) as (second, other),
    ):
        batch_id = await start(sdk, lines)
        await until(lambda: len(engine.calls) > 50)
        owner, rest = (first, second) if await _runs(first) else (second, first)
        client = sdk if rest is first else other
        owner.process.send_signal(signal.SIGSTOP)
        try:
            batch = await wait_completed(client, batch_id)
        finally:
            owner.process.send_signal(signal.SIGCONT)
        await until(lambda: _runs_nothing(owner))
        await check_answers(client, await client.batches.retrieve(batch_id), lines)

    assert batch.status == "completed"
    assert "batch_taken_over" in rest.read_log()


async def _runs_nothing(gateway: GatewayProcess) -> bool:
    return not await _runs(gateway)


async def _runs(gateway: GatewayProcess) -> bool:
    async with httpx.AsyncClient(verify=NO_TLS) as client:
        return "gateway_batch_jobs 1.0" in (await client.get(f"{gateway.url}/metrics")).text


async def test_stopped_gateway_gives_its_batch_to_the_next_at_once(
    storage: dict[str, Any],
) -> None:
    """Long before a lease is over."""
    engine = Behaviour()
    async with serve_app(build_fake_engine(engine)) as engine_url:
        options: dict[str, Any] = {"engines": (engine_url,), **storage}
        options |= {"batch_lease_s": 3600.0, "drain_timeout_s": 0.0}
        async with serve_gateway(**options) as served, open_batches(served) as batches:
            engine.delay_s = 60
            batch_id = await batches.create([ask(n) for n in range(20)])
            await until(lambda: engine.running)
        engine.delay_s = 0
        async with serve_gateway(**options) as served, open_batches(served) as batches:
            batch = await batches.wait(batch_id)

    assert batch.status == "completed"
    assert batch.request_counts.completed == 20


async def test_batch_that_was_killed_while_it_wrote_its_files_is_ended_by_the_next(
    tmp_path: Path,
) -> None:
    """As if its owner had got as far as that, and no further."""
    folder = tmp_path / "batches"
    options: dict[str, Any] = {"batch_folder": folder, "drain_timeout_s": 0.0}
    async with serve_gateway(**options) as served, open_batches(served) as batches:
        served.engine.delays = lambda question: 60 if question == "question 3" else 0
        batch_id = await batches.create([ask(n) for n in range(4)])

        async def has_three() -> bool:
            batch = await batches.sdk.batches.retrieve(batch_id)
            return batch.request_counts is not None and batch.request_counts.completed == 3

        await until(has_three)
    engine = create_engine(f"sqlite:///{folder}/batches.sqlite")
    with engine.begin() as connection:
        half = "UPDATE gateway_batches SET status = 'finalizing', ending = 'expired'"
        connection.execute(text(half))
    engine.dispose()
    (folder / "files" / f"{batch_id}-1-output").write_bytes(b"half of it")
    async with serve_gateway(batch_folder=folder) as served, open_batches(served) as batches:
        batch = await batches.wait(batch_id)
        good, bad = (
            await batches.read(batch.output_file_id),
            await batches.read(batch.error_file_id),
        )

    assert batch.status == "expired"
    assert len(read_answers(good)) == 3
    assert [line["custom_id"] for line in bad] == ["line-3"]
    check_counts(batch, good, bad)


async def test_database_of_a_later_version_is_not_touched(tmp_path: Path) -> None:
    folder = tmp_path / "batches"
    async with serve_gateway(batch_folder=folder) as served:
        await served.client.get("/v1/files")
    engine = create_engine(f"sqlite:///{folder}/batches.sqlite")
    with engine.begin() as connection:
        connection.execute(text("UPDATE gateway_schema SET version = 99"))
    engine.dispose()
    async with serve_gateway(batch_folder=folder) as served:
        answer = await served.client.get("/v1/files")

    assert answer.status_code == 503
    assert "version 99" in answer.json()["error"]["message"]
