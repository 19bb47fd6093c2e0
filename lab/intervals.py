"""Statistics: means, quantiles, and the intervals that hold the truth in 95 of 100 cases."""

from __future__ import annotations

import itertools
import math
import random
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

# A median's 95 % interval by order statistics needs six values.
FEWEST_ROUNDS = 6
_RESAMPLES = 10_000
_MOST_ALIKE = 0.95
# Student's t, two-sided 95 %, by degrees of freedom; in between the row below holds.
_T_95 = {
    1: 12.706, 2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262,
    10: 2.228, 12: 2.179, 15: 2.131, 20: 2.086, 30: 2.042, 60: 2.000, 120: 1.980,
}  # fmt: skip

Point = tuple[float, float]


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


def find_t(freedom: float) -> float:
    """Student's t, two-sided, for an interval that holds the truth in 95 of 100 cases."""
    return next((t for least, t in reversed(_T_95.items()) if freedom >= least), _T_95[1])


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
    t = find_t(freedom)
    return math.expm1(change), math.expm1(change - t * error), math.expm1(change + t * error)


@dataclass(frozen=True)
class Slope:
    """Of a straight line, and the interval that holds the true one in 95 of 100 cases."""

    value: float
    low: float
    high: float
    points: int


def fit_slope(lines: Iterable[Sequence[Point]]) -> Slope | None:
    """Lines with one slope, each at a level of its own; None where there is too little to say.

    Points that follow one another are often alike, which makes a slope look surer than it is: the
    interval is widened by how alike they are. One short line does not show that well: its interval
    holds the truth in fewer cases (of 8 points, each half like the one before, in 80 of 100).
    """
    centred = [_centre(line) for line in lines if len(line) > 1]
    number = sum(map(len, centred))
    freedom = number - len(centred) - 1
    if freedom < 1:
        return None
    points = list(itertools.chain.from_iterable(centred))
    spread = sum(x * x for x, _ in points)
    slope = sum(x * y for x, y in points) / spread
    rests = [[y - slope * x for x, y in line] for line in centred]
    variance = sum(rest * rest for line in rests for rest in line) / freedom
    alike = _find_likeness(rests)
    error = math.sqrt(variance / spread * (1 + alike) / (1 - alike)) * find_t(freedom)
    return Slope(slope, slope - error, slope + error, number)


def _centre(line: Sequence[Point]) -> list[Point]:
    middle_x, middle_y = (statistics.fmean(values) for values in zip(*line, strict=True))
    return [(x - middle_x, y - middle_y) for x, y in line]


def _find_likeness(rests: Sequence[Sequence[float]]) -> float:
    """How much of a point's distance from the line the next one has, too.

    Seen from the line that was laid through them, points look less alike than they are, the more so
    the fewer they are; what is missing on average is added.
    """
    whole = sum(rest * rest for line in rests for rest in line)
    if not whole:
        return 0.0
    pairs = itertools.chain.from_iterable(map(itertools.pairwise, rests))
    seen = sum(one * next_ for one, next_ in pairs) / whole
    length = statistics.fmean(map(len, rests))
    return min(_MOST_ALIKE, max(0.0, seen + (1 + 3 * seen) / length))
