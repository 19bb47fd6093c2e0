"""Records of runs, and the page that is made of them."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from lab.failures import BadFile
from lab.records.record import (
    RecordFigure,
    RunRecord,
    describe_commit,
    parse_record,
    read_record,
    take_record,
    write_record,
)
from lab.records.results_page import PAGE, RECORDS, format_number, read_all, render

ROOT = Path(__file__).parents[3]
RECORD = RunRecord(
    name="Batch of 358",
    command="python -m lab bench --rounds 12",
    commit="0123456789",
    machine="H200",
    date="2026-01-02 03:04 UTC",
    figures=(
        RecordFigure("tokens/s", 51234.5, "/s", 50000.4, 52000, "median of 5"),
        RecordFigure("ratio", 1.0123, "", None, 1.02),
        RecordFigure("a|b", 3),
    ),
    about="As the judge asks.",
)


def test_page_is_what_the_generator_writes() -> None:
    assert PAGE.read_text(encoding="utf-8") == render(read_all(RECORDS)), "run `make docs`"


def test_kept_records_name_their_source() -> None:
    records = read_all(RECORDS)

    assert records
    for record in records:
        assert record.figures, record.name
        assert all((record.command, record.commit, record.machine, record.date)), record.name
        assert record.commit not in ("unknown", ""), record.name


def test_page_shows_every_figure_with_its_range_and_source() -> None:
    page = render([RECORD])

    assert "## Batch of 358\n\nAs the judge asks.\n" in page
    assert "| tokens/s | 51,234 /s | 50,000 to 52,000 | median of 5 |" in page
    assert "| ratio | 1.012 | up to 1.020 |  |" in page
    assert "| a\\|b | 3 |  |  |" in page
    assert "`python -m lab bench --rounds 12`" in page
    assert "2026-01-02 03:04 UTC · commit 0123456789 · H200" in page


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        *((0, "0"), (0.37214, "0.3721"), (0.99, "0.9900"), (0.00051, "0.000510"), (358.0, "358")),
        *((12.3456, "12.35"), (123.456, "123.5"), (-0.5, "-0.5000"), (54174.2, "54,174")),
    ],
)
def test_numbers_show_the_digits_that_count(value: float, shown: str) -> None:
    assert format_number(value) == shown


def test_record_is_read_as_it_was_written(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "record.json"

    write_record(RECORD, path)

    assert read_record(path) == RECORD
    assert "\\u" not in path.read_text(encoding="utf-8")


def test_record_taken_here_knows_its_surroundings() -> None:
    record = take_record("x", [RecordFigure("y", 1.0)], command="make x")

    assert record.machine.endswith("GiB")
    assert record.commit == describe_commit() != "unknown"
    assert record.date.endswith("UTC")
    assert take_record("x", [], machine="another").machine == "another"


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"figures": None}, "figures: Input should be a valid"),
        ({"commit": 7}, "commit: Input should be a valid string"),
        ({"machine": None}, "machine: Input should be a valid string"),
        ({"extra": 1}, "extra: Unexpected keyword"),
        ({"figures": [{"name": "x"}]}, "figures.0.value: Field required"),
        (
            {"figures": [{"name": "x", "value": "1"}]},
            "0.value: Input should be a valid number",
        ),
        (
            {"figures": [{"name": "x", "value": True}]},
            "0.value: Input should be a valid number",
        ),
        (
            {"figures": [{"name": "x", "value": 1, "unit": 2}]},
            "0.unit: Input should be a valid string",
        ),
    ],
)
def test_other_shapes_are_refused(change: dict[str, Any], complaint: str) -> None:
    good = {"name": "n", "command": "c", "commit": "1", "machine": "m", "date": "d", "figures": []}

    assert parse_record(json.dumps(good)).about == ""
    with pytest.raises(BadFile, match=complaint.replace("`", ".")):
        parse_record(json.dumps({**good, **change}))


def test_infinite_figure_is_not_written(tmp_path: Path) -> None:
    bad = replace(RECORD, figures=(RecordFigure("x", float("nan")),))

    with pytest.raises(ValueError, match="JSON compliant"):
        write_record(bad, tmp_path / "bad.json")


def test_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "broken.json"
    path.write_text(json.dumps([1]))

    with pytest.raises(BadFile, match=r"broken\.json"):
        read_record(path)
