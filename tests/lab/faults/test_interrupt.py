"""Ctrl-C in the middle of a fault table: nothing that it started is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.launcher.programs import FAKE_VLLM, ROOT, wait_for

pytestmark = pytest.mark.slow  # a whole program, which the wheel's tests leave out


def test_interrupted_table_leaves_no_process(tmp_path: Path) -> None:
    environment = {
        **os.environ,
        "TMPDIR": str(tmp_path),
        "FAKE_VLLM": "hang_loading",
        "PYTHONPATH": f"{FAKE_VLLM}:{ROOT}",
        "LAUNCHER_CACHE_DIR": str(tmp_path / "cache"),
    }
    command = [sys.executable, "-m", "lab", "faults", "--only", "kill-core,redis-killed"]
    table = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE)
    try:
        wait_for(lambda: _is_starting(tmp_path), "the engine starts", within_s=300)
        assert _list_started(tmp_path)
        table.send_signal(signal.SIGINT)
        _, said = table.communicate(timeout=60)
    finally:
        table.kill()

    assert (table.returncode, said.splitlines()[-1]) == (130, b"faults: interrupted")
    assert _list_started(tmp_path) == []
    assert list(tmp_path.glob("faults-*")) == []


def _is_starting(folder: Path) -> bool:
    logs = folder.glob("faults-*/service/launcher-1.log")
    return any(b"engine_starting" in log.read_bytes() for log in logs)


def _list_started(folder: Path) -> list[str]:
    """Whatever has this folder in its environment and is neither the table nor ended."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environment = (entry / "environ").read_bytes()
        except OSError:
            continue
        if f"LAB_FAULTS_FOLDER={folder}/".encode() in environment:
            found.append((entry / "comm").read_text().strip())
    return found
