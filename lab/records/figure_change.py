"""One figure in two runs: has it really changed, or could chance have done it?

How a change and its interval are found is each measurement's own affair and is not here.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FigureChange:
    """From `before` to `after`, with the interval that holds the truth in 95 of 100 cases.

    `noise` is how far the figure moved where nothing differed; `unclear` says why the two runs
    cannot be held against each other. A relative change is a share of `before`.
    """

    name: str
    before: float
    after: float
    change: float
    low: float
    high: float
    unit: str = ""
    is_relative: bool = False
    is_more_better: bool = True
    noise: float = 0.0
    unclear: str = ""

    @property
    def verdict(self) -> str:
        if self.unclear:
            return f"cannot be told: {self.unclear}"
        if self.low <= 0 <= self.high:
            return "no real difference"
        if abs(self.change) <= self.noise:
            return "cannot be told: the control moved as much"
        return "really better" if (self.change > 0) == self.is_more_better else "really worse"

    @property
    def is_worse(self) -> bool:
        return self.verdict == "really worse"

    def describe_change(self) -> str:
        form = "+.1%" if self.is_relative else "+.4f"
        span = f"{self.low:{form}} to {self.high:{form}}" if math.isfinite(self.high) else "any"
        return f"{self.change:{form}} ({span})"


def describe_changes(changes: Sequence[FigureChange]) -> Iterator[str]:
    """A line each."""
    width = max((len(one.name) for one in changes), default=0)
    for one in changes:
        values = f"{one.before:12,.4f} → {one.after:12,.4f} {one.unit:8}"
        yield f"{one.name:{width}} {values} {one.describe_change()}  {one.verdict}"
