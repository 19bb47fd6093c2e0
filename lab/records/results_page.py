"""Writes docs/results.md from the records of runs in docs/results/ (part of `make docs`).

`--check` changes nothing and says whether the page is what the records say.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from lab.paths import ROOT
from lab.records.record import BadRecord, Figure, Record, read_record

RECORDS = ROOT / "docs" / "results"
PAGE = ROOT / "docs" / "results.md"
_HEAD = """# Measured results

Written by `make docs` from the records in `docs/results/`; do not edit. Each record is what a
command of the lab wrote with `--record docs/results/NAME.json`, so the command under a table, which
stands there as it was typed, makes its figures again; `python scripts/grade.py` of older records is
`python -m lab grade` today, and so on. Where there is a range, the figure is the median of several
runs, unless its note says otherwise.
"""


def render(records: list[Record]) -> str:
    return "\n".join([_HEAD, *(line for record in records for line in _section(record))])


def read_all(folder: Path) -> list[Record]:
    """In the order of the files' names."""
    return [read_record(path) for path in sorted(folder.glob("*.json"))]


def _section(record: Record) -> Iterator[str]:
    yield f"## {record.name}\n"
    if record.about:
        yield f"{record.about}\n"
    yield "| figure | value | range | |"
    yield "|---|---:|---|---|"
    yield from map(_row, record.figures)
    yield f"\n`{record.command}`  "
    yield f"{record.date} · commit {record.commit} · {record.machine}\n"


def _row(figure: Figure) -> str:
    unit = f" {figure.unit}" if figure.unit else ""
    value = f"{format_number(figure.value)}{unit}"
    cells = [figure.name, value, _range(figure), figure.note]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _range(figure: Figure) -> str:
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


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="only say whether it is true")
    arguments = parser.parse_args(words)
    try:
        wanted = render(read_all(RECORDS))
    except BadRecord as error:
        print(f"results: {error}", file=sys.stderr)
        return 2
    if arguments.check:
        is_true = PAGE.is_file() and PAGE.read_text(encoding="utf-8") == wanted
        print("docs/results.md is true" if is_true else "docs/results.md: run `make docs`")
        return int(not is_true)
    PAGE.write_text(wanted, encoding="utf-8")
    return 0
