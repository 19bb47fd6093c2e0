"""Whether a file has changed since the last look: by its stat, without a thread that waits."""

from __future__ import annotations

from pathlib import Path

_GONE = ()


class FileWatch:
    """The first look always finds a change. Ask before reading: what is written in between is found
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
