"""Transactions of a SQLite file: those that are cancelled, and those that wait for others."""

from __future__ import annotations

import asyncio
import gc
import sqlite3
from collections.abc import Iterator
from contextlib import closing, suppress
from pathlib import Path

import pytest
from sqlalchemy import text

from gateway.storage.database import Database

_STEPS = 60  # of the event loop; a transaction of this size takes about 40


@pytest.fixture
def _no_garbage_is_collected() -> Iterator[None]:
    """As in a gateway that has little to do for a while."""
    gc.disable()
    yield
    gc.enable()
    gc.collect()  # here, and not in the midst of another test


async def _write(database: Database) -> None:
    async with database.write() as connection:
        for number in range(3):
            await connection.execute(text("insert into t values (:a)"), [{"a": number}])
            await connection.execute(text("select a from t"))


# One that is cancelled in its making aiosqlite leaves to whoever collects garbage; from 3.13 on
# Python warns of it. It has no transaction yet.
@pytest.mark.filterwarnings("ignore:unclosed database:ResourceWarning")
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.usefixtures("_no_garbage_is_collected")
async def test_cancelled_transaction_keeps_no_other_writer_out(tmp_path: Path) -> None:
    database = Database(tmp_path / "kept.db", setting="X", keeps="x", busy_timeout_s=1)
    async with database.write() as connection:
        await connection.execute(text("create table t (a int)"))
    for steps in [*range(_STEPS)] * 2:
        writing = asyncio.create_task(_write(database))
        for _ in range(steps):
            await asyncio.sleep(0)
        await asyncio.sleep(steps % 7 * 0.0003)
        writing.cancel()
        with suppress(asyncio.CancelledError):
            await writing

        with closing(sqlite3.connect(tmp_path / "kept.db", timeout=30)) as other:
            other.isolation_level = None
            other.execute("begin immediate")
            other.execute("rollback")
    await database.close()


async def test_writers_of_one_gateway_wait_their_turn_however_long_each_takes(
    tmp_path: Path,
) -> None:
    """SQLite's own waiting gives up, and is not fair: of many writers one may never come in."""
    database = Database(tmp_path / "kept.db", setting="X", keeps="x", busy_timeout_s=0.001)
    async with database.write() as connection:
        await connection.execute(text("create table t (a int)"))

    async def write(number: int) -> None:
        async with database.write() as connection:
            await connection.execute(text("insert into t values (:a)"), [{"a": number}])
            await asyncio.sleep(0.02)

    await asyncio.gather(*map(write, range(20)))
    async with database.read() as connection:
        kept = (await connection.execute(text("select a from t"))).scalars().all()
    await database.close()

    assert kept == [*range(20)]  # as they came
