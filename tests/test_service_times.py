"""The simulation's engine takes as long as the one of the records did."""

from __future__ import annotations

from dataclasses import astuple
from pathlib import Path

import pytest

from lab.records.record import RunRecord, read_record
from lab.scale.service_times import H200_TIMES

pytestmark = pytest.mark.slow  # the records read the same to every Python
RESULTS = Path(__file__).parents[1] / "docs" / "results"
STREAMS, PROMPTS = 256, 358


def find(record: RunRecord, name: str) -> float:
    (value,) = [figure.value for figure in record.figures if figure.name == name]
    return value


def test_service_times_are_those_of_the_records() -> None:
    streams, batches = (read_record(RESULTS / f"gpu-{one}.json") for one in ("streams", "course"))
    first_s, later_s = (
        find(streams, f"course, ids, {word} x 64: first token") / 1000
        for word in ("1 stream", f"{STREAMS} streams")
    )
    step_s = find(streams, "course, ids, 1 stream x 64: between tokens") / 1000
    # What 128 tokens more of each took, so without the prompts.
    short_s, long_s = (
        PROMPTS * tokens / find(batches, f"course, ids, {PROMPTS} prompts x {tokens}")
        for tokens in (128, 256)
    )
    full_step_s = (long_s - short_s) / 128
    measured = (
        (later_s - first_s) / (STREAMS - 1),
        first_s - step_s,
        step_s,
        (full_step_s - step_s) / (PROMPTS - 1),
    )

    assert astuple(H200_TIMES) == pytest.approx(measured, rel=1e-6)
