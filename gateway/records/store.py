"""What is asked of the tables of usage and audit."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from sqlalchemy import Table, delete, func, literal_column, select
from sqlalchemy.dialects import postgresql, sqlite
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.records.ledger import Batch, SpentKey
from gateway.records.periods import DAY_S, name_day
from gateway.records.ranges import AuditQuery, UsageQuery
from gateway.storage.database import Database
from gateway.storage.tables import AUDIT, SPENT, USAGE, WRITERS

_ALL_WRITERS = "(all)"
_ROWS_AT_ONCE = 1000
_SUMMED = ("requests", "prompt_tokens", "completion_tokens", "batch_lines")
_SPENT_KEPT_S = 62 * DAY_S  # the running month, whenever it is looked at
_WRITERS_KEPT_S = 30 * DAY_S

AuditRows = Sequence[Mapping[str, Any]]


class RecordStore:
    """Of one gateway, which is known by its name."""

    def __init__(self, database: Database, writer: str) -> None:
        self._database, self._writer = database, writer
        self._seen = 0  # the last change that is known here
        self._seen_of = ""  # the day whose changes were looked at

    async def write(self, batch: Batch, rows: AuditRows) -> dict[SpentKey, int]:
        """Once, however often it is tried; returns what all gateways have spent, where that has
        changed since the last time.
        """
        if batch.is_empty:
            async with self._database.read() as connection:
                return await self._read_spent(connection)
        async with self._database.write() as connection:
            # Their number is one row, which keeps writers in one order: nobody who has seen a
            # change can have missed an earlier one, and no two of them wait for each other.
            change = await _count_up(connection)
            query = select(WRITERS.c.number).where(WRITERS.c.name == self._writer)
            last = (await connection.execute(query)).scalar()
            if last is None or last < batch.number:
                await _add(connection, batch, change)
                for first in range(0, len(rows), _ROWS_AT_ONCE):
                    await connection.execute(
                        AUDIT.insert(), list(rows[first : first + _ROWS_AT_ONCE])
                    )
                row = {"name": self._writer, "number": batch.number, "written_at": _now()}
                await _upsert(connection, WRITERS, [row], replaced=("number", "written_at"))
            return await self._read_spent(connection)

    def forget_seen(self) -> None:
        """What was known may not hold any more: the database was away."""
        self._seen = 0

    async def _read_spent(self, connection: AsyncConnection) -> dict[SpentKey, int]:
        today = name_day(time.time())
        if today != self._seen_of:  # elsewhere it may have begun before, and been written then
            self._seen, self._seen_of = 0, today
        query = select(SPENT.c.period, SPENT.c.key, SPENT.c.tokens, SPENT.c.change).where(
            SPENT.c.change > self._seen, SPENT.c.period.in_((today, today[:7]))
        )
        spent: dict[SpentKey, int] = {}
        for period, key, tokens, change in await connection.execute(query):
            spent[period, key] = tokens
            self._seen = max(self._seen, change)
        return spent

    async def sweep(self, audit_ttl_days: float) -> None:
        """Audit rows whose time is over, some at a time, and what nobody asks for any more."""
        before = name_id(time.time() - audit_ttl_days * DAY_S)
        while True:
            old = select(AUDIT.c.id).where(AUDIT.c.id < before).limit(_ROWS_AT_ONCE)
            async with self._database.write() as connection:
                deleted = await connection.execute(delete(AUDIT).where(AUDIT.c.id.in_(old)))
            if deleted.rowcount < _ROWS_AT_ONCE:
                break
        oldest = name_day(time.time() - _SPENT_KEPT_S)
        gone = WRITERS.c.written_at < _now() - _WRITERS_KEPT_S
        async with self._database.write() as connection:
            await connection.execute(delete(SPENT).where(SPENT.c.period < oldest))
            await connection.execute(delete(WRITERS).where(gone, WRITERS.c.name != _ALL_WRITERS))

    async def list_usage(self, asked: UsageQuery, most: int) -> list[dict[str, Any]]:
        """One more than `most`, if there are more."""
        # As a text of its own, for PostgreSQL compares what it selects with what it groups by.
        period = USAGE.c.day if asked.group == "day" else literal_column("substr(day, 1, 7)")
        sums = [func.sum(USAGE.c[name]) for name in _SUMMED]
        query = (
            select(period, USAGE.c.key, USAGE.c.model, *sums)
            .where(USAGE.c.day.between(asked.first, asked.last))
            .group_by(period, USAGE.c.key, USAGE.c.model)
            .order_by(period, USAGE.c.key, USAGE.c.model)
            .limit(most + 1)
        )
        if asked.key is not None:
            query = query.where(USAGE.c.key == asked.key)
        async with self._database.read() as connection:
            rows = (await connection.execute(query)).all()
        return [
            {asked.group: row[0], "key": row[1], "model": row[2]}
            | {name: int(value) for name, value in zip(_SUMMED, row[3:], strict=True)}
            for row in rows
        ]

    async def list_audit(self, asked: AuditQuery) -> list[dict[str, Any]]:
        """The newest first; one more than is asked for, if there are more."""
        query = select(AUDIT).where(AUDIT.c.id >= name_id(asked.begins))
        query = query.where(AUDIT.c.id < name_id(asked.ends))
        if asked.after is not None:
            query = query.where(AUDIT.c.id < asked.after)
        if asked.key is not None:
            query = query.where(AUDIT.c.key == asked.key)
        query = query.order_by(AUDIT.c.id.desc()).limit(asked.limit + 1)
        async with self._database.read() as connection:
            rows = (await connection.execute(query)).mappings()
            # Names of columns are no plain texts, which JSON wants.
            return [{f"{name}": value for name, value in row.items()} for row in rows]

    async def close(self) -> None:
        await self._database.close()


def name_id(timestamp: float) -> str:
    """Where the ids of rows of that moment begin."""
    return f"{min(max(0, int(timestamp * 1e9)), 2**64 - 1):016x}"


def make_storable(text: str) -> str:
    """PostgreSQL takes no NUL, and no database half a pair of surrogates."""
    return text.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def _now() -> int:
    return int(time.time())


async def _count_up(connection: AsyncConnection) -> int:
    row = {"name": _ALL_WRITERS, "number": 1, "written_at": _now()}
    await _upsert(connection, WRITERS, [row], added=("number",))
    query = select(WRITERS.c.number).where(WRITERS.c.name == _ALL_WRITERS)
    return int((await connection.execute(query)).scalar_one())


async def _add(connection: AsyncConnection, batch: Batch, change: int) -> None:
    sums = [
        {"day": day, "key": key, "model": make_storable(model)} | asdict(one)
        for (day, key, model), one in batch.sums.items()
    ]
    spent = [
        {"period": period, "key": key, "tokens": tokens, "change": change}
        for (period, key), tokens in batch.spent.items()
    ]
    await _upsert(connection, USAGE, sums, added=_SUMMED)
    await _upsert(connection, SPENT, spent, added=("tokens",), replaced=("change",))


async def _upsert(
    connection: AsyncConnection,
    table: Table,
    rows: Sequence[Mapping[str, Any]],
    *,
    added: Sequence[str] = (),
    replaced: Sequence[str] = (),
) -> None:
    """Of rows that are there, some columns are added to and others replaced."""
    insert: Any = postgresql.insert if connection.dialect.name == "postgresql" else sqlite.insert
    statement = insert(table)
    values = {name: table.c[name] + statement.excluded[name] for name in added}
    values |= {name: statement.excluded[name] for name in replaced}
    statement = statement.on_conflict_do_update(
        index_elements=[column.name for column in table.primary_key], set_=values
    )
    for first in range(0, len(rows), _ROWS_AT_ONCE):
        await connection.execute(statement, list(rows[first : first + _ROWS_AT_ONCE]))
