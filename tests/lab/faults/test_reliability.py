"""The record of a run of faults, and the page that is made of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from lab.failures import BadFile
from lab.faults.fault import FaultResult, Signs
from lab.faults.reliability import (
    PAGE,
    RECORD,
    FaultsRecord,
    add_rows,
    read_record,
    render,
    write_record,
)
from lab.faults.run_faults import main
from lab.faults.table import list_faults

ROW = FaultResult(
    "kill-core",
    "the core | is killed",
    in_flight={"chat stream": 2},
    got={"chat stream": {"told 503": 1, "right": 7}},
    recovered_s=12.34,
    memory_mb=101.4,
    grown_mb=-0.3,
    signs=Signs("engine_crashed", "EngineDown", "EngineDown", "overview: Engine states"),
    fired=["EngineDown"],
)
MADE = FaultsRecord("python -m lab faults", "0123456789", "two cores", "2026-01-02", 600.0, (ROW,))


def test_page_in_the_docs_is_what_its_record_says() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(read_record(RECORD))


def test_page_in_the_docs_has_a_row_for_each_fault() -> None:
    assert [row.name for row in read_record(RECORD).rows] == [one.name for one in list_faults()]


def test_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_record(MADE, tmp_path / "faults.json")
    assert read_record(tmp_path / "faults.json") == MADE


def test_rows_of_a_later_run_say_so() -> None:
    other = FaultResult("disk-full", "the disk is full", recovered_s=2.0)
    later = replace(MADE, rows=(replace(ROW, recovered_s=1.0),), date="2026-02-03", commit="abc")
    both = add_rows(replace(MADE, rows=(ROW, other)), later)

    assert [(row.name, row.recovered_s, row.run) for row in both.rows] == [
        ("disk-full", 2.0, ""),
        ("kill-core", 1.0, "2026-02-03, commit abc"),
    ]
    assert (both.date, both.commit) == (MADE.date, MADE.commit)
    assert "| held (run of 2026-02-03, commit abc) |" in render(both)


def test_record_of_something_else_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "faults.json"
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(BadFile, match="no record of faults"):
        read_record(path)


def test_page_shows_a_row_with_what_callers_got_and_where_it_shows(tmp_path: Path) -> None:
    write_record(MADE, tmp_path / "faults.json")
    page = tmp_path / "page.md"

    assert main(["--from", str(tmp_path / "faults.json"), "--page", str(page)]) == 0
    text = page.read_text(encoding="utf-8")
    assert "| `kill-core`: the core \\| is killed | 2 chat stream | " in text
    assert (
        "| chat stream: 7 right, 1 told 503 | 12.3 s | no process, 101 MB (-0.3) | held |" in text
    )
    assert "| `kill-core` | [EngineDown](runbook.md#enginedown) | overview: Engine states |" in text
    assert "## Remarks" not in text


def test_page_says_what_did_not_hold_and_what_was_not_here() -> None:
    red = replace(ROW, problems=["1 doubled", "2 lost"])
    away = FaultResult("disk-full", "the disk is full", not_here="only root may mount one")
    text = render(replace(MADE, rows=(red, away)))

    assert "Of 2 rows 0 held, 1 could not be injected there" in text
    assert "- `kill-core`: 1 doubled; 2 lost\n" in text
    assert "- `disk-full`: only root may mount one\n" in text
