"""`python -m lab sweep` over the fake vLLM: every combination once, kept, and the best written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest

from common.project import DEMO_QUESTIONS
from common.questions import read_questions
from lab.course.run_sweep import (
    build_parser,
    describe_context,
    find_asked_model,
    list_arms,
    main,
)
from lab.course.sweep_result import SweepArm, SweepResult, SweptArm
from lab.failures import BadOptions
from lab.options import parse_options
from lab.readiness import ServerNeverReady
from tests.lab.grade.test_run_grade import environment
from tests.launcher.programs import MODEL, ROOT

pytestmark = pytest.mark.slow  # programs and files; the same on every Python


def sweep(folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    out = folder / "sweep.json"
    return subprocess.run(
        [sys.executable, "-m", "lab", "sweep", "--out", str(out), "--count", "4", *options],
        cwd=ROOT,
        env=environment(folder),
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )


@pytest.fixture
def bare(tmp_path: Path) -> Path:
    """A model without a chat template."""
    folder = tmp_path / "bare"
    shutil.copytree(MODEL, folder)
    config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    del config["chat_template"]
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def test_sweep_measures_each_once_goes_on_where_it_was_and_writes_the_best(
    tmp_path: Path, bare: Path
) -> None:
    course = tmp_path / "course.toml"
    course.write_text("[gateway]\nmax_tokens = 7\ntop_p = 0.5\n", encoding="utf-8")
    few = ("--model", str(bare), "--system-prompt", "none", "--single-line", "yes")

    done = sweep(tmp_path, *few, "--prompt-style", "chat", "qa")

    assert done.returncode == 0, done.stdout + done.stderr
    kept: dict[str, Any] = json.loads((tmp_path / "sweep.json").read_text(encoding="utf-8"))
    assert [one["arm"]["style"] for one in kept["swept"]] == ["chat", "qa"]
    assert "has no chat template" in kept["swept"][0]["failure"]
    assert kept["swept"][1]["answered"] == 4
    assert "* qa, system none, 256 tokens, one line" in done.stdout
    page = (tmp_path / "sweep.html").read_text(encoding="utf-8")
    assert "<svg" in page
    assert "has no chat template" in page

    done = sweep(tmp_path, *few, "--prompt-style", "qa", "--write", str(course))

    assert done.returncode == 0, done.stderr
    assert "1 of 1 are measured already" in done.stderr
    assert "starting" not in done.stderr
    written = tomllib.loads(course.read_text(encoding="utf-8"))["gateway"]
    assert written["prompt_style"] == "qa"
    assert written["single_line"] is True
    assert written["max_tokens"] == 256
    assert written["top_p"] == 0.5


def test_sweep_that_cannot_begin_says_why(tmp_path: Path) -> None:
    out = ["--out", str(tmp_path / "sweep.json")]
    with pytest.raises(BadOptions, match="none-such: cannot be read"):
        main([*out, "--system-prompt", str(tmp_path / "none-such")])
    with pytest.raises(ServerNeverReady, match="no engine answers at"):
        main([*out, "--engine", "http://127.0.0.1:9", "--model", str(MODEL)])
    with pytest.raises(BadOptions, match="--engine needs --model"):
        main([*out, "--engine", "http://127.0.0.1:9"])


def test_earlier_figures_count_while_nothing_behind_them_changed(
    tmp_path: Path, bare: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    course, system = tmp_path / "course.toml", tmp_path / "system.txt"
    monkeypatch.setattr("lab.course.run_sweep._COURSE", course)
    system.write_text("Be brief.")

    def describe(*words: str) -> tuple[str, list[SweepArm]]:
        model = ["--model", str(bare), "--system-prompt", str(system)]
        arguments = parse_options(build_parser(), [*model, *words])
        asked = read_questions(DEMO_QUESTIONS).take(4)
        context = describe_context(arguments, asked, find_asked_model(arguments))
        return context, list_arms(arguments)

    first, arms = describe()
    assert describe() == (first, arms)
    assert describe("--", "--set", "max-num-seqs=3")[0] != first
    course.write_text("[gateway]\ntop_p = 0.5\n")
    second = describe()[0]
    assert second != first
    (bare / "config.json").write_text((bare / "config.json").read_text() + "\n")
    assert describe()[0] != second
    system.write_text("Be long.")
    assert not set(describe()[1]) & set(arms)


def test_what_failed_is_tried_again(tmp_path: Path) -> None:
    result = SweepResult("x")
    result.add(SweptArm(SweepArm("qa", "", 32, single_line=False), 0.3))
    result.add(SweptArm(SweepArm("chat", "", 32, single_line=False), failure="no start"))
    result.write(tmp_path / "sweep.json")

    again = SweepResult.read(tmp_path / "sweep.json", "x")

    assert again is not None
    assert [one.arm.style for one in again.swept] == ["qa"]


def test_best_is_the_fastest_of_those_that_score_nearly_the_same(tmp_path: Path) -> None:
    arms = [SweepArm("qa", "", tokens, single_line=False) for tokens in (32, 64, 128, 256)]
    result = SweepResult("x")
    figures = [(0.3, 900.0), (0.5, 500.0), (0.501, 400.0), (0.0, 0.0)]
    for arm, (score, speed) in zip(arms, figures, strict=True):
        failure = "" if speed else "it does not start"
        result.add(SweptArm(arm, score, score, 1.0, speed, 4, 4, failure))
    best = result.find_best(arms)
    assert best is not None
    assert best.arm.max_tokens == 64
    assert [one.arm.max_tokens for one in result.rank(arms)] == [128, 64, 32, 256]
    result.write(tmp_path / "sweep.json")
    again = SweepResult.read(tmp_path / "sweep.json", "x")
    assert again is not None
    assert [one.arm.max_tokens for one in again.rank(arms)] == [128, 64, 32]
    assert SweepResult.read(tmp_path / "sweep.json", "another") is None
