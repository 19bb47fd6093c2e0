"""Counts that several workers share: places at the gate, allowances and use of keys, warm engines.

One file, mapped by every worker, and one lock around each change; with a single worker it is the
same code on private memory. Rows are found by a hash of their name, so that workers need not agree
on any order.
"""

from __future__ import annotations

import fcntl
import hashlib
import mmap
import os
import struct
from pathlib import Path
from typing import Final

from aiohttp import web

LEDGER_NAME: Final = "ledger"
SLOTS: Final = 2048
FIELDS: Final = 8
_EMPTY: Final = 0.0
_SIZE: Final = SLOTS * FIELDS * struct.calcsize("d")


class LedgerFull(Exception):
    """More names than slots: more keys and engines than this table was made for."""


class Ledger:
    """A table of named rows of numbers. Field 0 is the name's hash; the rest is the caller's."""

    def __init__(self, path: Path | None = None) -> None:
        self._file = open(path, "r+b") if path else None  # noqa: SIM115, PTH123 — held open
        self._memory = mmap.mmap(self._file.fileno() if self._file else -1, _SIZE)
        self._cells = memoryview(self._memory).cast("d")
        self.lock = _Lock(self._file.fileno() if self._file else None)
        self._rows: dict[str, Row] = {}

    def row(self, name: str) -> Row:
        """The row of that name; made at first sight."""
        row = self._rows.get(name)
        if row is None:
            with self.lock:
                row = self._rows[name] = Row(self._cells, self._find(name) * FIELDS)
        return row

    def _find(self, name: str) -> int:
        digest = hashlib.blake2b(name.encode(), digest_size=6).digest()
        key = float(int.from_bytes(digest, "big") + 1)  # 48 bits: exact in a double, never zero
        for step in range(SLOTS):
            place = (int(key) + step) % SLOTS
            held = self._cells[place * FIELDS]
            if held == key:
                return place
            if held == _EMPTY:
                self._cells[place * FIELDS] = key
                return place
        raise LedgerFull(f"{SLOTS} names are the most")

    def close(self) -> None:
        self._cells.release()
        self._memory.close()
        if self._file is not None:
            self._file.close()


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
    os.truncate(descriptor, _SIZE)
    os.close(descriptor)
    return path
