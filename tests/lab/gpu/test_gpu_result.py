"""What rounds say: ratios round by round, answers that must be equal, the record."""

from __future__ import annotations

import io
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from common.project import DEMO_QUESTIONS
from common.questions import read_questions
from lab.gpu.arms import PlannedArm, parse_arm
from lab.gpu.calls import AnswerCount, AskedLoads
from lab.gpu.gpu_result import GpuResult
from lab.gpu.run_gpu import GpuRun, build_parser, leave_doubles_out, take_different
from lab.reports.console import ProgressLine
from launcher.plan.command import EngineCommand

LOAD = "2 prompts x 8"


def build_arm(word: str, *flags: str) -> PlannedArm:
    return PlannedArm(parse_arm(word), EngineCommand("vllm", flags, {}), 1, 1, None)


def build_result(folder: Path, *words: str, is_endless: bool = True) -> GpuResult:
    arguments = build_parser().parse_args(["--out", str(folder / "gpu.json")])
    loads = AskedLoads(("a", "b", "a 2"), frozenset("ab"), (2,), (8,), (), is_endless)
    planned = tuple(build_arm(word) for word in words)
    return GpuResult(arguments, loads, planned, {"model": "m", "vllm": "vllm 0"})


def test_ratio_is_taken_in_the_rounds_that_have_both(tmp_path: Path) -> None:
    result = build_result(tmp_path, "course", "latency")
    for fast, slow in ((10.0, 5.0), (30.0, 10.0), (90.0, None)):
        taken = {"course": {f"ids, {LOAD}": {"rate": fast, "EngineCore": 0.5}}}
        if slow:
            taken["latency"] = {f"ids, {LOAD}": {"rate": slow}}
        result.add_round(taken, [])

    figures = {figure.name: figure for figure in result.figures()}

    assert figures[f"course, ids, {LOAD}"].value == 30
    assert figures[f"course, ids, {LOAD}"].note == "cores: EngineCore 0.50"
    ratio = figures[f"latency ids / course ids, {LOAD}"]
    assert ratio.value == pytest.approx(5 / 12)
    assert (ratio.low, ratio.high) == (1 / 3, 1 / 2)


def test_answers_of_real_weights_must_be_equal_and_of_random_ones_need_not(tmp_path: Path) -> None:
    for is_endless in (True, False):
        result = build_result(tmp_path, "course", "course-stock", is_endless=is_endless)
        result.known = {"course": {"a": "1", "a 2": "x"}, "course-stock": {"a": "1", "a 2": "y"}}
        assert result.is_good, "variants of a question are no question that the model knows"
        result.known["course-stock"]["a"] = "2"
        assert result.is_good == is_endless


def test_way_that_mixes_up_what_another_does_not_is_no_good_result(tmp_path: Path) -> None:
    result = build_result(tmp_path, "course")
    result.told["course"] = {"ids": AnswerCount(2, 2, 1), "predict": AnswerCount(2, 2, 1)}
    assert result.is_good
    result.told["course"]["ids"].mixed_up = 0
    assert not result.is_good


async def test_time_that_is_used_up_ends_the_rounds_after_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def measure(*_: object, **__: object) -> dict[str, dict[str, float]]:
        return {f"ids, {LOAD}": {"rate": 1.0}}

    said = io.StringIO()
    arguments = build_parser().parse_args(["--out", str(tmp_path / "gpu.json")])
    run = GpuRun(arguments, read_questions(DEMO_QUESTIONS), ProgressLine(stream=said))
    monkeypatch.setattr(run, "_measure_arm", measure)
    running = SimpleNamespace(arm=parse_arm("course"))
    arm: Any = SimpleNamespace(running=running, told={}, book=SimpleNamespace(known={}))
    result = build_result(tmp_path, "course")

    await run._take_rounds([arm], result, deadline=0.0)
    await run._take_rounds([], result, deadline=0.0)

    assert len(result.rounds) == 1
    assert "the time is used up after 1 round\n" in said.getvalue()


def test_arm_that_is_another_one_again_is_left_out_of_those_by_default() -> None:
    arms = [build_arm("quality", "--a"), build_arm("quality-stock", "--a"), build_arm("latency")]
    assert [one.arm.word for one in leave_doubles_out(arms)] == ["quality", "latency"]


def test_questions_that_run_out_are_varied() -> None:
    assert take_different(["a", "b", "a"], 5) == ("a", "b", "a 2", "b 2", "a 3")
