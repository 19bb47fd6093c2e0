"""`python -m lab scheduler`, small: both schedulers, the same answers, a record."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from lab.records.record import read_record
from tests.vllm_python import VllmPython

pytestmark = pytest.mark.engine
SMALL = ("--requests", "24", "--tokens", "40", "--rounds", "1")
COMMAND = (sys.executable, "-m", "lab", "scheduler", *SMALL)


def test_scheduler_bench_finds_the_same_answers_and_keeps_a_record(
    vllm_python: VllmPython, tmp_path: Path
) -> None:
    done = vllm_python.run([*COMMAND, "--limit", "1", "--record", str(tmp_path / "record.json")])
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.endswith("the same answers\n")
    record = read_record(tmp_path / "record.json")
    names = [figure.name for figure in record.figures]
    assert "streams, both, the launcher's of vLLM's" in names
    assert len(names) == len(done.stdout.splitlines()) - 1 == 10


def test_scheduler_bench_above_its_limit_exits_1(vllm_python: VllmPython) -> None:
    assert vllm_python.run([*COMMAND, "--kinds", "whole", "--limit", "0"]).returncode == 1
