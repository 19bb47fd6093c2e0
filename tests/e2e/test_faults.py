"""Some rows of the fault table, before the real engine: those that leave the service as it is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, Stack

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

_FAULTS = ("engine-too-few", "dns-wrong", "port-taken")


def test_faults_before_the_real_engine_hold(stack: Stack, tmp_path: Path) -> None:
    record, page = tmp_path / "faults.json", tmp_path / "reliability.md"
    command = [sys.executable, "-m", "lab", "faults", "--url", stack.gateway]
    command += ["--status", stack.status, "--only", ",".join(_FAULTS)]
    command += ["--record", str(record), "--page", str(page)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=200, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    assert "3 faults: 0 not held, 0 not here" in done.stdout
    rows = json.loads(record.read_text(encoding="utf-8"))["rows"]
    assert {row["name"] for row in rows} == set(_FAULTS)
    assert all(f"`{name}`: " in page.read_text(encoding="utf-8") for name in _FAULTS)
