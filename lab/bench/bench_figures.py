"""What the rounds say: medians with intervals, what the control allows to be believed, verdicts.

Every figure carries how far the same figure moved where nothing differed: the control asks the
direct target a second time. Nothing that the control does by itself is called real.
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from typing import Literal

from lab.failures import LabFailure
from lab.intervals import FEWEST_ROUNDS, Interval, find_interval
from lab.reports.console import count

QUIET = 0.03
ARMS = ("direct", "control", "gateway")
Part = Literal["engine", "relay"]


class BenchFailed(LabFailure):
    """Why there are no figures."""

    exit_code = 3


@dataclass(frozen=True)
class RoundSeries:
    """One measure of one workload: a value for each arm, round by round."""

    workload: str
    measure: str
    unit: str
    by_arm: dict[str, list[float]]

    @property
    def name(self) -> str:
        return f"{self.workload}: {self.measure}"

    @property
    def rounds(self) -> int:
        return min(map(len, self.by_arm.values()))

    def relate(self, arm: str, *others: str) -> list[float]:
        """Round by round: the arm over the geometric mean of the others."""
        rows = zip(self.by_arm[arm], *(self.by_arm[other] for other in others), strict=True)
        return [value / statistics.geometric_mean(rest) for value, *rest in rows]

    def subtract(self, arm: str, *others: str) -> list[float]:
        """Round by round: the arm less the mean of the others."""
        rows = zip(self.by_arm[arm], *(self.by_arm[other] for other in others), strict=True)
        return [value - statistics.mean(rest) for value, *rest in rows]

    def is_positive(self) -> bool:
        """Whether ratios can be made of it."""
        return all(value > 0 for values in self.by_arm.values() for value in values)


@dataclass(frozen=True)
class Bound:
    """What a figure was promised to keep."""

    word: Literal["at most", "at least"]
    limit: float

    def excess(self, value: float) -> float:
        """How far beyond the limit; negative inside."""
        return value - self.limit if self.word == "at most" else self.limit - value

    def describe(self) -> str:
        return f"{self.word} {self.limit:g}"


BoundVerdict = Literal["within", "OVER", "unclear"]


@dataclass(frozen=True)
class BenchRow:
    """One figure.

    `neutral` is its value if the gateway cost nothing, `control` what it was where nothing
    differed. A figure that has no such value may have a `reference`: what the direct target needed,
    which tells how far the machine itself moved between two runs.
    """

    part: Part
    name: str
    unit: str
    span: Interval
    neutral: float | None = None
    control: Interval | None = None
    bound: Bound | None = None
    is_more_better: bool = False
    reference: float | None = None

    @property
    def noise(self) -> float:
        """How far the same figure went from its neutral value where nothing differed."""
        if self.control is None or self.neutral is None:
            return 0.0
        return measure_distance(self.control.value, self.neutral)

    @property
    def is_quiet(self) -> bool:
        """Ratios alone can be held against the 3 %."""
        if self.control is None or self.neutral != 1.0:
            return True
        return abs(self.control.value - 1.0) <= QUIET

    @property
    def difference(self) -> str:
        """From what is neutral, in words."""
        if self.neutral is None:
            return ""
        if not self.span.is_sure:
            return f"cannot be told: {count_rounds(self.span.rounds)}"
        if self.span.low <= self.neutral <= self.span.high:
            return "no real difference"
        if measure_distance(self.span.value, self.neutral) <= self.noise:
            return "cannot be told: the control moved as much"
        return "really more" if self.span.value > self.neutral else "really less"

    @property
    def bound_verdict(self) -> BoundVerdict | None:
        if self.bound is None:
            return None
        if self.bound.excess(self.span.value) <= 0:
            return "within"
        # A figure without rounds, such as memory, has no chance in it.
        is_measured_once = self.span.rounds == 1
        near = min(self.bound.excess(self.span.low), self.bound.excess(self.span.high))
        is_beyond = near > 0 and self.bound.excess(self.span.value) > self.noise
        return "OVER" if is_measured_once or (self.span.is_sure and is_beyond) else "unclear"


def measure_distance(value: float, neutral: float) -> float:
    """Of a ratio from 1: half and double are equally far."""
    if neutral == 1.0 and value > 0:
        return max(value, 1 / value) - 1
    return abs(value - neutral)


def count_rounds(rounds: int) -> str:
    """Why so few say nothing."""
    return f"{count(rounds, 'round')}, {FEWEST_ROUNDS} are needed"


def build_ratio(part: Part, series: RoundSeries, bound: Bound | None = None) -> BenchRow:
    """Gateway over direct; the two direct arms together are the better known reference."""
    return BenchRow(
        part,
        series.name,
        "× direct",
        find_interval(series.relate("gateway", "direct", "control")),
        1.0,
        find_interval(series.relate("control", "direct")),
        bound,
    )


def build_added(
    part: Part, series: RoundSeries, name: str, bound: Bound | None = None, arm: str = "gateway"
) -> BenchRow:
    span = find_interval(series.subtract(arm, "direct", "control"))
    control = find_interval(series.subtract("control", "direct"))
    return BenchRow(part, name, series.unit, span, 0.0, control, bound)
