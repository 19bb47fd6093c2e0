"""Ordinary callers of the real engine beside a hostile one: what it costs them.

A short form: `python -m lab attack` takes windows of 10 s and holds what it sees against what is
promised. Here other programs may run beside it, so only what no busy machine brings about counts:
calls that fail, memory that grows, and callers who wait many times as long.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lab.load.attacks import ATTACKS
from lab.records.record import read_record
from tests.e2e.conftest import ROOT, Stack

# What does not hold may take the engine down, which must be up again for the next one.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(420)]


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_costs_the_other_callers_no_answer_and_little_time(
    stack: Stack, attack: str, tmp_path: Path
) -> None:
    record = tmp_path / "record.json"
    command = [sys.executable, "-m", "lab", "attack", "--attack", attack, "--url", stack.gateway]
    command += ["--status", stack.status, "--window", "1.5", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--record", str(record)],
        cwd=ROOT, capture_output=True, text=True, timeout=400, check=False,
    )  # fmt: skip

    said = done.stdout + done.stderr
    assert done.returncode in {0, 1}, said
    figures = {one.name.partition(": ")[2]: one for one in read_record(record).figures}
    assert figures["requests of the attack"].value > 0, said
    assert figures["calls that failed"].value == 0, said
    if attack != "large-batches":  # with more sequences a step takes longer, on a CPU many times
        assert figures["times slower"].value < 10, said
    assert figures["gateway grew by"].value < 200, said
    assert figures["engine grew by"].value < 200, said
    assert "nobody was served" not in said
