"""All of it put together: what the routes ask for, and what lives as long as the gateway."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

from gateway.admission.keys import Caller, Keyring
from gateway.admission.unattended import UnattendedCaller
from gateway.batches.blobs import Blobs, DiskBlobs
from gateway.batches.coordinator import Coordinator
from gateway.batches.ownership import Ownership
from gateway.batches.runner import JobRunner, OpenCount
from gateway.batches.shapes import PURPOSE, BatchRequest, FileRecord, JobRecord
from gateway.batches.store import Store, find_kept_s
from gateway.batches.uploads import Room, Upload
from gateway.batches.window import Windows
from gateway.config import PREFIX, Settings, SettingsError
from gateway.errors import Forbidden, InvalidRequest
from gateway.observability.metrics import Metrics
from gateway.storage.clock import SteadyClock
from gateway.storage.database import Database
from gateway.storage.rows import make_id

_BLOBS = "files"
_FILE = "batches.sqlite"


@dataclass(slots=True)
class Parts:
    """What it needs of the gateway."""

    keyring: Keyring
    caller: UnattendedCaller
    metrics: Metrics
    open_requests: OpenCount
    is_draining: Callable[[], bool]


class BatchService:
    """Files and batches of this gateway's callers."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self.clock = SteadyClock()
        self._blobs = open_blobs(settings)
        self._database = open_database(settings)
        self.store = Store(self._database, self.clock)
        self._coordinator: Coordinator | None = None
        self._rooms: dict[str, Room] = {}  # of callers who are sending files

    @asynccontextmanager
    async def run(self, parts: Parts) -> AsyncIterator[None]:
        """Batches are run inside of this; their database is opened when it is needed."""
        ownership = Ownership(self._database, secrets.token_hex(8), self.clock)
        caller = parts.caller
        windows = Windows(
            self._settings.batch_max_running, caller.count_interactive, caller.find_first_tokens
        )
        self._metrics.batch_window.read = lambda: [((), windows.limit)]
        self._metrics.batch_running.read = lambda: [((), windows.running)]
        aliases = self._settings.alias_map

        def build_runner(job: JobRecord) -> JobRunner:
            return JobRunner(
                job,
                ownership=ownership,
                blobs=self._blobs,
                caller=parts.caller,
                find_caller=parts.keyring.find_named,
                # A file that names several models, or none, is run by a window of its own.
                window=windows.find(aliases.get(job.model, job.model) if job.model else job.id),
                open_requests=parts.open_requests,
                is_draining=parts.is_draining,
                settings=self._settings,
                metrics=self._metrics,
                time=self.clock,
            )

        coordinator = self._coordinator = Coordinator(
            settings=self._settings,
            ownership=ownership,
            store=self.store,
            blobs=self._blobs,
            build_runner=build_runner,
            metrics=self._metrics,
            clock=self.clock,
        )
        looking = asyncio.create_task(coordinator.run())
        try:
            yield
        finally:
            looking.cancel()
            await asyncio.gather(looking, return_exceptions=True)
            await coordinator.stop()
            await self._database.close()

    @asynccontextmanager
    async def receive(self, caller: Caller) -> AsyncIterator[tuple[Upload, UploadEnd]]:
        """Where a file's bytes go; it is there once its end has been told."""
        lines = self._settings.batch_max_lines
        file_id = make_id("file-")
        end = UploadEnd()
        upload: Upload | None = None
        stored = await self.store.sum_bytes(caller.name)
        room = self._rooms.setdefault(caller.name, Room())
        room.bound = caller.batch_max_stored_bytes or self._settings.batch_max_stored_bytes
        room.stored = stored
        room.uploads += 1
        try:
            room.check(least=1)
            async with self._blobs.write(file_id) as writer:
                upload = Upload(
                    writer,
                    room,
                    max_bytes=min(self._settings.batch_max_file_bytes, room.bound - room.stored),
                    max_lines=min(lines, caller.batch_max_lines or lines),
                    max_line_bytes=self._settings.max_body_bytes,
                    most_items=self._settings.max_prompts,
                )
                yield upload, end
                await upload.finish()
            end.file = await self._keep(caller, file_id, upload, end)
        finally:
            room.uploads -= 1
            room.incoming -= upload.bytes if upload else 0
            if not room.uploads:
                self._rooms.pop(caller.name, None)

    async def _keep(
        self, caller: Caller, file_id: str, upload: Upload, end: UploadEnd
    ) -> FileRecord:
        now = self.clock.stamp()
        file = FileRecord(
            id=file_id,
            owner=caller.name,
            filename=end.filename,
            purpose=PURPOSE,
            bytes=upload.bytes,
            created_at=now,
            expires_at=now + find_kept_s(self._settings, caller, end.expires_s),
            blob=file_id,
            lines=len(upload.lines),
            url=upload.url,
            models=upload.models,
        )
        try:
            await self.store.add_file(file, upload.lines, upload.room.bound)
        except Forbidden:
            await self._blobs.delete(file_id)
            raise
        upload.room.stored += file.bytes
        return file

    def read(self, file: FileRecord) -> AsyncGenerator[bytes, None]:
        return self._blobs.read_all(file.blob)

    async def delete(self, caller: Caller, file_id: str) -> None:
        file = await self.store.delete_file(caller.name, file_id)
        await self._blobs.delete(file.blob)

    async def create(self, caller: Caller, asked: BatchRequest) -> JobRecord:
        """Everything that can be wrong with it is told at once."""
        caller.check_route(asked.endpoint)
        file = await self.store.find_file(caller.name, asked.input_file_id)
        if file.purpose != PURPOSE:
            raise InvalidRequest(
                f"{file.id} is a file of answers; a batch reads one that was uploaded with the "
                f"purpose {PURPOSE!r}",
                param="input_file_id",
            )
        if file.url != asked.endpoint:
            raise InvalidRequest(
                f"line 1: url is {file.url}, and the batch's endpoint is {asked.endpoint}",
                param="endpoint",
                code="mismatched_url",
            )
        for model in file.models if caller.models else ():
            caller.check_model(self._settings.alias_map.get(model, model))
        now = self.clock.stamp()
        job = JobRecord(
            id=make_id("batch_"),
            owner=caller.name,
            input_file_id=file.id,
            endpoint=asked.endpoint,
            completion_window=asked.completion_window,
            status="validating",
            created_at=now,
            expires_at=now + asked.window_s,
            total=file.lines,
            metadata=asked.metadata,
            model=file.models[0] if len(file.models) == 1 else None,
            output_expires_s=asked.output_expires_s,
        )
        await self.store.add_job(job, caller.batch_max_jobs or self._settings.batch_max_jobs)
        self.wake()
        return job

    async def cancel(self, caller: Caller, job_id: str) -> JobRecord:
        job = await self.store.cancel_job(caller.name, job_id)
        self.wake()
        return job

    def wake(self) -> None:
        if self._coordinator is not None:
            self._coordinator.wake()


@dataclass(slots=True)
class UploadEnd:
    """What is known of a file only when all of it is there."""

    filename: str = "batch.jsonl"
    expires_s: int | None = None
    file: FileRecord | None = None


def open_database(settings: Settings) -> Database:
    """PostgreSQL where it is named, else a file in the folder."""
    address: str | Path = settings.batch_database
    if not address:
        assert settings.batch_folder is not None  # noqa: S101 — the settings see to it
        address = _ensure_folder(settings.batch_folder) / _FILE
    return Database(address, setting="BATCH_DATABASE", keeps="files and batches")


def open_blobs(settings: Settings) -> Blobs:
    """A bucket where one is named, else the folder."""
    if not settings.batch_bucket:
        assert settings.batch_folder is not None  # noqa: S101 — the settings see to it
        return DiskBlobs(_ensure_folder(_ensure_folder(settings.batch_folder) / _BLOBS))
    if importlib.util.find_spec("obstore") is None:
        raise SettingsError(
            f"{PREFIX}BATCH_BUCKET needs the extra `s3`: pip install vllm-gateway[s3]"
        )
    from gateway.batches.s3_blobs import open_bucket  # noqa: PLC0415 — it is an extra

    return open_bucket(settings)


def _ensure_folder(folder: Path) -> Path:
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError as error:
        raise SettingsError(
            f"{PREFIX}BATCH_FOLDER: cannot make {folder} ({error.strerror})"
        ) from None
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SettingsError(f"{PREFIX}BATCH_FOLDER: {folder} may not be written")
    return folder
