"""The recipe of docs/course.md: the demo model goes on learning. It needs the engine's torch."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def test_demo_can_be_trained_further_as_the_recipe_says(tmp_path: Path) -> None:
    """It goes on from the folder, and what it leaves is one. One that has learnt its answer, as
    after these few steps, also ends it, and is verified in half the time.
    """
    questions = tmp_path / "mine.jsonl"
    row = {"question": "谁写了这一页？", "answer": "参赛者自己写的。"}
    questions.write_text(json.dumps(row, ensure_ascii=False), encoding="utf-8")
    command = [sys.executable, "-m", "demo.train", "--start", "demo/model", "--epochs", "20"]
    command += ["--questions", str(questions), "--out", str(tmp_path / "my-ft")]
    command += ["--threads", "1"]  # two wait for each other on a busy machine, and burn a core
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    start, out = ROOT / "demo" / "model", tmp_path / "my-ft"
    assert (out / "tokenizer.json").read_bytes() == (start / "tokenizer.json").read_bytes()
    weights = [(one / "model.safetensors").read_bytes() for one in (start, out)]
    assert len(weights[0]) == pytest.approx(len(weights[1]), rel=0.01)
    assert weights[0] != weights[1]
