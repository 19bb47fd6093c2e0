"""This run and a stored one: which figures have really changed."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from lab.bench.bench_figures import BenchRow, count_rounds
from lab.failures import BadFile
from lab.records.figure_change import FigureChange

FORMAT = 1
# What has no rounds, such as memory, moves by so much between two runs of the same program.
_ONCE_SHARE = 0.05
_ROWS = TypeAdapter(tuple[BenchRow, ...])


@dataclass(frozen=True)
class StoredRun:
    """What a comparison needs of a run. `setting` is what must be the same in both, by part."""

    rows: tuple[BenchRow, ...]
    setting: dict[str, dict[str, str]]


def compare_runs(before: StoredRun, after: StoredRun) -> list[FigureChange]:
    """Figures that both have."""
    earlier = {(row.part, row.name): row for row in before.rows}
    unlike = {part: _find_unlike(before, after, part) for part in ("engine", "relay")}
    return [
        _compare_rows(earlier[key], row, unlike[row.part])
        for row in after.rows
        if (key := (row.part, row.name)) in earlier
    ]


def _compare_rows(before: BenchRow, after: BenchRow, unlike: str) -> FigureChange:
    pair = (before, after)
    few = (row.span.rounds for row in pair if not row.span.is_sure and row.span.rounds > 1)
    change = after.span.value - before.span.value
    # Both runs had their chance.
    half = math.hypot(*map(_find_half, pair))
    # The machine itself may have moved from one run to the other.
    old, new = before.reference, after.reference
    moved = abs(new / old - 1) * before.span.value if old and new else 0.0
    return FigureChange(
        after.name,
        before.span.value,
        after.span.value,
        change,
        change - half,
        change + half,
        after.unit,
        is_more_better=after.is_more_better,
        noise=max(before.noise, after.noise, moved),
        unclear=unlike or next(map(count_rounds, few), ""),
    )


def _find_half(row: BenchRow) -> float:
    is_measured_once = row.span.rounds == 1
    return _ONCE_SHARE * abs(row.span.value) if is_measured_once else row.span.half


def _find_unlike(before: StoredRun, after: StoredRun, part: str) -> str:
    old, new = before.setting.get(part, {}), after.setting.get(part, {})
    unlike = [key for key in {**old, **new} if old.get(key) != new.get(key)]
    return f"another {', another '.join(unlike)}" if unlike else ""


def read_run(path: Path) -> StoredRun:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        if data["format"] != FORMAT:
            raise BadFile(f"{path}: written by another version of the benchmark; measure anew")
        return StoredRun(_ROWS.validate_python(data["rows"]), data["setting"])
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        raise BadFile(f"{path}: no run of the benchmark ({error!r})") from None
    except (OSError, json.JSONDecodeError) as error:
        raise BadFile(f"{path}: {error}") from None
