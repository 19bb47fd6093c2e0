"""This run and a stored one: which figures have really changed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lab.bench.bench_figures import Bound, Row, Span, count_rounds

FORMAT = 1
# What has no rounds, such as memory, moves by so much between two runs of the same program.
_ONCE_SHARE = 0.05


class BadRun(ValueError):
    """A file that holds no run of the benchmark."""


@dataclass(frozen=True)
class Stored:
    """What a comparison needs of a run. `setting` is what must be the same in both, by part."""

    path: str
    rows: tuple[Row, ...]
    setting: dict[str, dict[str, str]]


@dataclass(frozen=True)
class Change:
    """One figure, then and now."""

    before: Row
    after: Row
    unclear: str = ""

    @property
    def change(self) -> float:
        return self.after.span.value - self.before.span.value

    @property
    def half(self) -> float:
        """Of the interval around the change: both runs had their chance."""
        return math.hypot(*(_find_half(row) for row in (self.before, self.after)))

    @property
    def noise(self) -> float:
        """How far the figure moved where nothing differed, within the runs or from one to two."""
        old, new = self.before.reference, self.after.reference
        moved = abs(new / old - 1) * self.before.span.value if old and new else 0.0
        return max(self.before.noise, self.after.noise, moved)

    @property
    def verdict(self) -> str:
        if self.unclear:
            return f"cannot be told: {self.unclear}"
        for row in (self.before, self.after):
            if not row.span.is_sure and row.span.rounds > 1:
                return f"cannot be told: {count_rounds(row.span.rounds)}"
        if abs(self.change) <= self.half:
            return "no real difference"
        if abs(self.change) <= self.noise:
            return "cannot be told: the control moved as much"
        is_better = (self.change > 0) == self.after.is_more_better
        return "really better" if is_better else "really worse"

    @property
    def is_worse(self) -> bool:
        return self.verdict == "really worse"


def _find_half(row: Row) -> float:
    is_measured_once = row.span.rounds == 1
    return _ONCE_SHARE * abs(row.span.value) if is_measured_once else row.span.half


def compare(before: Stored, after: Stored) -> list[Change]:
    """Figures that both have."""
    earlier = {(row.part, row.name): row for row in before.rows}
    unclear = {part: _find_unlike(before, after, part) for part in ("engine", "relay")}
    return [
        Change(earlier[key], row, unclear[row.part])
        for row in after.rows
        if (key := (row.part, row.name)) in earlier
    ]


def _find_unlike(before: Stored, after: Stored, part: str) -> str:
    old, new = before.setting.get(part, {}), after.setting.get(part, {})
    unlike = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return f"another {', another '.join(unlike)}" if unlike else ""


def read_stored(path: Path) -> Stored:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRun(f"{path}: {error}") from None
    try:
        if data["format"] != FORMAT:
            raise BadRun(f"{path}: written by another version of the benchmark; measure anew")
        rows = tuple(_parse_row(row) for row in data["rows"])
        return Stored(str(path), rows, data["setting"])
    except (KeyError, TypeError, AttributeError) as error:
        raise BadRun(f"{path}: no run of python -m lab bench ({error!r})") from None


def _parse_row(row: dict[str, Any]) -> Row:
    fields = dict(row)
    for name, kind in (("span", Span), ("control", Span), ("bound", Bound)):
        fields[name] = kind(**fields[name]) if fields[name] is not None else None
    return Row(**fields)


def describe(changes: Sequence[Change], path: str) -> list[str]:
    if not changes:
        return [f"{path} and this run have no figure in common"]
    width = max(len(change.after.name) for change in changes)
    lines = [f"against {path}:"]
    for one in changes:
        before, after = one.before.span.value, one.after.span.value
        lines.append(
            f"  {one.after.name:{width}}  {before:9.3f} → {after:9.3f} {one.after.unit:8} "
            f"{one.change:+.3f} ± {one.half:.3f}  {one.verdict}"
        )
    return lines
