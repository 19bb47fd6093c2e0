"""Counts that several workers share: places at the gate, allowances and use of keys, warm engines.

One file, mapped by every worker, and one lock around each change; with a single worker it is the
same code on private memory. Rows are found by a hash of their name, so that workers need not agree
on any order.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import mmap
import os
import struct
import threading
from collections.abc import Iterator
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
        self._thread_lock = threading.Lock()
        self._places: dict[str, int] = {}

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Nobody else changes anything meanwhile. Never awaits inside."""
        with self._thread_lock:
            if self._file is None:
                yield
                return
            fcntl.flock(self._file, fcntl.LOCK_EX)
            try:
                yield
            finally:
                fcntl.flock(self._file, fcntl.LOCK_UN)

    def row(self, name: str) -> Row:
        """The row of that name; made at first sight."""
        place = self._places.get(name)
        if place is None:
            with self.locked():
                place = self._places[name] = self._find(name)
        return Row(self._cells, place * FIELDS)

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
