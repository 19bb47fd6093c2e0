"""A file as it comes in: each line is judged as it passes, and no more than one is in memory."""

from __future__ import annotations

import asyncio
import hashlib
from dataclasses import dataclass

from gateway.batches.blobs import BlobWriter
from gateway.batches.shapes import Line, parse_line
from gateway.batches.store import StoredLine, refuse_storage
from gateway.errors import InvalidRequest, PayloadTooLarge

_MOST_MODELS = 100
_LINES_AT_ONCE = 50  # judged between two looks at the event loop
_PIECE_BYTES = 2**16


@dataclass(slots=True, eq=False)
class Room:
    """What an owner's files may still take, those that are just coming in counted with the rest."""

    bound: int = 0
    stored: int = 0
    incoming: int = 0
    uploads: int = 0

    def check(self, least: int = 0) -> None:
        """`Forbidden` where so much more has no place."""
        if self.stored + self.incoming + least > self.bound:
            raise refuse_storage(self.stored, self.bound)


class Upload:
    """One file of requests on its way into the store."""

    def __init__(
        self,
        writer: BlobWriter,
        room: Room,
        *,
        max_bytes: int,
        max_lines: int,
        max_line_bytes: int,
        most_items: int,
    ) -> None:
        self._writer, self.room = writer, room
        self._max_bytes, self._max_lines = max_bytes, max_lines
        self._max_line_bytes, self._most_items = max_line_bytes, most_items
        self._rest = bytearray()  # of a line whose end has not come
        self._start = 0  # of that line in the file
        self._number = 0  # of lines begun, blank ones included
        self._ids: set[bytes] = set()
        self.bytes = 0
        self.lines: list[StoredLine] = []
        self.url = ""
        self.models: list[str] = []

    @property
    def held_bytes(self) -> int:
        return len(self._rest) + self._writer.held_bytes

    async def add(self, data: bytes) -> None:
        self.bytes += len(data)
        self.room.incoming += len(data)
        if self.bytes > self._max_bytes:
            raise PayloadTooLarge(
                f"the file is larger than {self._max_bytes} bytes; cut it in parts"
            )
        self.room.check()
        await self._writer.write(data)
        *whole, rest = data.split(b"\n")
        for piece in whole:
            self._rest += piece
            await self._end_line(ends=1)
        self._rest += rest
        self._check_length(self._rest, self._number + 1)

    async def finish(self) -> None:
        if self._rest:
            await self._end_line(ends=0)
        if not self.lines:
            raise InvalidRequest("the file has no lines", param="file", code="empty_file")

    async def _end_line(self, ends: int) -> None:
        self._number += 1
        line, start = bytes(self._rest), self._start
        self._start += len(line) + ends
        self._rest.clear()
        if line.strip():
            await self._take_line(line, start)
        # Whatever is in it: a megabyte of line breaks is a million of them.
        if self._number % _LINES_AT_ONCE == 0 or len(line) > _PIECE_BYTES:
            await asyncio.sleep(0)

    async def _take_line(self, line: bytes, start: int) -> None:
        self._check_length(line, self._number)
        if len(self.lines) == self._max_lines:
            raise InvalidRequest(
                f"line {self._number}: a file may have {self._max_lines} requests; cut it in parts",
                param="file",
                code="too_many_lines",
            )
        found = await parse_line(line, self._number, self._most_items)
        self._check_alike(found)
        at = start + found.body_start
        one = (len(self.lines), found.custom_id, at, found.body_size, found.prefix)
        self.lines.append(one)

    def _check_alike(self, line: Line) -> None:
        """What a file's lines must have in common, and what not."""
        # Fifty thousand long ids are megabytes; what is alike in 16 bytes is the same.
        digest = hashlib.blake2b(line.custom_id.encode(), digest_size=16).digest()
        if digest in self._ids:
            raise InvalidRequest(
                f"line {self._number}: the custom_id {line.custom_id[:100]!r} is there twice",
                param="custom_id",
                code="duplicate_custom_id",
            )
        self._ids.add(digest)
        self.url = self.url or line.url
        if line.url != self.url:
            raise InvalidRequest(
                f"line {self._number}: url is {line.url}, and that of the lines before is "
                f"{self.url}; a batch has one",
                param="url",
                code="mismatched_url",
            )
        if line.model is not None and line.model not in self.models:
            if len(self.models) == _MOST_MODELS:
                raise InvalidRequest(
                    f"line {self._number}: a file may name {_MOST_MODELS} models", param="model"
                )
            self.models.append(line.model)

    def _check_length(self, line: bytes | bytearray, number: int) -> None:
        if len(line) > self._max_line_bytes:
            raise PayloadTooLarge(
                f"line {number} is longer than {self._max_line_bytes} bytes, which is all that one "
                "request may have"
            )
