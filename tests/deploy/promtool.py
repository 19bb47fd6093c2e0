"""Prometheus's own judge of metrics, rules and expressions."""

from __future__ import annotations

import shutil
import subprocess

import pytest


def run_promtool(*words: object, text: str = "") -> str:
    """What it says when it is content; a failed test with its words when it is not."""
    program = shutil.which("promtool")
    if program is None:
        pytest.skip("no promtool here; `scripts/system.sh prometheus` gets it")
    done = subprocess.run(
        [program, *map(str, words)], input=text, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr
