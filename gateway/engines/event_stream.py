"""Server-sent events as an engine's stream brings them: in pieces."""

from __future__ import annotations

EVENT_ENDS = (b"\n\n", b"\r\n\r\n")
_LONGEST_BEGUN_END = max(map(len, EVENT_ENDS)) - 1


class UnfinishedEvent:
    """The beginning of an event whose end has not come yet, in the pieces in which it came: put
    together anew with each, a large one would take ever longer.
    """

    __slots__ = ("_pieces", "_tail", "is_there")

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._tail = b""  # an end may have begun
        self.is_there = False

    def complete(self, chunk: bytes) -> bytes:
        """Whole events; what is left of the chunk is kept."""
        seen = self._tail + chunk
        end = max(seen.rfind(mark) + len(mark) if mark in seen else 0 for mark in EVENT_ENDS)
        if end:
            self._pieces.append(chunk[: end - len(self._tail)])
            whole = b"".join(self._pieces)
            seen = chunk = chunk[end - len(self._tail) :]
            self._pieces.clear()
        else:
            whole = b""
        if chunk:
            self._pieces.append(chunk)
        self._tail = seen[-_LONGEST_BEGUN_END:]
        self.is_there = bool(self._pieces)
        return whole

    def take(self) -> bytes:
        """What there is of it."""
        return b"".join(self._pieces)
