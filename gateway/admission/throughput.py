"""How fast the engines are: how long who waits will have to, what is done in a time, and what lines
of batches cost those who wait.
"""

from __future__ import annotations

import statistics
import time
from collections import deque

# Shorter answers say more of how long a first token takes than of all the others.
_FEWEST_TOKENS = 8
_SHARE_OF_NEWEST = 0.1
# Of so many the latest tenth is no longer chance alone; a machine with other things to do makes
# some late beside lines and without.
_FEWEST_STREAMS = 24
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


def _late(seconds: deque[float]) -> float:
    return statistics.quantiles(seconds, n=10, method="inclusive")[8]


class FirstTokens:
    """How long streams take to their first token: beside lines of batches, and alone. One line is
    as good as none, so that what is known of a stream alone follows the load that there is.
    """

    def __init__(self) -> None:
        self._alone: deque[float] = deque(maxlen=4 * _FEWEST_STREAMS)
        self._beside: deque[float] = deque(maxlen=_FEWEST_STREAMS)
        self._since = 0  # streams alone since the last answer

    def learn(self, seconds: float, lines: int) -> None:
        if lines > 1:
            self._beside.append(seconds)
        else:
            self._alone.append(seconds)
            self._since += 1

    def forget_beside(self) -> None:
        """There were more lines then than there are now."""
        self._beside.clear()
        self._since = 0

    def take_slowdown(self) -> float | None:
        """Beside lines over alone, of the time that nine of ten keep within; each stream tells it
        once. 1 where there were no lines, `None` where nobody knows.
        """
        if len(self._alone) < _FEWEST_STREAMS:
            return None
        if len(self._beside) < _FEWEST_STREAMS:
            if self._since < _FEWEST_STREAMS:
                return None
            self.forget_beside()
            return 1.0
        slowdown = _late(self._beside) / _late(self._alone)
        self.forget_beside()
        return slowdown


class Pace:
    """How long a token of one sequence takes, by the answers that came to their end lately."""

    def __init__(self) -> None:
        self._token_s = 0.0

    def learn(self, tokens: float, seconds: float) -> None:
        if tokens >= _FEWEST_TOKENS and seconds > 0:  # else nobody has looked how long it took
            known_s, one_s = self._token_s, seconds / tokens
            self._token_s = known_s + (one_s - known_s) * _SHARE_OF_NEWEST if known_s else one_s

    def count_tokens(self, seconds: float) -> int:
        """What a sequence has come to in that time; 0 as long as nothing is known."""
        return int(seconds / self._token_s) if self._token_s else 0
