"""Writes docs/results.md from the records of runs in docs/results/ (part of `make docs`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from lab.options import build_parser
from lab.paths import ROOT
from lab.records.record import RecordFigure, RunRecord, read_record
from lab.reports.pages import render_page

RECORDS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "results.md"


def render(records: list[RunRecord]) -> str:
    return render_page("results.md", records=records, number=format_number, span=describe_span)


def read_all(folder: Path) -> list[RunRecord]:
    """In the order of the files' names."""
    return [read_record(path) for path in sorted(folder.glob("*.json"))]


def describe_span(figure: RecordFigure) -> str:
    if figure.low == figure.high:  # none, or none worth showing
        return ""
    if figure.low is None:
        return f"up to {format_number(figure.high or 0.0)}"
    if figure.high is None:
        return f"from {format_number(figure.low)}"
    return f"{format_number(figure.low)} to {format_number(figure.high)}"


def format_number(value: float) -> str:
    """Four digits that count; no exponents."""
    if value == int(value) or abs(value) >= 1000:
        return f"{value:,.0f}"
    digits = max(0, 4 - len(str(int(abs(value)))))
    if abs(value) < 1:
        digits = 4 if abs(value) >= 0.01 else 6
    return f"{value:.{digits}f}"


def main(words: Sequence[str]) -> int:
    build_parser("results", __doc__).parse_args(words)
    PAGE.write_text(render(read_all(RECORDS)), encoding="utf-8")
    return 0
