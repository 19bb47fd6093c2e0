"""Files that the programs read and write for themselves: without waiting for anybody, and whole."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

_GONE = ()
PART = ".part"  # what a killed program may leave of a file


def read_file(path: Path, most_bytes: int = -1) -> bytes:
    """OSError for what is no file: a FIFO would keep the program until somebody writes, and some
    devices never end.
    """
    # Opened first, then looked at: what lies there may be exchanged in between.
    fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        kind = os.fstat(fd).st_mode
        if stat.S_ISDIR(kind):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(kind):
            raise OSError(errno.EINVAL, "a FIFO or a device, where a file is wanted", str(path))
        with os.fdopen(fd, "rb", closefd=False) as file:
            return file.read(most_bytes)
    finally:
        os.close(fd)


def read_text(path: Path) -> str:
    """UTF-8, with the ends of lines that Python's own `open` makes."""
    return read_file(path).decode().replace("\r\n", "\n").replace("\r", "\n")


def write_file(path: Path, text: str) -> None:
    """All of it or, on a disk that is full, nothing: what was there before stays then."""
    part = path.with_name(f"{path.name}{PART}")
    try:
        with part.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # some file systems tell only now that they are full
        part.replace(path)
    except OSError:
        part.unlink(missing_ok=True)
        raise


class FileWatch:
    """Whether a file has changed since the last look: by its stat, without a thread that waits.

    The first look always finds a change. Ask before reading: what is written in between is found
    by the next look.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._stamp: tuple[int, ...] | None = None

    @property
    def is_gone(self) -> bool:
        """Whether the last look found no file."""
        return self._stamp == _GONE

    def has_changed(self) -> bool:
        """Once for every change; that the file vanished is one."""
        before = self._stamp
        try:
            status = self.path.stat()
            self._stamp = (status.st_mtime_ns, status.st_ino, status.st_size)
        except OSError:
            self._stamp = _GONE
        return self._stamp != before
