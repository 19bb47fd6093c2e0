"""A batch beside callers who wait, before a gateway whose engine is a fake."""

from __future__ import annotations

from pathlib import Path

import pytest

from lab.load.run_lanes import ARMS, build_figures, find_ratio, measure, parse_arguments
from lab.reports.console import ProgressLine
from tests.fake_engine import Behaviour
from tests.gateway.conftest import serve_gateway


async def test_lanes_measure_each_arm_and_leave_no_batch_behind(tmp_path: Path) -> None:
    words = "--rounds 1 --calls 4 --callers 2 --think 0.01 --lead 0.01 --lines 400"
    arguments = parse_arguments(words.split())
    engine = Behaviour(delay_s=0.02)
    async with serve_gateway(engine, batch_folder=tmp_path / "kept") as served:
        measured = await measure(arguments, served.url, ProgressLine())
        figures = (await served.client.get("/metrics")).text

    assert [len(measured[arm].first_s) for arm in ARMS] == [4, 4, 4]
    assert find_ratio(measured, "beside a batch") > 0
    assert "gateway_batch_running_lines 0.0" in figures
    names = [figure.name for figure in build_figures(measured)]
    assert "beside a batch over alone: first token, p99" in names


@pytest.mark.parametrize("words", [["--rounds", "0"], ["--limit", "0"], ["--url", "no address"]])
def test_lanes_refuse_what_cannot_be(words: list[str]) -> None:
    with pytest.raises(SystemExit) as end:
        parse_arguments(words)
    assert end.value.code == 2
