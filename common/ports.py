"""Free ports of this machine, which no other process that asks here is given meanwhile.

A server binds its port some seconds after it was chosen. One that the kernel hands out, as to every
connection that goes out, may be somebody else's by then; these lie below its range, in blocks that
a lock keeps for one process as long as it lives.
"""

from __future__ import annotations

import fcntl
import functools
import itertools
import os
import random
import socket
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path

_FIRST, _BLOCK, _BLOCKS = 10_240, 64, 340  # up to 32,000
_MOST_BLOCKS = 4  # of one process, which then begins anew with its own
_ONE_BY_ONE = threading.Lock()


class NoFreePort(RuntimeError):
    pass


def find_free_ports(count: int) -> list[int]:
    with _ONE_BY_ONE:
        return list(itertools.islice(_list_own(), count))


def find_free_row(count: int) -> int:
    """The first of so many neighbours."""
    with _ONE_BY_ONE:
        row: list[int] = []
        for port in _list_own():
            row = [*row, port] if row and port == row[-1] + 1 else [port]
            if len(row) == count:
                break
        return row[0]


@functools.cache
def _list_own() -> Iterator[int]:
    return _list_free()


def _list_free() -> Iterator[int]:
    taken = 0
    for port in _list_kept():
        if _is_free(port):
            taken = 0
            yield port
        elif (taken := taken + 1) > 2 * _MOST_BLOCKS * _BLOCK:
            _list_own.cache_clear()
            raise NoFreePort("something listens at each of this process's ports")


def _list_kept() -> Iterator[int]:
    starts: list[int] = []
    for number in random.sample(range(_BLOCKS), _BLOCKS):
        if len(starts) < _MOST_BLOCKS and _lock(number) is not None:
            starts.append(_FIRST + number * _BLOCK)
            yield from range(starts[-1], starts[-1] + _BLOCK)
    if not starts:
        _list_own.cache_clear()  # later there may be some
        raise NoFreePort(f"all ports from {_FIRST} on are kept by other processes")
    for start in itertools.cycle(starts):
        yield from range(start, start + _BLOCK)


def _lock(number: int) -> int | None:
    """What is open for as long as the process lives."""
    folder = Path(tempfile.gettempdir()) / f"vllm-gateway-ports-{os.getuid()}"
    folder.mkdir(mode=0o700, exist_ok=True)
    try:
        # The folder of files for a while is everybody's: no name in it leads to a file elsewhere.
        lock = os.open(folder / str(number), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o600)
    except OSError:
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(lock)
        return None
    return lock


def _is_free(port: int) -> bool:
    with socket.socket() as one:
        try:
            one.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True
