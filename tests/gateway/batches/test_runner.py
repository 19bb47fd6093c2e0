"""How a batch ends where its storage fails in the middle of that."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from sqlalchemy import delete

from gateway.admission.keys import ANONYMOUS
from gateway.batches.blobs import DiskBlobs
from gateway.batches.ownership import Ownership, OwnershipLost, Result
from gateway.batches.runner import JobRunner
from gateway.batches.shapes import FileRecord, JobRecord
from gateway.batches.store import Store
from gateway.batches.window import Windows
from gateway.errors import StorageUnavailable
from gateway.observability.metrics import Metrics
from gateway.storage.database import Database
from gateway.storage.tables import LINES
from tests.gateway.batches.conftest import CLOCK, JOB, claim
from tests.gateway.conftest import make_settings

ANSWERS = [Result(0, True, b"good 0\n"), Result(1, True, b"good 1\n"), Result(2, False, b"bad 2\n")]


class LossyOwnership(Ownership):
    """Whose first end fails: before its commit, or only in what is told of it."""

    def __init__(self, database: Database, *, commits: bool) -> None:
        super().__init__(database, "worker", CLOCK)
        self._commits = commits
        self._ends = 0

    async def end(self, *args: Any) -> None:
        self._ends += 1
        if self._ends > 1 or self._commits:
            await super().end(*args)
        if self._ends == 1:
            raise StorageUnavailable("the connection is lost")


def build_runner(job: JobRecord, ownership: Ownership, folder: Path) -> JobRunner:
    caller: Any = None  # every line has been answered
    return JobRunner(
        job,
        ownership=ownership,
        blobs=DiskBlobs(folder),
        caller=caller,
        find_caller=lambda _name: ANONYMOUS,
        window=Windows(8).find("fake"),
        open_requests=SimpleNamespace(count=0),
        is_draining=lambda: False,
        settings=make_settings(batch_folder=folder),
        metrics=Metrics(),
        time=CLOCK,
    )


@pytest.mark.parametrize("commits", [True, False])
async def test_end_whose_answer_is_lost_leaves_the_files_that_are_told(
    database: Database, tmp_path: Path, commits: bool
) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    ownership = LossyOwnership(database, commits=commits)
    job = await claim(ownership)
    await ownership.add_results(job, ANSWERS)

    running = build_runner(job, ownership, folder).run()
    if commits:
        with pytest.raises(OwnershipLost):
            await running
    else:
        await running

    store = Store(database, CLOCK)
    ended = await store.find_job(JOB.owner, job.id)
    contents = {}
    for name in (ended.output_file_id, ended.error_file_id):
        file: FileRecord = await store.find_file(JOB.owner, name or "")
        contents[file.blob] = (folder / file.blob).read_bytes()
    assert list(contents.values()) == [b"good 0\ngood 1\n", b"bad 2\n"]
    assert (ended.status, ended.completed, ended.failed) == ("completed", 2, 1)
    assert {one.name for one in folder.iterdir()} == set(contents)


async def test_batch_whose_lines_are_gone_fails(database: Database, tmp_path: Path) -> None:
    folder = tmp_path / "files"
    folder.mkdir()
    ownership = Ownership(database, "worker", CLOCK)
    job = await claim(ownership)
    async with database.write() as connection:
        await connection.execute(delete(LINES))

    await build_runner(job, ownership, folder).run()

    ended = await Store(database, CLOCK).find_job(JOB.owner, job.id)
    assert (ended.status, ended.error_code) == ("failed", "input_file_lost")
