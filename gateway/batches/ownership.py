"""Who runs a batch, and what only they may write.

A gateway that takes a batch raises its epoch; all that it writes says under which, and who has an
older one is told `OwnershipLost`. So two gateways may believe for a moment that a batch is theirs,
and each line is still answered once. That an owner lives is seen by its `beat`, which others watch
on clocks of their own: what clocks say, and how they jump, decides nothing here.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import and_, delete, func, insert, select, update
from sqlalchemy.ext.asyncio import AsyncConnection

from gateway.batches.shapes import FileRecord, JobRecord
from gateway.batches.store import OPEN, StoredLine, insert_file, read_job
from gateway.storage.clock import SteadyClock
from gateway.storage.database import Database
from gateway.storage.tables import FILES, JOBS, LINES, RESULTS

_ROWS_AT_ONCE = 500


class OwnershipLost(Exception):
    """Another gateway runs this batch now, or it is gone."""


@dataclass(slots=True)
class Result:
    """What one line was answered: a line of the output file, or of that with the errors."""

    number: int
    is_good: bool
    line: bytes


class Ownership:
    """The batches of one gateway, which is known by its name."""

    def __init__(self, database: Database, worker: str, clock: SteadyClock) -> None:
        self._database, self.worker, self._clock = database, worker, clock

    async def list_open(self) -> list[JobRecord]:
        """First those that have least time left."""
        query = select(JOBS).where(JOBS.c.status.in_(OPEN)).order_by(JOBS.c.expires_at)
        async with self._database.read() as connection:
            return [read_job(row) for row in (await connection.execute(query)).mappings()]

    async def claim(self, job: JobRecord) -> JobRecord | None:
        """It is ours, unless somebody has taken it, or its owner has moved, since it was read."""
        now = self._clock.stamp()
        values: dict[str, Any] = {"worker": self.worker, "epoch": job.epoch + 1, "beat": 0}
        change = (
            update(JOBS)
            .where(JOBS.c.id == job.id, JOBS.c.epoch == job.epoch, JOBS.c.beat == job.beat)
            .values(**values)
        )
        begin = (
            update(JOBS)
            .where(JOBS.c.id == job.id, JOBS.c.status == "validating")
            .values(status="in_progress", in_progress_at=now)
        )
        async with self._database.write() as connection:
            if (await connection.execute(change)).rowcount != 1:
                return None
            await connection.execute(begin)
            row = (await connection.execute(select(JOBS).where(JOBS.c.id == job.id))).mappings()
            return read_job(row.one())

    async def beat(self, ids: Iterable[str]) -> None:
        """We live."""
        change = (
            update(JOBS)
            .where(JOBS.c.id.in_(list(ids)), JOBS.c.worker == self.worker)
            .values(beat=JOBS.c.beat + 1)
        )
        async with self._database.write() as connection:
            await connection.execute(change)

    async def give_back(self) -> None:
        """All that is ours, also what was claimed in the last moment: whoever looks next may take
        it at once.
        """
        mine = and_(JOBS.c.worker == self.worker, JOBS.c.status.in_(OPEN))
        change = update(JOBS).where(mine).values(worker="", beat=JOBS.c.beat + 1)
        async with self._database.write() as connection:
            await connection.execute(change)

    async def find_input(self, job: JobRecord) -> str:
        """The name of the input's bytes."""
        query = select(FILES.c.blob).where(FILES.c.id == job.input_file_id)
        async with self._database.read() as connection:
            return (await connection.execute(query)).scalar_one_or_none() or ""

    async def count_lines(self, job: JobRecord) -> int:
        """Of its input: fewer than it had where its file has been deleted."""
        query = select(func.count()).select_from(LINES).where(LINES.c.file_id == job.input_file_id)
        async with self._database.read() as connection:
            return int((await connection.execute(query)).scalar_one())

    async def list_unanswered(self, job: JobRecord) -> list[StoredLine]:
        """Side by side those that begin alike: the engine has their beginning in its cache."""
        answered = and_(RESULTS.c.job_id == job.id, RESULTS.c.number == LINES.c.number)
        query = (
            select(LINES.c.number, LINES.c.custom_id, LINES.c.start, LINES.c.size, LINES.c.prefix)
            .outerjoin(RESULTS, answered)
            .where(LINES.c.file_id == job.input_file_id, RESULTS.c.number.is_(None))
            .order_by(LINES.c.prefix, LINES.c.number)
        )
        lines: list[StoredLine] = []
        async with self._database.read() as connection:
            # Piece by piece: all at once would hold the event loop up.
            async for rows in (await connection.stream(query)).partitions(_ROWS_AT_ONCE):
                lines += map(tuple, rows)
        return lines

    async def add_results(self, job: JobRecord, results: Sequence[Result]) -> None:
        async with self._database.write() as connection:
            await _ensure_ours(connection, job)
            # Those of a commit whose answer was lost, with the connection, are there already.
            numbers = [one.number for one in results]
            query = select(RESULTS.c.number).where(
                RESULTS.c.job_id == job.id, RESULTS.c.number.in_(numbers)
            )
            there = set((await connection.execute(query)).scalars())
            rows = [
                {"job_id": job.id, "number": one.number, "is_good": one.is_good, "line": one.line}
                for one in results
                if one.number not in there
            ]
            if rows:
                await connection.execute(insert(RESULTS), rows)

    async def begin_end(
        self, job: JobRecord, ending: str, error: tuple[str, str] | None = None
    ) -> JobRecord:
        """From here on nothing is run; a successor goes on with the same end."""
        now = self._clock.stamp()
        code, message = error or (None, None)
        async with self._database.write() as connection:
            current = await _ensure_ours(connection, job)
            if current.ending is None:
                values: dict[str, Any] = {"ending": ending, "status": "finalizing"}
                values |= {"error_code": code, "error_message": message, "finalizing_at": now}
                await connection.execute(update(JOBS).where(_is_ours(job)).values(**values))
            return await _ensure_ours(connection, job)

    async def read_lines(
        self, job: JobRecord, after: int, limit: int
    ) -> list[tuple[int, str, bool | None, bytes | None]]:
        """In their order, with what each was answered, if it was."""
        answered = and_(RESULTS.c.job_id == job.id, RESULTS.c.number == LINES.c.number)
        query = (
            select(LINES.c.number, LINES.c.custom_id, RESULTS.c.is_good, RESULTS.c.line)
            .outerjoin(RESULTS, answered)
            .where(LINES.c.file_id == job.input_file_id, LINES.c.number > after)
            .order_by(LINES.c.number)
            .limit(limit)
        )
        async with self._database.read() as connection:
            return [tuple(row) for row in await connection.execute(query)]

    async def end(
        self,
        job: JobRecord,
        output: FileRecord | None,
        errors: FileRecord | None,
        counts: tuple[int, int],
    ) -> None:
        """The files are there, the counts are theirs, and the batch has ended: all in one."""
        now = self._clock.stamp()
        ending = job.ending or "completed"
        values = {
            "status": ending,
            f"{ending}_at": now,
            "output_file_id": output.id if output else None,
            "error_file_id": errors.id if errors else None,
            "completed": counts[0],
            "failed": counts[1],
            "worker": "",
        }
        async with self._database.write() as connection:
            await _ensure_ours(connection, job)
            for file in (output, errors):
                if file is not None:
                    await insert_file(connection, file)
            await connection.execute(update(JOBS).where(_is_ours(job)).values(**values))
            await connection.execute(delete(RESULTS).where(RESULTS.c.job_id == job.id))


def _is_ours(job: JobRecord) -> Any:
    return and_(JOBS.c.id == job.id, JOBS.c.epoch == job.epoch)


async def _ensure_ours(connection: AsyncConnection, job: JobRecord) -> JobRecord:
    """Held until the transaction ends: who takes it over waits as long."""
    query = select(JOBS).where(_is_ours(job), JOBS.c.status.in_(OPEN)).with_for_update()
    row = (await connection.execute(query)).mappings().one_or_none()
    if row is None:
        raise OwnershipLost(job.id)
    return read_job(row)
