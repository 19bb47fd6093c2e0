"""`python -m lab gpu` as a program: over a stand-in for vLLM, and over the real one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from common.questions import read_questions
from lab.bench.bench_figures import BenchFailed
from lab.gpu.arms import PlannedArm
from lab.gpu.run_gpu import GpuRun, build_parser
from lab.options import parse_options
from lab.records.record import read_record
from lab.reports.console import ProgressLine
from launcher.plan.command import find_vllm
from tests.launcher.programs import FAKE_VLLM, ROOT, share_vllm_cache

pytestmark = pytest.mark.programs


def run(folder: Path, *words: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("LAUNCHER_", "GATEWAY_"))}
    own = {"LAUNCHER_CACHE_DIR": str(folder / "cache"), "STARTED_BY_TEST_IN": f"{folder}/"}
    out = ["--out", str(folder / "gpu.json"), "--record", str(folder / "record.json")]
    return subprocess.run(
        [sys.executable, "-m", "lab", "gpu", *out, *words],
        cwd=ROOT, env=kept | own | variables, capture_output=True, text=True, check=False,
    )  # fmt: skip


def run_fake(folder: Path, *words: str, fake: str = "echo") -> subprocess.CompletedProcess[str]:
    """Two H200s, of which nothing is used: the stand-in makes ten tokens of any prompt."""
    variables = {"PYTHONPATH": f"{FAKE_VLLM}:{ROOT}", "FAKE_VLLM": fake}
    variables |= {"LAUNCHER_GPU": "2x H200", "CUDA_VISIBLE_DEVICES": "4,5"}
    asked = ["--load-format", "dummy", "--prompts", "12", "--tokens", "10"]
    return run(folder, *asked, *words, **variables)


def read_figures(folder: Path) -> dict[str, Any]:
    return {figure.name: figure for figure in read_record(folder / "record.json").figures}


def list_left(folder: Path) -> list[str]:
    left = []
    for process in psutil.process_iter():
        try:
            if process.environ().get("STARTED_BY_TEST_IN") == f"{folder}/":
                left.append(" ".join(process.cmdline()))
        except psutil.Error:
            continue
    return left


def test_arms_are_measured_in_turns_and_held_against_each_other(tmp_path: Path) -> None:
    words = ["default", "course", "course-stock", "2*course"]

    done = run_fake(tmp_path, "--arms", *words, "--rounds", "2")

    assert done.returncode == 0, done.stdout + done.stderr
    figures, load = read_figures(tmp_path), "12 prompts x 10"
    for name in (
        f"default, texts, {load}",
        f"default, ids, {load}",
        f"course predict / course ids, {load}",
        f"course ids again / course ids, {load}",
        f"course predict / default texts, {load}",
        f"course predict / course-stock predict, {load}",
        f"2*course predict / course predict, {load}",
    ):
        assert figures[name].value > 0, name
    assert "gateway" in figures[f"course, predict, {load}"].note
    assert "API server" in figures[f"course, ids, {load}"].note
    assert figures["course, predict: answers as the first"].value == 3 * 12  # the warm-up too
    assert figures["course: answers as course-stock's"].value == 12
    assert figures["course: different answers"].value == 12
    rounds = json.loads((tmp_path / "gpu.json").read_text())["rounds"]
    assert [set(taken) for taken in rounds] == [
        {"default", "course", "course-stock", "2*course"}
    ] * 2
    assert list_left(tmp_path) == []


def test_arm_that_does_not_start_is_told_of_and_the_others_are_measured(tmp_path: Path) -> None:
    fake = "echo dies_with=TRITON_ATTN"
    words = ["--arms", "default", "balanced", "course", "--rounds", "1"]

    done = run_fake(tmp_path, *words, fake=fake)

    assert done.returncode == 0, done.stdout + done.stderr
    assert "course is left out" in done.stderr or "course ended" in done.stderr, done.stderr
    assert "balanced, predict, 12 prompts x 10" in read_figures(tmp_path)
    assert not [name for name in read_figures(tmp_path) if name.startswith("course")]


def test_no_arm_that_starts_is_no_result(tmp_path: Path) -> None:
    done = run_fake(tmp_path, "--arms", "course", fake="exit_loading=3")

    assert done.returncode == 3
    assert "course ended: ValueError: the fake model is not supported" in done.stderr
    assert "nothing was measured" in done.stderr


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--arms", "lunch"], "no arm 'lunch'"),
        (["--arms", "3*course"], "takes 3 cards, of 2"),
        (["--control", "latency-stock"], "'latency-stock' is none of the arms"),
        (["--arms", "course", "--", "--profile", "cpu"], "an arm has options of its own"),
        (["--model", "/nowhere"], "/nowhere is no folder of a model"),
        (["--tokens", "12,x"], "x is no whole number from 1 on"),
    ],
)
def test_bad_options_are_one_line(tmp_path: Path, words: list[str], said: str) -> None:
    done = run_fake(tmp_path, *words)

    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.engine
@pytest.mark.timeout(400)
def test_real_engine_answers_the_same_by_every_way(tmp_path: Path) -> None:
    words = ["--arms", "cpu", "--rounds", "1", "--prompts", "24", "--tokens", "32"]
    share_vllm_cache(tmp_path)

    done = run(tmp_path, *words, "--streams", "4", "--seconds", "350")

    assert done.returncode == 0, done.stdout + done.stderr
    figures = read_figures(tmp_path)
    assert figures["cpu, predict: answers as the first"].value == 24 + 24
    assert figures["cpu, predict, 4 streams x 64: first token"].value > 0
    assert "EngineCore" in figures["cpu, ids, 24 prompts x 32"].note
    assert list_left(tmp_path) == []


@pytest.mark.slow  # where vLLM is installed
async def test_card_that_nvidia_smi_tells_of_is_planned_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "nvidia-smi"
    program.write_text('#!/bin/sh\necho "NVIDIA H200, 143771, 0, 9.0, 580.82.07"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr("lab.gpu.arms.find_vllm", lambda: replace(find_vllm(), build="gpu"))
    planned: list[str] = []

    async def note(_: GpuRun, group: Sequence[PlannedArm], *rest: object) -> None:
        planned.extend(one.describe() for one in group)

    monkeypatch.setattr(GpuRun, "_measure_group", note)
    words = ["--arms", "course", "--out", str(tmp_path / "gpu.json")]
    arguments = parse_options(build_parser(), words)
    asked = read_questions(Path(arguments.questions), needs_answers=False)

    with pytest.raises(BenchFailed, match="nothing was measured"):
        await GpuRun(arguments, asked, ProgressLine()).measure()

    assert "of 1 card" in planned[0]
