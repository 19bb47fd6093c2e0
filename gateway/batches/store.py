"""What is asked of the tables: files and batches as callers see them. How one is run, and by whom,
is in `ownership.py`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import orjson
from sqlalchemy import (
    ColumnElement,
    RowMapping,
    Table,
    delete,
    exists,
    func,
    insert,
    literal,
    select,
    update,
)
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.admission.keys import Caller
from gateway.batches.shapes import FileRecord, JobRecord
from gateway.config import Settings
from gateway.errors import Conflict, Forbidden, InvalidRequest, NotFound, RateLimited
from gateway.schemas.fields import is_storable
from gateway.storage.clock import SteadyClock
from gateway.storage.database import Database
from gateway.storage.rows import DAY_S, lock_owner
from gateway.storage.tables import FILES, JOBS, LINES, RESULTS

OPEN = ("validating", "in_progress", "finalizing", "cancelling")
ENDED = ("completed", "failed", "expired", "cancelled")
_CANCELLABLE = ("validating", "in_progress")
_ROWS_AT_ONCE = 1000

StoredLine = tuple[int, str, int, int, str]  # number, custom_id, start, size, prefix


def find_kept_s(settings: Settings, owner: Caller | None, asked_s: int | None) -> int:
    """How long a file is kept: the least of what the gateway, its key and its caller say."""
    most = settings.batch_retention_days
    own = owner.batch_retention_days if owner else 0
    kept_s = min(most, own or most) * DAY_S
    return max(1, int(min(kept_s, asked_s or kept_s)))


class Store:
    """Files and batches by their owner: who asks for another's is told that there is none."""

    def __init__(self, database: Database, clock: SteadyClock) -> None:
        self._database, self._clock = database, clock

    async def add_file(
        self, file: FileRecord, lines: Sequence[StoredLine] = (), max_bytes: int | None = None
    ) -> None:
        """`max_bytes`: that all files of this owner may take. Others may have come since it was
        looked at, also through another gateway.
        """
        async with self._database.write() as connection:
            await lock_owner(connection, file.owner)
            stored = await _sum_bytes(connection, file.owner)
            if max_bytes is not None and stored + file.bytes > max_bytes:
                raise refuse_storage(stored, max_bytes)
            await insert_file(connection, file)
            for first in range(0, len(lines), _ROWS_AT_ONCE):
                rows = [
                    dict(zip(("number", "custom_id", "start", "size", "prefix"), one, strict=True))
                    | {"file_id": file.id}
                    for one in lines[first : first + _ROWS_AT_ONCE]
                ]
                await connection.execute(insert(LINES), rows)

    async def find_file(self, owner: str, file_id: str) -> FileRecord:
        async with self._database.read() as connection:
            row = await _find(connection, FILES, owner, file_id)
        return _read_file(row)

    async def list_files(
        self, owner: str, *, after: str | None, limit: int, ascending: bool, purpose: str | None
    ) -> tuple[list[FileRecord], bool]:
        """A page of them, and whether there are more."""
        if purpose is not None and not is_storable(purpose):
            return [], False
        further = [] if purpose is None else [FILES.c.purpose == purpose]
        rows, has_more = await self._list(FILES, owner, further, after, limit, ascending=ascending)
        return [_read_file(row) for row in rows], has_more

    async def sum_bytes(self, owner: str) -> int:
        async with self._database.read() as connection:
            return await _sum_bytes(connection, owner)

    async def delete_file(self, owner: str, file_id: str) -> FileRecord:
        """`Conflict` while a batch needs it. Its bytes are the caller's to delete."""
        async with self._database.write() as connection:
            await _find(connection, FILES, owner, file_id)
            # A batch that is just being made of it is waited for, or finds it gone.
            query = select(FILES).where(FILES.c.id == file_id).with_for_update()
            row = (await connection.execute(query)).mappings().one_or_none()
            if row is None:
                raise NotFound(f"there is no file {file_id!r}", code="file_not_found")
            query = select(JOBS.c.id).where(
                JOBS.c.input_file_id == file_id, JOBS.c.status.in_(OPEN)
            )
            if (user := (await connection.execute(query)).scalar()) is not None:
                raise Conflict(
                    f"{user} is reading this file; cancel it first, or wait for its end",
                    code="file_in_use",
                )
            await _delete_files(connection, [file_id])
            return _read_file(row)

    async def list_expired_files(self) -> list[FileRecord]:
        """Those whose time is over and which no batch needs any more."""
        in_use = exists().where(JOBS.c.input_file_id == FILES.c.id, JOBS.c.status.in_(OPEN))
        query = (
            select(FILES).where(FILES.c.expires_at <= int(self._clock.now()), ~in_use).limit(100)
        )
        async with self._database.read() as connection:
            return [_read_file(row) for row in (await connection.execute(query)).mappings()]

    async def find_orphans(self, blobs: Sequence[str]) -> list[str]:
        """Those of them that no file has."""
        known: set[str] = set()
        async with self._database.read() as connection:
            for first in range(0, len(blobs), _ROWS_AT_ONCE):
                some = blobs[first : first + _ROWS_AT_ONCE]
                query = select(FILES.c.blob).where(FILES.c.blob.in_(some))
                known.update((await connection.execute(query)).scalars())
        return [name for name in blobs if name not in known]

    async def delete_old_jobs(self, kept_s: float) -> None:
        """So long after their end; their files go by a time of their own."""
        before = int(self._clock.now() - kept_s)
        times = (JOBS.c.completed_at, JOBS.c.failed_at, JOBS.c.expired_at, JOBS.c.cancelled_at)
        ended_at = func.coalesce(*times, JOBS.c.created_at)
        query = delete(JOBS).where(JOBS.c.status.in_(ENDED), ended_at < before)
        async with self._database.write() as connection:
            await connection.execute(query)

    async def add_job(self, job: JobRecord, max_jobs: int) -> None:
        """`max_jobs`: that this owner may have open at once."""
        async with self._database.write() as connection:
            await lock_owner(connection, job.owner)
            query = select(func.count()).select_from(JOBS)
            query = query.where(JOBS.c.owner == job.owner, JOBS.c.status.in_(OPEN))
            if (await connection.execute(query)).scalar_one() >= max_jobs:
                raise RateLimited(
                    f"this key has {max_jobs} batches that have not ended; its limit is that",
                    code="batch_jobs",
                    retry_after_s=60,
                )
            # Deleted since it was looked at: the batch would never find it.
            query = select(FILES.c.id).where(FILES.c.id == job.input_file_id).with_for_update()
            if (await connection.execute(query)).scalar() is None:
                raise NotFound(f"there is no file {job.input_file_id!r}", param="input_file_id")
            row = dataclasses.asdict(job)
            row["metadata"] = None if job.metadata is None else orjson.dumps(job.metadata).decode()
            await connection.execute(insert(JOBS), row)

    async def find_job(self, owner: str, job_id: str) -> JobRecord:
        async with self._database.read() as connection:
            row = await _find(connection, JOBS, owner, job_id)
            return await _count(connection, read_job(row))

    async def list_jobs(
        self, owner: str, *, after: str | None, limit: int
    ) -> tuple[list[JobRecord], bool]:
        rows, has_more = await self._list(JOBS, owner, [], after, limit, ascending=False)
        async with self._database.read() as connection:
            return [await _count(connection, read_job(row)) for row in rows], has_more

    async def cancel_job(self, owner: str, job_id: str) -> JobRecord:
        """What has been answered until then is kept; its owner ends it."""
        async with self._database.write() as connection:
            await _find(connection, JOBS, owner, job_id)
            change = (
                update(JOBS)
                .where(JOBS.c.id == job_id, JOBS.c.status.in_(_CANCELLABLE))
                .values(status="cancelling", cancelling_at=self._clock.stamp(), ending="cancelled")
            )
            changed = (await connection.execute(change)).rowcount
            job = read_job(await _find(connection, JOBS, owner, job_id))
            if not changed and job.status not in {"cancelling", "cancelled"}:
                raise Conflict(
                    f"{job_id} is {job.status}: there is nothing to cancel", code="batch_ended"
                )
            return await _count(connection, job)

    async def _list(
        self,
        table: Table,
        owner: str,
        further: Sequence[ColumnElement[bool]],
        after: str | None,
        limit: int,
        *,
        ascending: bool,
    ) -> tuple[list[RowMapping], bool]:
        """Ids are in order of time, so the last one seen is all that a next page needs."""
        query = select(table).where(table.c.owner == owner, *further)
        if after is not None:
            query = query.where(table.c.id > after if ascending else table.c.id < after)
        query = query.order_by(table.c.id.asc() if ascending else table.c.id.desc())
        async with self._database.read() as connection:
            if after is not None:
                await _find(connection, table, owner, after, param="after")  # a mistake is told
            rows = list((await connection.execute(query.limit(limit + 1))).mappings())
        return rows[:limit], len(rows) > limit


def refuse_storage(stored: int, bound: int) -> Forbidden:
    return Forbidden(
        f"this key's files may take {bound} bytes; {stored} are stored, and with this one, and "
        "what else is being sent, they would be more: delete some",
        code="batch_storage",
    )


async def insert_file(connection: AsyncConnection, file: FileRecord) -> None:
    row = dataclasses.asdict(file) | {"models": orjson.dumps(file.models).decode()}
    await connection.execute(insert(FILES), row)


async def _sum_bytes(connection: AsyncConnection, owner: str) -> int:
    query = select(func.coalesce(func.sum(FILES.c.bytes), 0)).where(FILES.c.owner == owner)
    return int((await connection.execute(query)).scalar_one())


def read_job(row: RowMapping) -> JobRecord:
    values: dict[str, Any] = dict(row)
    if values["metadata"] is not None:
        values["metadata"] = orjson.loads(values["metadata"])
    return JobRecord(**values)


def _read_file(row: RowMapping) -> FileRecord:
    return FileRecord(**{**row, "models": orjson.loads(row["models"])})


async def _find(
    connection: AsyncConnection, table: Table, owner: str, key: str, param: str | None = None
) -> RowMapping:
    if is_storable(key):
        query = select(table).where(table.c.id == key, table.c.owner == owner)
        row = (await connection.execute(query)).mappings().one_or_none()
        if row is not None:
            return row
    kind = "file" if table is FILES else "batch"
    if param is not None:
        raise InvalidRequest(f"{param}: there is no {kind} {key[:100]!r}", param=param)
    raise NotFound(f"there is no {kind} {key[:100]!r}", code=f"{kind}_not_found")


async def _delete_files(connection: AsyncConnection, ids: Sequence[str]) -> None:
    await connection.execute(delete(LINES).where(LINES.c.file_id.in_(ids)))
    await connection.execute(delete(FILES).where(FILES.c.id.in_(ids)))


async def _count(connection: AsyncConnection, job: JobRecord) -> JobRecord:
    """Of one that runs, by what it has been answered; of one that has ended, as it stands."""
    if job.status in ENDED:
        return job
    query = (
        select(RESULTS.c.is_good, func.count(literal(1)))
        .where(RESULTS.c.job_id == job.id)
        .group_by(RESULTS.c.is_good)
    )
    for is_good, number in await connection.execute(query):
        if is_good:
            job.completed = number
        else:
            job.failed = number
    return job
