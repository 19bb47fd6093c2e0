"""A transaction whose caller is cancelled, at any of its steps."""

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


async def _write(database: Database) -> None:
    async with database.write() as connection:
        for number in range(3):
            await connection.execute(text("insert into t values (:a)"), [{"a": number}])
            await connection.execute(text("select a from t"))


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

        with closing(sqlite3.connect(tmp_path / "kept.db", timeout=1)) as other:
            other.isolation_level = None
            other.execute("begin immediate")
            other.execute("rollback")
    await database.close()
