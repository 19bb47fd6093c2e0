"""How fast the engines are: how long who waits will have to, and what is done in a time."""

from __future__ import annotations

import time

# Shorter answers say more of how long a first token takes than of all the others.
_FEWEST_TOKENS = 8
_SHARE_OF_NEWEST = 0.1
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
