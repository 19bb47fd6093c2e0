"""Everything that one run found, and its JSON."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic_core import to_jsonable_python

from lab.bench.bench_figures import QUIET, BenchRow, Bound, build_added, build_ratio
from lab.bench.relay.relay_comparison import RelayResult
from lab.bench.report.earlier_run import FORMAT
from lab.bench.rounds import CPU_MEASURE, WorkloadRounds
from lab.intervals import find_interval
from lab.records.figure_change import FigureChange
from lab.records.record import RecordFigure, RunFacts
from lab.reports.output_files import write_json

LARGEST_BATCH_RATIO = Bound("at most", 1.02)
LARGEST_SINGLE_ADDED_MS = Bound("at most", 5.0)


@dataclass(frozen=True)
class BenchFacts(RunFacts):
    """Under which conditions. `setting` is what two runs must share to be compared, by part."""

    gateway_url: str
    engine_url: str
    model: str
    answers: str
    asked: dict[str, Any]
    engine: dict[str, Any]
    gateway: dict[str, str]
    load_before: float
    load_after: float
    seconds: float
    seed: int
    setting: dict[str, dict[str, str]]


@dataclass(frozen=True)
class BenchResult:
    """One run: workloads through the targets, the outside opinion, the relay."""

    facts: BenchFacts
    relayed: RelayResult | None
    batch_title: str
    single_title: str
    workloads: tuple[WorkloadRounds, ...] = ()
    outside: WorkloadRounds | None = None
    notes: tuple[str, ...] = ()
    changes: tuple[FigureChange, ...] = ()
    against: str = ""

    def measured(self) -> tuple[WorkloadRounds, ...]:
        return (*self.workloads, self.outside) if self.outside else self.workloads

    def rows(self) -> list[BenchRow]:
        rows = [row for one in self.measured() for row in self._rows(one)]
        return rows + (self.relayed.rows() if self.relayed else [])

    def _rows(self, measured: WorkloadRounds) -> Iterator[BenchRow]:
        for series in measured.series:
            if not series.is_positive():
                continue
            is_batch = series.workload == self.batch_title and series.measure == "time"
            yield build_ratio("engine", series, LARGEST_BATCH_RATIO if is_batch else None)
            if series.workload == self.single_title and series.measure == "time":
                name = f"{series.name}, added"
                yield build_added("engine", series, name, LARGEST_SINGLE_ADDED_MS)
        if measured.gateway_cpu_ms:
            yield self._cpu_row(measured)

    def _cpu_row(self, measured: WorkloadRounds) -> BenchRow:
        total = next(one for one in measured.series if one.measure == CPU_MEASURE)
        name = f"{measured.title}: CPU of the gateway, a request"
        span = find_interval(measured.gateway_cpu_ms)
        return BenchRow(
            "engine", name, "ms", span, reference=statistics.median(total.by_arm["direct"])
        )

    def unquiet(self) -> list[BenchRow]:
        """Figures whose control moved by more than the 3 %."""
        return [row for row in self.rows() if not row.is_quiet]

    def overs(self) -> list[BenchRow]:
        return [row for row in self.rows() if row.bound_verdict == "OVER"]

    @property
    def is_good(self) -> bool:
        """No bound surely broken, nothing surely worse than in the stored run."""
        return not self.overs() and not any(change.is_worse for change in self.changes)

    def write(self, path: Path) -> None:
        packed = {
            "format": FORMAT,
            "is_good": self.is_good,
            "is_quiet": not self.unquiet(),
            "facts": self.facts,
            "setting": self.facts.setting,
            "notes": self.notes,
            "rows": self.rows(),
            "workloads": self.measured(),
            "relay": self.relayed,
            "against": [{**vars(one), "verdict": one.verdict} for one in self.changes],
        }
        write_json(path, to_jsonable_python(packed))

    def figures(self) -> list[RecordFigure]:
        """For the record of a run."""
        return [_build_figure(row) for row in self.rows()]


def _build_figure(row: BenchRow) -> RecordFigure:
    notes = [row.difference]
    if row.control is not None and row.neutral is not None:
        notes.append(f"control {row.control.value:.3f}{'' if row.is_quiet else ', not quiet'}")
    if row.bound:
        notes.append(f"{row.bound_verdict} its bound, {row.bound.describe()}")
    low, high = (row.span.low, row.span.high) if row.span.rounds > 1 else (None, None)
    note = "; ".join(filter(None, notes))
    return RecordFigure(row.name, row.span.value, row.unit, low, high, note)


def describe_quiet(result: BenchResult) -> str:
    """Loud, if the control says so."""
    rows = result.unquiet()
    if not rows:
        return f"the control stayed within 1.00 ± {QUIET:.2f} everywhere"
    shown = ", ".join(f"{row.name} {row.control.value:.3f}" for row in rows if row.control)
    return (
        f"THIS MACHINE WAS NOT QUIET: asked twice, the direct target itself differed by more than "
        f"{QUIET:.0%} in {len(rows)} of {sum(row.control is not None for row in result.rows())} "
        f"figures ({shown}). Do not take their differences for the gateway's."
    )
