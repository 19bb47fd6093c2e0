"""The last grade on GET /metrics: read from the record that `python -m lab grade --record` wrote.

A file, because a grade is made elsewhere and now and then; nobody can set it over HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path

import orjson
import structlog

from common.files import FileWatch, read_file
from gateway.observability.metrics import Metrics

log = structlog.get_logger("gateway")
_DATE = "%Y-%m-%d %H:%M UTC"
_MOST_FIGURES = 50
_MOST_BYTES = 2**20


@dataclass
class GradeFigures:
    """What the record says; empty where there is none."""

    name: str = ""
    taken_at: float = 0.0
    figures: dict[tuple[str, str], float] = field(default_factory=dict)


class GradeRecordFile:
    """The record as it is now; looked at again by each scrape."""

    def __init__(self, path: Path, metrics: Metrics) -> None:
        self._file = FileWatch(path)
        self._grade = GradeFigures()
        metrics.grade.read = self._list_figures
        metrics.grade_timestamp_seconds.read = self._list_times

    def _list_figures(self) -> Iterator[tuple[Sequence[str], float]]:
        yield from self._read().figures.items()

    def _list_times(self) -> Iterator[tuple[Sequence[str], float]]:
        grade = self._read()
        if grade.taken_at:
            yield (grade.name,), grade.taken_at

    def _read(self) -> GradeFigures:
        if self._file.has_changed():
            self._grade = GradeFigures() if self._file.is_gone else self._parse()
        return self._grade

    def _parse(self) -> GradeFigures:
        try:
            return parse_grade(read_file(self._file.path, _MOST_BYTES))
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("grade_not_read", path=str(self._file.path), reason=str(error))
            return GradeFigures()


def parse_grade(body: bytes) -> GradeFigures:
    """A record of a run; of two figures with one name and unit the first counts."""
    record = orjson.loads(body)
    taken = datetime.strptime(record["date"], _DATE).replace(tzinfo=UTC)
    figures: dict[tuple[str, str], float] = {}
    for row in record["figures"][:_MOST_FIGURES]:
        value = float(row["value"])
        if math.isfinite(value):
            figures.setdefault((str(row["name"])[:80], str(row.get("unit", ""))[:20]), value)
    return GradeFigures(str(record["name"])[:120], taken.timestamp(), figures)
