"""The bytes of files in a bucket of S3 or of what speaks its protocol.

obstore does the protocol: signing, parts, retries, TLS, in threads of its own, with no dependencies
but itself. Nothing is read or written in one long request: each is bounded in size and time, so
that neither a slow reader nor a storage that is away keeps anything for ever.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator
from contextlib import AbstractContextManager, asynccontextmanager, contextmanager, suppress
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

import obstore
import structlog
from obstore.exceptions import BaseError
from obstore.store import S3Store

from gateway.batches.blobs import BlobWriter
from gateway.config import PREFIX, Settings, SettingsError
from gateway.errors import GatewayError, NotFound, StorageFull, StorageUnavailable

log = structlog.get_logger("gateway")

_PART_BYTES = 5 * 2**20  # the smallest that S3 takes
_MOST_PARTS = 9_000  # it takes 10,000 of a file
_PIECE_BYTES = 2**22
_CONNECT_TIMEOUT_S, _REQUEST_TIMEOUT_S = 5, 30
_RETRIES, _RETRIED_S = 3, 20
_ABORT_S = 10.0
_RETRY_AFTER_S = 2.0

# Where the library looks for credentials by itself, in the words of AWS.
_CREDENTIALS = (
    "AWS_ACCESS_KEY_ID",
    "AWS_WEB_IDENTITY_TOKEN_FILE",
    "AWS_CONTAINER_CREDENTIALS_RELATIVE_URI",
    "AWS_CONTAINER_CREDENTIALS_FULL_URI",
)
_CODE = re.compile(r"<Code>(\w+)</Code>")
_BELOW = re.compile(r'message: "([^"<]{1,200})"')  # of the operating system
_STATUS = re.compile(r"status code: (\d{3})")
_FULL = ("QuotaExceeded", "StorageFull", "InsufficientStorage")
# A bucket may have other things in it: what may be thrown away has a name as we make one.
_OURS = re.compile(r"file-[0-9a-f]{32}|batch_[0-9a-f]{32}-\d+-[0-9a-f]{8}-(output|errors)")


def open_bucket(settings: Settings) -> S3Blobs:
    """Its own settings first, then what stands in the environment in AWS's words."""
    place = urlsplit(settings.batch_bucket)
    options: dict[str, Any] = {}
    if settings.batch_s3_endpoint:
        options["endpoint"] = settings.batch_s3_endpoint
    if settings.batch_s3_region:
        options["region"] = settings.batch_s3_region
    if settings.batch_s3_key:
        options["access_key_id"], _, options["secret_access_key"] = settings.batch_s3_key.partition(
            ":"
        )
    elif not any(os.environ.get(name) for name in _CREDENTIALS):
        raise SettingsError(
            f"{PREFIX}BATCH_BUCKET needs a key: set {PREFIX}BATCH_S3_KEY, or AWS_ACCESS_KEY_ID "
            "and AWS_SECRET_ACCESS_KEY"
        )
    try:
        store = S3Store(
            place.netloc,
            prefix=place.path.strip("/") or None,
            client_options={
                "allow_http": True,
                "connect_timeout": timedelta(seconds=_CONNECT_TIMEOUT_S),
                "timeout": timedelta(seconds=_REQUEST_TIMEOUT_S),
            },
            retry_config={
                "max_retries": _RETRIES,
                "retry_timeout": timedelta(seconds=_RETRIED_S),
            },
            **options,
        )
    except BaseError as error:
        raise SettingsError(f"{PREFIX}BATCH_BUCKET: {_shorten(str(error))}") from None
    part_bytes = max(_PART_BYTES, settings.batch_max_file_bytes // _MOST_PARTS)
    return S3Blobs(store, place.netloc, part_bytes)


class S3Blobs:
    """An object each below one prefix; it is there whole, or not at all."""

    def __init__(self, store: S3Store, bucket: str, part_bytes: int) -> None:
        self._store, self._bucket, self._part_bytes = store, bucket, part_bytes

    @asynccontextmanager
    async def write(self, name: str) -> AsyncIterator[BlobWriter]:
        with self._translate():
            file = obstore.open_writer_async(
                self._store, name, buffer_size=self._part_bytes, max_concurrency=1
            )
        try:
            yield _S3Writer(file, 2 * self._part_bytes, self._translate)
            with self._translate():
                await file.close()
        except BaseException as error:
            # The parts that are there would be paid for, and are on no list of files.
            with suppress(BaseError, OSError, TimeoutError):
                async with asyncio.timeout(_ABORT_S):
                    await file.__aexit__(type(error), error, None)
            raise

    async def read(self, name: str, start: int, size: int) -> bytes:
        """`NotFound` where it is not there, or shorter than it was."""
        with self._translate():
            data = await obstore.get_range_async(self._store, name, start=start, length=size)
        if len(data) < size:
            raise NotFound("the file is shorter than it was", code="file_lost")
        return bytes(data)

    async def read_all(self, name: str) -> AsyncGenerator[bytes, None]:
        with self._translate():
            first = await obstore.get_async(self._store, name, options={"range": (0, _PIECE_BYTES)})
            size = first.meta["size"]
            piece = bytes(await first.bytes_async())
        at = 0
        while piece:
            yield piece
            at += len(piece)
            piece = await self.read(name, at, min(_PIECE_BYTES, size - at)) if at < size else b""

    async def delete(self, name: str) -> None:
        with suppress(NotFound), self._translate():
            await obstore.delete_async(self._store, name)

    async def list_older_than(self, moment: float) -> list[str]:
        """By the storage's clock. What is left of uploads that a killed gateway had begun is on no
        list: a rule of the bucket throws it away.
        """
        names: list[str] = []
        with self._translate():
            async for some in obstore.list(self._store):
                names += [
                    one["path"]
                    for one in some
                    if one["last_modified"].timestamp() < moment and _OURS.fullmatch(one["path"])
                ]
        return names

    @contextmanager
    def _translate(self) -> Iterator[None]:
        """No message of the storage's goes to callers or whole into the log: some have what was
        signed in them.
        """
        try:
            yield
        except (BaseError, OSError) as error:
            raise self._explain(error) from None

    def _explain(self, error: Exception) -> GatewayError:
        text = str(error)
        code, status = _find(_CODE, text), _find(_STATUS, text)
        is_gone = isinstance(error, FileNotFoundError) or status == "416"  # shorter than it was
        if is_gone and code != "NoSuchBucket":
            return NotFound("the file's bytes are not there any more", code="file_lost")
        if status == "507" or any(one in code for one in _FULL):
            return StorageFull("there is no room left for files of batches; delete some, or later")
        reason = code or _shorten(text)
        log.warning(
            "storage_failed", keeps="the bytes of files", bucket=self._bucket, reason=reason
        )
        return StorageUnavailable(
            "the storage of files and batches does not answer as it should "
            f"({_HINTS.get(code, 'try again')})",
            retry_after_s=_RETRY_AFTER_S,
        )


_HINTS = {
    "NoSuchBucket": f"its bucket is not there: the operator sets {PREFIX}BATCH_BUCKET",
    "AccessDenied": "it refuses the gateway's key: its operator has to allow it",
    "InvalidAccessKeyId": "it does not know the gateway's key: its operator has to set another",
    "SignatureDoesNotMatch": "it refuses the gateway's key: its operator has to set another",
    "ExpiredToken": "the gateway's key has expired: its operator has to set another",
    "RequestTimeTooSkewed": "its clock and the gateway's differ: the operator has to set them",
}


class _S3Writer:
    def __init__(
        self, file: Any, most_held: int, translate: Callable[[], AbstractContextManager[None]]
    ) -> None:
        self._file, self._most_held, self._translate = file, most_held, translate
        self._written = 0

    @property
    def held_bytes(self) -> int:
        """The part that is being filled, and the one on its way."""
        return min(self._written, self._most_held)

    async def write(self, data: bytes) -> None:
        self._written += len(data)
        with self._translate():
            await self._file.write(data)


def _find(pattern: re.Pattern[str], text: str) -> str:
    found = pattern.search(text)
    return found[1] if found else ""


def _shorten(text: str) -> str:
    """What went wrong, without what the storage's page has of our request."""
    first = text.partition("<")[0].partition("\n")[0].strip()
    below = _BELOW.search(text)
    return (f"{first} ({below[1]})" if below else first or "no answer")[:300]
