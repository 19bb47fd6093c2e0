"""Counts that several workers share: places at the gate, allowances and use of keys, warm engines.

One file, mapped by every worker, and one lock around each change; with a single worker it is the
same code on private memory. Rows are found by a hash of their name, so that workers need not agree
on any order. It grows: a row is 64 bytes, and one for each key there ever was is never the matter.
"""

from __future__ import annotations

import fcntl
import hashlib
import itertools
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from aiohttp import web

LEDGER_NAME: Final = "ledger"
FIRST_SLOTS: Final = 2048
FIELDS: Final = 8
_EMPTY: Final = 0.0
_FIRST_SIZE: Final = FIRST_SLOTS * FIELDS * struct.calcsize("d")  # whole pages, as mmap wants
_STEPS: Final = 32


class Ledger:
    """A table of named rows of numbers. Field 0 is the name's hash; the rest is the caller's.

    Each of its leaves has twice the slots of the one before. A name lies in the first leaf that had
    a slot for it within a few steps of its place; rows never go, so all workers find the same.
    """

    def __init__(self, path: Path | None = None) -> None:
        self._file = open(path, "r+b") if path else None  # noqa: SIM115, PTH123 — held open
        self._leaves: list[_Leaf] = []
        self.lock = _Lock(self._file.fileno() if self._file else None)
        self._rows: dict[str, Row] = {}

    def row(self, name: str) -> Row:
        """The row of that name; made at first sight."""
        row = self._rows.get(name)
        if row is None:
            with self.lock:
                row = self._rows[name] = self._find(name)
        return row

    def _find(self, name: str) -> Row:
        digest = hashlib.blake2b(name.encode(), digest_size=6).digest()
        key = int.from_bytes(digest, "big") + 1  # 48 bits: exact in a double, never zero
        rows = (leaf.find(key) for leaf in self._open_leaves())
        return next(row for row in rows if row is not None)

    def _open_leaves(self) -> Iterator[_Leaf]:
        for number in itertools.count():
            if number == len(self._leaves):
                self._leaves.append(_Leaf(number, self._file.fileno() if self._file else None))
            yield self._leaves[number]

    def close(self) -> None:
        for leaf in self._leaves:
            leaf.close()
        if self._file is not None:
            self._file.close()


class _Leaf:
    """A part of the table; the file is made longer by whoever needs the part first."""

    def __init__(self, number: int, descriptor: int | None) -> None:
        self._slots = FIRST_SLOTS << number
        start, size = ((1 << number) - 1) * _FIRST_SIZE, _FIRST_SIZE << number
        if descriptor is None:
            self._memory = mmap.mmap(-1, size)
        else:
            if os.fstat(descriptor).st_size < start + size:
                os.truncate(descriptor, start + size)
            self._memory = mmap.mmap(descriptor, size, offset=start)
        self._cells = memoryview(self._memory).cast("d")

    def find(self, key: int) -> Row | None:
        """The key's row, or a free one made its; `None` when all around its place are others'."""
        for step in range(_STEPS):
            start = (key + step) % self._slots * FIELDS
            if self._cells[start] == _EMPTY:
                self._cells[start] = float(key)
            if self._cells[start] == key:
                return Row(self._cells, start)
        return None

    def close(self) -> None:
        self._cells.release()
        self._memory.close()


class _Lock:
    """Nobody else changes anything meanwhile; never held over an await.

    Alone there is nobody else: a worker has one thread that counts.
    """

    __slots__ = ("_descriptor",)

    def __init__(self, descriptor: int | None) -> None:
        self._descriptor = descriptor

    def __enter__(self) -> None:
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_EX)

    def __exit__(self, *_: object) -> None:
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)


class Row:
    """One name's numbers, fields 1 and up."""

    __slots__ = ("_cells", "_start")

    def __init__(self, cells: memoryview[float], start: int) -> None:
        self._cells = cells
        self._start = start

    def __getitem__(self, field: int) -> float:
        return self._cells[self._start + field]

    def __setitem__(self, field: int, value: float) -> None:
        self._cells[self._start + field] = value


LEDGER = web.AppKey("ledger", Ledger)


def make_ledger_file(folder: Path) -> Path:
    path = folder / LEDGER_NAME
    descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o600)
    os.truncate(descriptor, _FIRST_SIZE)
    os.close(descriptor)
    return path
