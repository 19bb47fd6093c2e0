"""The judge at home and the self-test, over the real engine and the demo model."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, Stack

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def run(program: str, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lab", program, *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_grade_of_the_demo_model_has_no_faults(stack: Stack, tmp_path: Path) -> None:
    details = tmp_path / "grade.json"

    done = run(
        "grade",
        *("--no_start_server", "--server_url", stack.gateway, "--status_url", stack.status),
        *("--count", "358", "--details_out", str(details)),
    )

    assert done.returncode == 0, done.stdout + done.stderr
    grade = json.loads(details.read_text(encoding="utf-8"))
    assert [len(grade["answers"]), grade["runs"][0]["answered"]] == [358, 358]
    assert grade["runs"][0]["exact"] >= 0.97
    assert grade["runs"][0]["rouge_course"] >= 0.97 * grade["facts"]["ceiling"]
    assert grade["runs"][0]["speed"]["tokens"] > 20_000
    assert grade["facts"]["engine"]["profile"] == "cpu"
    assert details.with_suffix(".html").stat().st_size > 100_000


def test_selftest_passes_every_check(stack: Stack) -> None:
    done = run("selftest", "--server-url", stack.gateway, "--status-url", stack.status)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "14 of 14 passed" in done.stdout
    assert "loaded in" in done.stdout
    assert "memory: main" in done.stdout
