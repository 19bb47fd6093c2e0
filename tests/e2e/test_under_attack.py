"""Ordinary callers of the real engine beside a hostile one: what it costs them.

A short form: `python -m lab attack` takes windows of 10 s.
"""

from __future__ import annotations

import subprocess
import sys

import pytest

from lab.load.attacks import ATTACKS
from tests.e2e.conftest import ROOT, Stack

# What does not hold may take the engine down, which must be up again for the next one.
pytestmark = [pytest.mark.engine, pytest.mark.timeout(420)]


@pytest.mark.parametrize("attack", ATTACKS)
def test_attack_costs_the_other_callers_at_most_what_is_promised(stack: Stack, attack: str) -> None:
    command = [sys.executable, "-m", "lab", "attack", "--attack", attack, "--url", stack.gateway]
    command += ["--status", stack.status, "--window", "1.5", "--rounds", "2"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=400, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
