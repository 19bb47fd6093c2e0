"""Which batches a gateway takes, and that it shows that it lives, whatever else it does."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from gateway.batches.blobs import DiskBlobs
from gateway.batches.coordinator import Coordinator
from gateway.batches.ownership import Ownership
from gateway.batches.shapes import JobRecord
from gateway.batches.store import Store
from gateway.observability.metrics import Metrics
from gateway.storage.database import Database
from tests.gateway.batches.conftest import CLOCK, JOB, until
from tests.gateway.conftest import make_settings


class HangingBlobs(DiskBlobs):
    """In a folder that does not answer, as one over a network may."""

    async def list_older_than(self, moment: float) -> list[str]:
        await asyncio.Event().wait()
        return await super().list_older_than(moment)


def build_endless_runner(job: JobRecord) -> Any:
    return SimpleNamespace(
        job=job, run=asyncio.Event().wait, end=lambda *_: None, check_owner=lambda: None
    )


@asynccontextmanager
async def run_coordinator(database: Database, folder: Path) -> AsyncIterator[None]:
    coordinator = Coordinator(
        settings=make_settings(batch_folder=folder),
        ownership=Ownership(database, "worker", CLOCK),
        store=Store(database, CLOCK),
        blobs=HangingBlobs(folder),
        build_runner=build_endless_runner,
        metrics=Metrics(),
        clock=CLOCK,
    )
    running = asyncio.create_task(coordinator.run())
    try:
        yield
    finally:
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        await coordinator.stop()


async def test_gateway_shows_that_it_lives_while_it_throws_away(
    database: Database, tmp_path: Path
) -> None:
    watching = Ownership(database, "other", CLOCK)

    async def has_moved() -> bool:
        [job] = await watching.list_open()
        return job.worker == "worker" and job.beat >= 2

    async with run_coordinator(database, tmp_path):
        await until(has_moved)
    [given_back] = await watching.list_open()

    assert given_back.worker == ""


async def test_many_batches_of_one_key_keep_those_of_others_not_out(
    database: Database, tmp_path: Path
) -> None:
    store, watching = Store(database, CLOCK), Ownership(database, "other", CLOCK)
    for number in range(2, 25):
        await store.add_job(dataclasses.replace(JOB, id=f"batch_{number}"), 100)
    async with run_coordinator(database, tmp_path):
        await until(lambda: count_running(watching, JOB.owner, 16))
        late = dataclasses.replace(JOB, id="batch_bob", owner="bob", expires_at=2**41)
        await store.add_job(late, 100)
        await until(lambda: count_running(watching, "bob", 1))
        still = await count_running(watching, JOB.owner, 16)

    assert still


async def count_running(watching: Ownership, owner: str, number: int) -> bool:
    jobs = await watching.list_open()
    return sum(job.owner == owner and bool(job.worker) for job in jobs) == number
