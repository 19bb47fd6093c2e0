"""The bytes of files. `Blobs` is all that is asked of whoever keeps them; `DiskBlobs` keeps them in
a folder, `s3_blobs.py` in a bucket. What they mean stands in the database.
"""

from __future__ import annotations

import asyncio
import errno
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, suppress
from io import BufferedReader
from pathlib import Path
from typing import BinaryIO, Protocol

from gateway.errors import GatewayError, NotFound, StorageFull, StorageUnavailable

_PIECE_BYTES = 2**20
_NAME = re.compile(r"[\w.-]{1,100}")
_UNFINISHED = ".part"


class BlobWriter(Protocol):
    """What has been written when the block of `async with` ends well is there; else nothing is."""

    async def write(self, data: bytes) -> None: ...

    @property
    def held_bytes(self) -> int:
        """What of it is in memory, beyond a small and constant part."""


class Blobs(Protocol):
    """Names are of this program's making."""

    def write(self, name: str) -> AbstractAsyncContextManager[BlobWriter]: ...

    async def read(self, name: str, start: int, size: int) -> bytes: ...

    def read_all(self, name: str) -> AsyncGenerator[bytes, None]: ...

    async def delete(self, name: str) -> None: ...

    async def list_older_than(self, moment: float) -> list[str]: ...


class DiskBlobs:
    """A file each in one folder; it is there whole and under its name, or not at all."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    @asynccontextmanager
    async def write(self, name: str) -> AsyncIterator[BlobWriter]:
        path = self._path(name)
        unfinished = path.with_name(path.name + _UNFINISHED)
        try:
            file = await asyncio.to_thread(unfinished.open, "wb")
            try:
                writer = _DiskWriter(file)
                yield writer
                await writer.flush()
                await asyncio.to_thread(os.fsync, file.fileno())
            finally:
                await asyncio.to_thread(file.close)
            await asyncio.to_thread(self._publish, unfinished, path)
        except OSError as error:
            raise _translate(error) from error
        finally:
            with suppress(OSError):
                unfinished.unlink(missing_ok=True)

    async def read(self, name: str, start: int, size: int) -> bytes:
        """`NotFound` where it is not there, or shorter than it was."""
        try:
            data = await asyncio.to_thread(_read, self._path(name), start, size)
        except OSError as error:
            raise _translate(error) from error
        if len(data) < size:
            raise NotFound("the file is shorter than it was", code="file_lost")
        return data

    async def read_all(self, name: str) -> AsyncGenerator[bytes, None]:
        try:
            file = await _open(self._path(name))
            try:
                while piece := await asyncio.to_thread(file.read, _PIECE_BYTES):
                    yield piece
            finally:
                file.close()  # here, for who reads may be cancelled at any wait
        except OSError as error:
            raise _translate(error) from error

    async def delete(self, name: str) -> None:
        try:
            await asyncio.to_thread(self._path(name).unlink, missing_ok=True)
        except OSError as error:
            raise _translate(error) from error

    async def list_older_than(self, moment: float) -> list[str]:
        """Those, and what was left of some, that have been as they are since before it."""
        try:
            return await asyncio.to_thread(self._list, moment)
        except OSError as error:
            raise _translate(error) from error

    def _list(self, before: float) -> list[str]:
        names = []
        for entry in os.scandir(self._folder):
            with suppress(FileNotFoundError):
                if _NAME.fullmatch(entry.name) and entry.stat().st_mtime < before:
                    names.append(entry.name)
        return names

    def _publish(self, unfinished: Path, path: Path) -> None:
        unfinished.replace(path)
        folder = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name) or name.startswith("."):
            raise NotFound("there is no such file")
        return self._folder / name


class _DiskWriter:
    """Gathers what is small: each write is a way to a thread and back."""

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._held = bytearray()

    @property
    def held_bytes(self) -> int:
        return 0

    async def write(self, data: bytes) -> None:
        self._held += data
        if len(self._held) >= _PIECE_BYTES:
            await self.flush()

    async def flush(self) -> None:
        held, self._held = self._held, bytearray()
        await asyncio.to_thread(self._write, held)

    def _write(self, data: bytearray) -> None:
        self._file.write(data)
        self._file.flush()


async def _open(path: Path) -> BufferedReader:
    """Closed again where nobody waits for it any more."""
    opening = asyncio.create_task(asyncio.to_thread(path.open, "rb"))
    try:
        return await asyncio.shield(opening)
    except asyncio.CancelledError:
        opening.add_done_callback(_close)
        raise


def _close(opened: asyncio.Task[BufferedReader]) -> None:
    if opened.exception() is None:
        opened.result().close()


def _read(path: Path, start: int, size: int) -> bytes:
    with path.open("rb", buffering=0) as file:
        file.seek(start)
        return file.read(size)


def _translate(error: OSError) -> GatewayError:
    if error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
        return StorageFull("there is no room left for files of batches; delete some, or later")
    if isinstance(error, FileNotFoundError):
        return NotFound("the file's bytes are not there any more", code="file_lost")
    return StorageUnavailable(
        f"the folder of files and batches does not answer ({error.strerror})", retry_after_s=2
    )
