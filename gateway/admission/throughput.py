"""How fast the engines are: what the queue tells who waits, and how long they will have to."""

from __future__ import annotations

import time

# Completions older than a few of these no longer say how fast the engines are.
_HALF_LIFE_S = 10.0
_NOTHING = 1e-3


class Throughput:
    """Sequences a second while there was work: counts that fade with busy time."""

    def __init__(self) -> None:
        self._count = 0.0
        self._busy_s = 0.0
        self._last = time.monotonic()

    def tick(self, *, is_busy: bool) -> None:
        """Called before the number of running sequences changes."""
        now = time.monotonic()
        elapsed_s, self._last = now - self._last, now
        if is_busy:
            keep = 0.5 ** (elapsed_s / _HALF_LIFE_S)
            self._count *= keep
            self._busy_s = self._busy_s * keep + elapsed_s

    def count(self, sequences: int) -> None:
        self._count += sequences

    def time_for(self, sequences: int) -> float:
        if self._count < _NOTHING:
            return 1.0  # nothing learnt yet
        return sequences * self._busy_s / self._count
