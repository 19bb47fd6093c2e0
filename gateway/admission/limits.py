"""Counts that a limit needs: allowances of a minute, and what is held at this moment.

`Limits` is all that the gateway asks of whoever keeps them. `LocalLimits` keeps them in this
process, so each of several replicas grants a key's limit anew; where a limit must hold over all of
them, the counts lie elsewhere behind the same four questions.
"""

from __future__ import annotations

import time
from collections import defaultdict
from dataclasses import dataclass
from typing import Protocol

# What counts as nothing left: an allowance is paid back when it is above this.
_LEAST = 1e-9


class Limits(Protocol):
    """Names are accounts of the caller's choice; amounts are requests, tokens or sequences."""

    async def take(self, account: str, amount: float, per_minute: int) -> float:
        """Takes the amount from the minute's allowance. Where it is not there, nothing is taken,
        and the seconds until it is are returned; with an amount of 0: until nothing is overdrawn.
        """

    async def overdraw(self, account: str, amount: float, per_minute: int) -> None:
        """Takes the amount whatever is left: what a request used is known when it is over. One
        below 0 is given back: it was taken for what might have been used.
        """

    async def hold(self, account: str, amount: int, most: int) -> int:
        """Holds the amount, unless that makes more than `most`: then what is held is returned.
        0: it is held. Whoever holds nothing may hold more than that at once.
        """

    async def release(self, account: str, amount: int) -> None:
        """Gives back what was held."""


@dataclass(slots=True)
class _Allowance:
    """A minute's allowance that refills steadily."""

    left: float
    filled_at: float

    def refill(self, per_minute: int) -> None:
        now = time.monotonic()
        gained = (now - self.filled_at) * per_minute / 60
        self.left, self.filled_at = min(float(per_minute), self.left + gained), now


class LocalLimits:
    """In this process: nothing here waits for anything."""

    def __init__(self) -> None:
        self._allowances: dict[str, _Allowance] = {}
        self._held: defaultdict[str, int] = defaultdict(int)

    async def take(self, account: str, amount: float, per_minute: int) -> float:
        allowance = self._refill(account, per_minute)
        missing = max(amount, _LEAST) - allowance.left
        if missing > 0:
            return missing * 60 / per_minute
        allowance.left -= amount
        return 0.0

    async def overdraw(self, account: str, amount: float, per_minute: int) -> None:
        self._refill(account, per_minute).left -= amount

    async def hold(self, account: str, amount: int, most: int) -> int:
        held = self._held[account]
        if held and held + amount > most:
            return held
        self._held[account] = held + amount
        return 0

    async def release(self, account: str, amount: int) -> None:
        self._held[account] -= amount
        if not self._held[account]:
            del self._held[account]

    def _refill(self, account: str, per_minute: int) -> _Allowance:
        allowance = self._allowances.get(account)
        if allowance is None:
            allowance = _Allowance(float(per_minute), time.monotonic())
            self._allowances[account] = allowance
        allowance.refill(per_minute)
        return allowance
