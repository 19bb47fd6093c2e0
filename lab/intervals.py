"""Statistics: means, quantiles, and the intervals that hold the truth in 95 of 100 cases."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

# A median's 95 % interval by order statistics needs six values.
FEWEST_ROUNDS = 6
_RESAMPLES = 10_000
# Student's t, two-sided 95 %, by degrees of freedom; in between the row below holds.
_T_95 = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262,
    10: 2.228, 12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980,
}  # fmt: skip


def mean(values: Sequence[float]) -> float:
    """As the course takes it: the sum in the answers' order, divided."""
    return sum(values) / len(values) if values else 0.0


def quantile(values: Sequence[float], share: float) -> float:
    """To a thousandth, linear between neighbours; 0 for no values."""
    if len(values) < 2:
        return values[0] if values else 0.0
    return statistics.quantiles(values, n=1000, method="inclusive")[round(share * 1000) - 1]


@dataclass(frozen=True)
class Interval:
    """A median and the interval that holds the true one in 95 of 100 cases.

    Below six rounds no such interval exists; `low` and `high` are then all that was seen.
    """

    value: float
    low: float
    high: float
    rounds: int

    @property
    def is_sure(self) -> bool:
        return self.rounds >= FEWEST_ROUNDS

    @property
    def half(self) -> float:
        return (self.high - self.low) / 2

    def describe(self) -> str:
        return f"{self.low:.3f} to {self.high:.3f}"


def find_interval(values: Sequence[float]) -> Interval:
    """By rank, so that a few rounds in which the machine did something else say little."""
    ordered, rounds = sorted(values), len(values)
    # How many of the lowest (and of the highest) values may be left out.
    shares = (math.comb(rounds, k) * 0.5**rounds for k in range((rounds - 1) // 2))
    outside = max(0, sum(tail <= 0.025 for tail in itertools.accumulate(shares)) - 1)
    low, high = ordered[outside], ordered[rounds - 1 - outside]
    return Interval(statistics.median(ordered), low, high, rounds)


def bootstrap(changes: Sequence[float]) -> tuple[float, float]:
    """95 of 100 resampled means lie between the two; always the same for the same data."""
    if not any(changes):
        return 0.0, 0.0
    chance = random.Random(len(changes))
    count = len(changes)
    means = [sum(chance.choices(changes, k=count)) / count for _ in range(_RESAMPLES)]
    return quantile(means, 0.025), quantile(means, 0.975)


def compare_speeds(old: Sequence[float], new: Sequence[float]) -> tuple[float, float, float]:
    """The relative change of the geometric means and its interval, by Welch on logarithms."""
    if min(*old, *new) <= 0:
        return 0.0, 0.0, 0.0
    before, after = [math.log(v) for v in old], [math.log(v) for v in new]
    change = statistics.mean(after) - statistics.mean(before)
    if min(len(before), len(after)) < 2:
        return math.expm1(change), -1.0, math.inf
    shares = [statistics.variance(v) / len(v) for v in (before, after)]
    error = math.sqrt(sum(shares))
    if not error:
        return (math.expm1(change),) * 3
    freedom = sum(shares) ** 2 / (
        shares[0] ** 2 / (len(before) - 1) + shares[1] ** 2 / (len(after) - 1)
    )
    t = next((t for least, t in reversed(_T_95.items()) if freedom >= least), _T_95[1])
    return math.expm1(change), math.expm1(change - t * error), math.expm1(change + t * error)
