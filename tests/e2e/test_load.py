"""A short soak of the real engine: every answer checked, the sums compared."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.e2e.conftest import ROOT, Stack

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def test_soak_of_the_real_engine_holds(stack: Stack) -> None:
    command = [sys.executable, "-m", "lab", "load", "--url", stack.gateway]
    command += ["--status", stack.status, "--duration", "4", "--callers", "8"]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=110, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "all held" in done.stdout
