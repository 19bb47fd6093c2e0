"""This run and a stored one: which figures have really changed."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from lab.bench.bench_figures import BenchRow, count_rounds
from lab.failures import BadFile

FORMAT = 1
# What has no rounds, such as memory, moves by so much between two runs of the same program.
_ONCE_SHARE = 0.05
_ROWS = TypeAdapter(tuple[BenchRow, ...])


@dataclass(frozen=True)
class StoredRun:
    """What a comparison needs of a run. `setting` is what must be the same in both, by part."""

    path: str
    rows: tuple[BenchRow, ...]
    setting: dict[str, dict[str, str]]


@dataclass(frozen=True)
class FigureChange:
    """One figure, then and now."""

    before: BenchRow
    after: BenchRow
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

    def pack(self) -> dict[str, Any]:
        name, before, after = self.after.name, self.before.span.value, self.after.span.value
        figures = {"before": before, "after": after, "half": self.half}
        return {"name": name, **figures, "verdict": self.verdict}

    @property
    def is_worse(self) -> bool:
        return self.verdict == "really worse"


def _find_half(row: BenchRow) -> float:
    is_measured_once = row.span.rounds == 1
    return _ONCE_SHARE * abs(row.span.value) if is_measured_once else row.span.half


def compare_runs(before: StoredRun, after: StoredRun) -> list[FigureChange]:
    """Figures that both have."""
    earlier = {(row.part, row.name): row for row in before.rows}
    unclear = {part: _find_unlike(before, after, part) for part in ("engine", "relay")}
    return [
        FigureChange(earlier[key], row, unclear[row.part])
        for row in after.rows
        if (key := (row.part, row.name)) in earlier
    ]


def _find_unlike(before: StoredRun, after: StoredRun, part: str) -> str:
    old, new = before.setting.get(part, {}), after.setting.get(part, {})
    unlike = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return f"another {', another '.join(unlike)}" if unlike else ""


def read_run(path: Path) -> StoredRun:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise BadFile(f"{path}: written by another version of the benchmark; measure anew")
        rows = _ROWS.validate_python(data["rows"])
        return StoredRun(str(path), rows, data["setting"])
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        raise BadFile(f"{path}: no run of the benchmark ({error!r})") from None
    except (OSError, json.JSONDecodeError) as error:
        raise BadFile(f"{path}: {error}") from None


def describe_changes(changes: Sequence[FigureChange], path: str) -> list[str]:
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
