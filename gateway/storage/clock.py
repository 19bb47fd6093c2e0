"""What time it is for what is kept with an end: batches that expire, files that are thrown away.

The clock of a host jumps: somebody sets it, a machine wakes up, a time server was wrong. A day that
is over an hour early cannot be given back, so what has an end is judged by a time that makes a jump
up slowly and never runs backwards. What is written down has the host's time, or the slow one where
that is ahead: whoever starts later goes by the host's clock, and must not find it over already.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import structlog

log = structlog.get_logger("gateway")

_CATCH_UP = 0.1  # of what has passed: an hour is made up in ten
_JUMP_S = 60.0
_SURELY_WRONG_S = 1.7e9  # 2023: a clock that nobody has set yet


class SteadyClock:
    """Seconds since 1970, as the host's clock has them while that one does not jump."""

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        monotonic: Callable[[], float] = time.monotonic,
    ) -> None:
        self.wall, self.monotonic = wall, monotonic
        self._now, self._read_at = wall(), monotonic()
        self._has_jumped = False

    def now(self) -> float:
        read_at = self.monotonic()
        passed = read_at - self._read_at
        self._read_at = read_at
        self._now += passed
        wall = self.wall()
        if self._now < _SURELY_WRONG_S < wall:
            self._now = wall
        apart = wall - self._now
        most = passed * _CATCH_UP
        self._now += max(-most, min(most, apart))
        self._tell(apart)
        return self._now

    def stamp(self) -> int:
        """For what is kept: when it was, and what its end counts from."""
        return int(max(self.wall(), self.now()))

    def _tell(self, apart: float) -> None:
        """Once a jump."""
        has_jumped = abs(apart) > _JUMP_S
        if has_jumped and not self._has_jumped:
            log.warning("clock_jumped", seconds=round(apart))
        self._has_jumped = has_jumped
