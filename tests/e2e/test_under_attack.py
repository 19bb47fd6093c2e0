"""Ordinary callers of the real engine beside a hostile one: what it costs them.

A short form: `python -m lab attack` takes windows of 10 s and holds what it sees against what is
promised. Here other programs may run beside it, so only what no busy machine brings about counts:
calls that fail, memory that grows, and callers who wait many times as long.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from lab.load.attacks import ATTACKS
from lab.records.record import read_record
from tests.e2e.conftest import ROOT, Stack

# What does not hold may take the engine down, which must be up again for the next one.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(840)]


@pytest.fixture(scope="module")
def attacked(
    stack: Stack, tmp_path_factory: pytest.TempPathFactory
) -> tuple[dict[str, float], str]:
    """The figures of all attacks, one after the other, and what was said of them."""
    record = tmp_path_factory.mktemp("attack") / "record.json"
    command = [sys.executable, "-m", "lab", "attack", "--url", stack.gateway]
    command += ["--status", stack.status, "--window", "1", "--rounds", "1"]
    done = subprocess.run(
        [*command, "--record", str(record)],
        cwd=ROOT, capture_output=True, text=True, timeout=800, check=False,
    )  # fmt: skip

    said = done.stdout + done.stderr
    assert done.returncode in {0, 1}, said
    assert record.exists(), said
    return {one.name: one.value for one in read_record(record).figures}, said


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_costs_the_other_callers_no_answer_and_little_time(
    attacked: tuple[dict[str, float], str], attack: str
) -> None:
    figures, said = attacked
    assert figures[f"{attack}: requests of the attack"] > 0, said
    assert figures[f"{attack}: calls that failed"] == 0, said
    if attack != "large-batches":  # with more sequences a step takes longer, on a CPU many times
        assert figures[f"{attack}: times slower"] < 10, said
    assert figures[f"{attack}: gateway grew by"] < 200, said
    assert figures[f"{attack}: engine grew by"] < 200, said
    assert "nobody was served" not in said
