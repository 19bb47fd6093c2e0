"""The record of a run of faults, and docs/reliability.md made of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from lab.failures import BadFile
from lab.faults.fault import FaultResult, Signs
from lab.faults.table import list_faults
from lab.paths import ROOT
from lab.records.record import take_facts
from lab.reports.output_files import write_file, write_json
from lab.reports.pages import render_page

RECORD = ROOT / "docs" / "reliability.json"
PAGE = ROOT / "docs" / "reliability.md"


@dataclass(frozen=True)
class FaultsRecord:
    """One run."""

    command: str
    commit: str
    machine: str
    date: str
    took_s: float
    rows: tuple[FaultResult, ...]


_RECORD = TypeAdapter(FaultsRecord)


def build_record(rows: Sequence[FaultResult], took_s: float, machine: str = "") -> FaultsRecord:
    return FaultsRecord(rows=tuple(rows), took_s=round(took_s, 1), **take_facts(machine))


def add_rows(earlier: FaultsRecord, record: FaultsRecord) -> FaultsRecord:
    """In the places of those that have been injected again; they name their own run."""
    of = f"{record.date}, commit {record.commit}"
    rows = {one.name: one for one in earlier.rows}
    rows |= {one.name: replace(one, run=of) for one in record.rows}
    names = [one.name for one in list_faults()]
    return replace(earlier, rows=tuple(rows[name] for name in names if name in rows))


def write_record(record: FaultsRecord, path: Path) -> None:
    write_json(path, asdict(record))


def read_record(path: Path) -> FaultsRecord:
    try:
        return _RECORD.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        raise BadFile(f"{path}: no record of faults: {error}") from None


def write_page(record: FaultsRecord, path: Path) -> None:
    write_file(path, render(record))


def render(record: FaultsRecord) -> str:
    rows = record.rows
    away = sum(bool(one.not_here) for one in rows)
    facts = {
        "rows": rows,
        "away": away,
        "held": sum(not one.problems for one in rows) - away,
        "minutes": round(record.took_s / 60),
        "remarks": [one for one in rows if one.not_here or one.problems],
    }
    return render_page("reliability.md", record=record, **facts, **_FORMS)


def describe_got(got: dict[str, int]) -> str:
    """The right ones first, then what each of the others got."""
    first = [f"{got['right']} right"] if got.get("right") else []
    rest = [f"{number} {word}" for word, number in sorted(got.items()) if word != "right"]
    return ", ".join([*first, *rest])


def describe_ending(row: FaultResult) -> str:
    if row.exit_code is not None:
        return f"exit {row.exit_code}"
    return "not" if row.recovered_s is None else f"{row.recovered_s:.1f} s"


def describe_verdict(row: FaultResult) -> str:
    if row.not_here:
        return "not here"
    verdict = "not held" if row.problems else "held"
    return f"{verdict} (run of {row.run})" if row.run else verdict


def describe_left(row: FaultResult) -> str:
    """Processes that should not be there any more, and the gateway's memory."""
    if row.not_here:
        return ""
    number = f"{len(row.left_over) or 'no'} process{'es' if len(row.left_over) > 1 else ''}"
    memory = describe_memory(row)
    return f"{number}, {memory}" if memory else number


def describe_memory(row: FaultResult) -> str:
    if row.memory_mb is None:
        return ""
    grown = "" if row.grown_mb is None else f" ({row.grown_mb:+.1f})"
    return f"{row.memory_mb:.0f} MB{grown}"


def describe_flight(row: FaultResult) -> str:
    return ", ".join(f"{number} {kind}" for kind, number in sorted(row.in_flight.items()))


def describe_all_got(row: FaultResult) -> str:
    """By kind of caller, a line each."""
    lines = (f"{kind}: {describe_got(got)}" for kind, got in sorted(row.got.items()))
    return "<br>".join(lines)


def describe_alert(signs: Signs) -> str:
    """With the section that says what to do."""
    if not signs.runbook:
        return "none needed"
    section = f"[{signs.runbook}](runbook.md#{signs.runbook.lower()})"
    return section if signs.alert in ("", signs.runbook) else f"{signs.alert}, {section}"


def describe_remarks(row: FaultResult) -> str:
    return row.not_here or "; ".join(row.problems)


def fit_cell(text: str) -> str:
    """One line, and no column's border in it."""
    return " ".join(text.replace("|", "\\|").split())


_FORMS = {
    "got": describe_got,
    "all_got": describe_all_got,
    "flight": describe_flight,
    "ending": describe_ending,
    "verdict": describe_verdict,
    "left": describe_left,
    "alert": describe_alert,
    "said": describe_remarks,
    "cell": fit_cell,
}
