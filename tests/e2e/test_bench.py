"""The benchmark over the real engine: the demo's answers by heart, CPU times, vLLM's own client."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.e2e.conftest import ROOT, Stack

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]


def test_bench_measures_the_real_engine_and_lets_vllm_measure_it(
    stack: Stack, tmp_path: Path
) -> None:
    out = tmp_path / "bench.json"
    command = [sys.executable, "-m", "lab", "bench", "--quick", "--only", "batch,outside"]

    command += ["--url", stack.gateway, "--direct-url", stack.engine, "--out", str(out)]

    done = subprocess.run(
        [*command, "--status-url", stack.status],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )

    assert done.returncode == 0, done.stdout + done.stderr
    kept = json.loads(out.read_text(encoding="utf-8"))
    assert "known by heart" in kept["facts"]["answers"]
    assert kept["facts"]["engine"]["fingerprint"]
    rows = {row["name"]: row["span"] for row in kept["rows"]}
    assert 0.7 < rows["64 prompts in one call: time"]["value"] < 2, rows
    assert 0 < rows["64 prompts in one call: CPU of the gateway, a request"]["value"] < 5
    outside = [span for name, span in rows.items() if name.startswith("vllm bench serve")]
    assert len(outside) == 3
    assert all(0.5 < span["value"] < 3 for span in outside), outside
