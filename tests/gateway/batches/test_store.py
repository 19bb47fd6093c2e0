"""What several gateways, or several calls, ask of one database in the same moment."""

from __future__ import annotations

import asyncio
import dataclasses
import time

import pytest
from sqlalchemy import insert, select, text

from gateway.batches.shapes import FileRecord
from gateway.batches.store import Store
from gateway.errors import Conflict, Forbidden, NotFound, RateLimited
from gateway.storage.database import Database
from gateway.storage.tables import FILES, JOBS
from tests.gateway.batches.conftest import CHAT, CLOCK, JOB, until

FILE = FileRecord("file-2", JOB.owner, "in.jsonl", "batch", 9, 1, "file-2", lines=3, url=CHAT)


async def test_batches_that_are_made_at_once_keep_to_their_keys_limit(database: Database) -> None:
    store = Store(database, CLOCK)
    jobs = [dataclasses.replace(JOB, id=f"batch_{number}") for number in range(2, 6)]

    made = await asyncio.gather(*(store.add_job(job, 2) for job in jobs), return_exceptions=True)

    assert [type(one) for one in made if one is not None] == [RateLimited] * 3


async def test_files_that_are_added_at_once_keep_to_their_keys_room(database: Database) -> None:
    store = Store(database, CLOCK)
    files = [dataclasses.replace(FILE, id=f"file-{n}", blob=f"file-{n}") for n in range(2, 6)]

    added = await asyncio.gather(
        *(store.add_file(file, max_bytes=20) for file in files), return_exceptions=True
    )

    assert [type(one) for one in added if one is not None] == [Forbidden] * 3


@pytest.mark.parametrize("storage", ["postgres"], indirect=True)
async def test_file_is_not_deleted_below_a_batch_that_is_just_made_of_it(
    database: Database,
) -> None:
    store = Store(database, CLOCK)
    await store.add_file(FILE)
    row = dataclasses.asdict(JOB) | {"id": "batch_2", "input_file_id": FILE.id, "metadata": None}

    async def is_waiting() -> bool:
        async with database.read() as connection:
            query = "SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock'"
            return bool((await connection.execute(text(query))).scalar_one())

    async with database.write() as connection:
        lock = select(FILES.c.id).where(FILES.c.id == FILE.id).with_for_update()
        await connection.execute(lock)
        deleting = asyncio.create_task(store.delete_file(FILE.owner, FILE.id))
        await until(is_waiting)
        await connection.execute(insert(JOBS), row)

    with pytest.raises(Conflict):
        await deleting
    assert (await store.find_file(FILE.owner, FILE.id)).id == FILE.id


async def test_batch_that_has_just_ended_is_kept_however_old_it_is(database: Database) -> None:
    now, day_s = int(time.time()), 86_400
    row = dataclasses.asdict(JOB) | {"status": "completed", "metadata": None}
    old = {"created_at": now - 40 * day_s}
    rows = [
        row | old | {"id": "batch_2", "completed_at": now},
        row | old | {"id": "batch_3", "completed_at": now - 31 * day_s},
    ]
    async with database.write() as connection:
        for one in rows:
            await connection.execute(insert(JOBS), one)
    store = Store(database, CLOCK)

    await store.delete_old_jobs(30 * day_s)

    assert (await store.find_job(JOB.owner, "batch_2")).id == "batch_2"
    with pytest.raises(NotFound):
        await store.find_job(JOB.owner, "batch_3")
