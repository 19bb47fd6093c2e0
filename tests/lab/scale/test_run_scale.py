"""The command, and the real process before a few stand-ins."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.__main__ import main
from lab.records.record import read_record
from lab.scale.gateway_process import ProcessLoad, measure_process


def test_scale_simulates_each_size_and_keeps_a_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = tmp_path / "scale.json"
    words = [
        "--parts",
        "simulation",
        "--engines",
        "1,10",
        "--clients",
        "40",
        "--seconds",
        "6",
        "--sequences",
        "16",
    ]

    assert main(["scale", *words, "--machine", "a clock", "--record", str(kept)]) == 0

    out, record = capsys.readouterr().out, read_record(kept)
    assert "calls answered" in out
    names = [figure.name for figure in record.figures]
    assert names[0] == "simulated, 1 engine: calls answered"
    assert "simulated, 10 engines: of those lost" in names
    assert "40 callers think 1 s" in record.about


@pytest.mark.parametrize("words", [["--engines", "0"], ["--parts", "x"], ["--seconds", "0"]])
def test_scale_refuses_what_cannot_be(words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        main(["scale", *words])
    assert end.value.code == 2


@pytest.mark.programs
async def test_process_is_measured_through_the_death_of_an_engine() -> None:
    load = ProcessLoad(seconds=0.1, rounds=1, idle_s=0.1, settle_s=0.2, delay_s=0.1)

    figures = await measure_process(2, load)

    assert figures.call_cpu_ms[0] > 0
    assert figures.chunk_cpu_us[0] > 0
    assert figures.files > 2
    assert figures.lost_calls > 0
    assert figures.back_after_s > 0
