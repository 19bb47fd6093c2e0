"""Two thousand fuzz cases before the real engine: what `python -m lab fuzz` does with a hundred
thousand.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from lab.fuzz.cases.kinds import KINDS
from tests.e2e.conftest import ROOT, Stack

pytestmark = [pytest.mark.engine, pytest.mark.timeout(600)]

_CASES = 2000


def test_fuzz_before_the_real_engine_leaves_it_as_it_was(stack: Stack, tmp_path: Path) -> None:
    record = tmp_path / "fuzz.json"
    command = [sys.executable, "-m", "lab", "fuzz", "--url", stack.gateway]
    command += ["--status", stack.status, "--cases", str(_CASES), "--record", str(record)]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=560, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads(record.read_text(encoding="utf-8"))["figures"]
    figures = {row["name"]: row["value"] for row in rows}
    assert figures["cases"] == _CASES
    assert all(figures[f"cases of {name}"] > 0 for name in KINDS)
    assert figures["served (2xx)"] > _CASES * 0.2
    assert figures["processes that were replaced"] == 0
    assert figures["honest calls answered rightly"] == 2 * _CASES / 500
