"""Everything that one run found, and its JSON."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from lab.bench.bench_figures import QUIET, Bound, Row, build_added, build_ratio, find_span
from lab.bench.earlier_run import FORMAT, Change, Stored
from lab.bench.rate_sweep import Sweep
from lab.bench.relay.relay_comparison import Relayed
from lab.bench.rounds import CPU_MEASURE, Measured
from lab.records.record import Figure
from lab.reports.output_files import write_file

LARGEST_BATCH_RATIO = Bound("at most", 1.02)
LARGEST_SINGLE_ADDED_MS = Bound("at most", 5.0)


@dataclass(frozen=True)
class Facts:
    """Under which conditions. `setting` is what two runs must share to be compared, by part."""

    date: str
    commit: str
    machine: str
    command: str
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
class Result:
    """One run: workloads through the doors, the sweep, the outside opinion, the relay."""

    facts: Facts
    workloads: tuple[Measured, ...]
    outside: Measured | None
    sweep: Sweep | None
    relayed: Relayed | None
    batch_title: str
    single_title: str
    notes: tuple[str, ...] = ()
    changes: tuple[Change, ...] = ()
    against: str = ""

    def measured(self) -> tuple[Measured, ...]:
        return (*self.workloads, self.outside) if self.outside else self.workloads

    def rows(self) -> list[Row]:
        rows = [row for one in self.measured() for row in self._rows(one)]
        if self.sweep:
            rows.append(replace(build_ratio("engine", self.sweep.series()), is_more_better=True))
        return rows + (self.relayed.rows() if self.relayed else [])

    def _rows(self, measured: Measured) -> Iterator[Row]:
        for series in measured.series:
            if not series.is_positive():
                continue
            is_batch = series.workload == self.batch_title and series.measure == "time"
            yield build_ratio("engine", series, LARGEST_BATCH_RATIO if is_batch else None)
            if series.workload == self.single_title and series.measure == "time":
                yield build_added("engine", series, LARGEST_SINGLE_ADDED_MS)
        if measured.gateway_cpu_ms:
            yield self._cpu_row(measured)

    def _cpu_row(self, measured: Measured) -> Row:
        total = next(one for one in measured.series if one.measure == CPU_MEASURE)
        name = f"{measured.title}: CPU of the gateway, a request"
        span = find_span(measured.gateway_cpu_ms)
        return Row("engine", name, "ms", span, reference=statistics.median(total.by_arm["direct"]))

    def unquiet(self) -> list[Row]:
        """Figures whose control moved by more than the 3 %."""
        return [row for row in self.rows() if not row.is_quiet]

    def overs(self) -> list[Row]:
        return [row for row in self.rows() if row.bound_verdict == "OVER"]

    @property
    def is_good(self) -> bool:
        """No bound surely broken, nothing surely worse than in the stored run."""
        return not self.overs() and not any(change.is_worse for change in self.changes)

    def stored(self) -> Stored:
        return Stored("this run", tuple(self.rows()), self.facts.setting)

    def pack(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "is_good": self.is_good,
            "is_quiet": not self.unquiet(),
            "facts": asdict(self.facts),
            "setting": self.facts.setting,
            "notes": list(self.notes),
            "rows": [asdict(row) for row in self.rows()],
            "workloads": [asdict(one) for one in self.measured()],
            "sweep": asdict(self.sweep) if self.sweep else None,
            "relay": asdict(self.relayed) if self.relayed else None,
            "against": [_pack_change(change) for change in self.changes],
        }

    def write(self, path: Path) -> None:
        packed = _make_finite(self.pack())
        text = json.dumps(packed, ensure_ascii=False, indent=1, allow_nan=False)
        write_file(path, text + "\n")

    def figures(self) -> list[Figure]:
        """For the record of a run."""
        figures = [_build_figure(row) for row in self.rows()]
        knees = self.sweep.knees if self.sweep else {}
        return figures + [
            Figure(f"knee, {arm}", statistics.median(rates), "calls/s", min(rates), max(rates))
            for arm, rates in knees.items()
        ]


def _build_figure(row: Row) -> Figure:
    is_range = row.span.rounds > 1
    low, high = (row.span.low, row.span.high) if is_range else (None, None)
    return Figure(row.name, row.span.value, row.unit, low, high, "; ".join(_explain(row)))


def _explain(row: Row) -> Iterator[str]:
    if row.difference:
        yield row.difference
    if row.control is not None and row.neutral is not None:
        loud = "" if row.is_quiet else ", not quiet"
        yield f"control {row.control.value:.3f}{loud}"
    if row.bound:
        yield f"{row.bound_verdict} its bound, {row.bound.describe()}"


def _pack_change(change: Change) -> dict[str, Any]:
    return {
        "name": change.after.name,
        "before": change.before.span.value,
        "after": change.after.span.value,
        "half": change.half,
        "verdict": change.verdict,
    }


def _make_finite(value: Any) -> Any:
    """JSON has no infinity: what never came is null."""
    if isinstance(value, dict):
        return {key: _make_finite(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_make_finite(one) for one in value]
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return None
    return value


def describe_quiet(result: Result) -> str:
    """Loud, if the control says so."""
    rows = result.unquiet()
    if not rows:
        return f"the control stayed within 1.00 ± {QUIET:.2f} everywhere"
    shown = ", ".join(f"{row.name} {row.control.value:.3f}" for row in rows if row.control)
    return (
        f"THIS MACHINE WAS NOT QUIET: asked twice, the direct door itself differed by more than "
        f"{QUIET:.0%} in {len(rows)} of {sum(row.control is not None for row in result.rows())} "
        f"figures ({shown}). Do not take their differences for the gateway's."
    )
