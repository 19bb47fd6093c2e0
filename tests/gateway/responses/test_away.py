"""A database that is away, locked, full or silent: who stores is told, all others are served."""

from __future__ import annotations

import asyncio
import os
import signal
import sqlite3
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import event

from gateway.responses.access import RESPONSES
from tests.gateway.batches.conftest import open_sdk
from tests.gateway.conftest import Serve, Served
from tests.gateway.responses.conftest import Caller, Postgres, until

# A database that is stopped: dear, and the same for every Python.
pytestmark = pytest.mark.slow


async def ask(served: Served, **fields: Any) -> httpx.Response:
    body = {"model": "fake", "input": "hi", **fields}
    return await served.client.post("/v1/responses", json=body)


async def check_others_are_served(served: Served) -> None:
    assert (await ask(served, store=False)).status_code == 200
    assert (await served.chat("hi")).status_code == 200
    assert (await served.client.get("/readyz")).status_code == 200


def check_refused(answer: httpx.Response, status: int = 503) -> None:
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert error["code"] == ("storage_unavailable" if status == 503 else "storage_full")
    assert "stored responses" in error["message"]
    assert (status == 503) == ("Retry-After" in answer.headers)


@asynccontextmanager
async def lock(path: Path) -> AsyncIterator[None]:
    """In a thread: the gateway, which may just be writing, runs in this one."""
    other = sqlite3.connect(path, isolation_level=None, check_same_thread=False, timeout=60)
    await asyncio.to_thread(other.execute, "BEGIN IMMEDIATE")
    try:
        yield
    finally:
        other.execute("ROLLBACK")
        other.close()


async def test_locked_file_hurts_nobody_who_stores_nothing(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    async with serve(responses_database=str(path)) as served, open_sdk(served.url) as sdk:
        caller = Caller(served, sdk)
        first = await caller.ask("one")
        async with lock(path):
            check_refused(await ask(served))
            check_refused(await ask(served, background=True))
            await check_others_are_served(served)
            assert await sdk.responses.retrieve(first.id) == first  # readers go beside a writer
            stream = await caller.ask("two", stream=True)
            events = [one async for one in stream]
            metrics = (await served.client.get("/metrics")).text
        again = await caller.ask("two", previous_response_id=first.id)

    assert again.status == "completed"
    # What was said has been said; that it is not stored stands where its end would.
    assert [one.type for one in events[-1:]] == ["error"]
    assert events[-1].code == "storage_unavailable"
    assert not any(one.type == "response.completed" for one in events)
    assert "gateway_response_storage_failures_total 3.0" in metrics


async def test_place_in_the_queue_is_not_held_for_a_database(serve: Serve, tmp_path: Path) -> None:
    """The engine has one place; a call that waits for its response to be stored has none."""
    path = tmp_path / "responses.sqlite"
    bounds = {"max_running": 1, "engine_sequences": 1, "warmup_prompts": 1}
    async with serve(responses_database=str(path), **bounds) as served:
        assert (await ask(served)).status_code == 200
        async with lock(path):
            storing = asyncio.create_task(ask(served))
            await until(lambda: len(served.engine.calls) == 2)
            assert (await served.chat("hi")).status_code == 200
            assert not storing.done()
        assert (await storing).status_code in {200, 503}


async def test_background_response_waits_for_its_database(serve: Serve, tmp_path: Path) -> None:
    path = tmp_path / "responses.sqlite"
    async with serve(responses_database=str(path)) as served, open_sdk(served.url) as sdk:
        caller, engine = Caller(served, sdk), served.engine
        slots = engine.slots = asyncio.Semaphore(0)
        asked = await caller.ask("one", background=True)
        await until(lambda: engine.running)
        async with lock(path):
            slots.release()

            async def has_waited() -> bool:
                text = (await served.client.get("/metrics")).text
                return "gateway_response_storage_failures_total 0.0" not in text

            await until(has_waited)
        told = await caller.wait(asked.id)

    assert (told.status, told.output_text) == ("completed", "answer:one")


async def test_full_disk_is_told(serve: Serve, tmp_path: Path) -> None:
    """As far as SQLite can tell: it is allowed so many pages and no more."""
    async with serve(responses_database=str(tmp_path / "responses.sqlite")) as served:
        assert (await ask(served)).status_code == 200

        def bound(connection: Any, *_: object) -> None:
            connection.execute("PRAGMA max_page_count=1")

        event.listen(served.app[RESPONSES].database._engine.sync_engine, "checkout", bound)
        answers: list[httpx.Response] = []

        async def is_full() -> bool:
            answers[:] = [await ask(served, input="x" * 2000)]
            return answers[0].status_code != 200

        await until(is_full)
        check_refused(answers[0], 507)
        await check_others_are_served(served)


async def test_database_that_goes_and_comes_back(serve: Serve, postgres: Postgres) -> None:
    place = postgres.make_database()
    async with serve(responses_database=place) as served, open_sdk(served.url) as sdk:
        caller = Caller(served, sdk)
        first = await caller.ask("one")
        calls = len(served.engine.calls)
        await asyncio.to_thread(postgres.stop)
        try:
            check_refused(await ask(served))
            check_refused(await ask(served, background=True))
            check_refused(await ask(served, previous_response_id=first.id))
            check_refused(await served.client.get(f"/v1/responses/{first.id}"))
            assert len(served.engine.calls) == calls  # told before an engine works for nothing
            await check_others_are_served(served)
        finally:
            await asyncio.to_thread(postgres.start)
        second = await caller.ask("two", previous_response_id=first.id)

    assert second.status == "completed"


async def test_gateway_starts_without_its_database(serve: Serve, postgres: Postgres) -> None:
    place = postgres.make_database()
    await asyncio.to_thread(postgres.stop)
    try:
        async with serve(responses_database=place) as served:
            check_refused(await ask(served))
            await check_others_are_served(served)
    finally:
        await asyncio.to_thread(postgres.start)


@contextmanager
def freeze(postgres: Postgres) -> Iterator[None]:
    """All its processes stand still; connections stay, and nothing is answered."""
    assert postgres.process is not None
    main = postgres.process.pid
    os.kill(main, signal.SIGSTOP)
    children = [int(one) for one in Path(f"/proc/{main}/task/{main}/children").read_text().split()]
    try:
        for child in children:
            os.kill(child, signal.SIGSTOP)
        yield
    finally:
        for process in (*children, main):
            os.kill(process, signal.SIGCONT)


async def test_silent_database_is_not_waited_for(
    serve: Serve, postgres: Postgres, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.responses.service._ANSWER_S", 0.5)
    async with serve(responses_database=postgres.make_database()) as served:
        await until(lambda: _is_stored(served))
        with freeze(postgres):
            refused = await asyncio.gather(*(ask(served) for _ in range(10)))
            for one in refused:
                check_refused(one)
            await check_others_are_served(served)
        await until(lambda: _is_stored(served))


async def _is_stored(served: Served) -> bool:
    return (await ask(served)).status_code == 200
