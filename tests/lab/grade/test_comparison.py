"""Which differences between two grades are real."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from lab.failures import BadFile
from lab.grade.comparison import GradeComparison, GradeExtract, compare, describe, read_grade
from lab.grade.findings import GradeFinding
from lab.grade.grade_result import write_ungraded
from lab.intervals import bootstrap
from lab.records.figure_change import FigureChange


def measured(scores: list[float], speeds: tuple[float, ...] = (), **others: Any) -> GradeExtract:
    by_question = {f"q{number}": value for number, value in enumerate(scores)}
    fields = {
        "path": "a.json",
        "course": by_question,
        "whitespace": by_question,
        "speeds": {"tokens": speeds} if speeds else {},
        "workload": "358 in one call",
        "machine": "this one",
    }
    return GradeExtract(**(fields | others))


def draw(count: int, middle: float, spread: float, seed: int) -> list[float]:
    chance = random.Random(seed)
    return [min(1.0, max(0.0, chance.gauss(middle, spread))) for _ in range(count)]


def quality(comparison: GradeComparison) -> FigureChange:
    return comparison.changes[0]


def speed(before: tuple[float, ...], after: tuple[float, ...], **others: Any) -> FigureChange:
    scores = [0.5] * 20
    return compare(measured(scores, before), measured(scores, after, **others)).changes[-1]


def test_small_loss_everywhere_is_real() -> None:
    before = draw(200, 0.5, 0.2, 1)
    after = [value - 0.01 for value in before]

    found = quality(compare(measured(before), measured(after)))

    assert found.verdict == "really worse"
    assert found.change == pytest.approx(-0.01)


def test_other_answers_of_the_same_quality_are_no_real_difference() -> None:
    """Under chance alone, about one in twenty may look real."""
    real = 0
    for seed in range(40):
        before, after = draw(40, 0.5, 0.2, seed), draw(40, 0.5, 0.2, seed + 1000)
        sides = [measured(scores, whitespace=None) for scores in (before, after)]
        real += quality(compare(*sides)).verdict != "no real difference"
    assert real <= 5


def test_bootstrap_interval_agrees_with_theory() -> None:
    changes = draw(400, 0.5, 0.1, 5)

    low, high = bootstrap(changes)

    error = 0.1 / 400**0.5
    assert low == pytest.approx(sum(changes) / 400 - 1.96 * error, abs=0.2 * error)
    assert high == pytest.approx(sum(changes) / 400 + 1.96 * error, abs=0.2 * error)
    assert bootstrap(changes) == (low, high), "the same data give the same interval"


def test_equal_grades_do_not_differ() -> None:
    comparison = compare(measured([0.3] * 20), measured([0.3] * 20))

    assert {one.verdict for one in comparison.changes} == {"no real difference"}
    assert (comparison.better, comparison.worse) == (0, 0)
    assert not comparison.is_worse


def test_few_questions_tell_nothing() -> None:
    found = quality(compare(measured([0.9] * 3), measured([0.1] * 3)))

    assert found.verdict == "cannot be told: 3 questions are too few"


def test_speed_beyond_the_runs_scatter_is_real() -> None:
    found = speed((100.0, 101.0, 99.0, 100.5), (105.0, 106.0, 104.5, 105.5))

    assert found.verdict == "really better"
    assert found.change == pytest.approx(0.05, abs=0.01)


def test_speed_within_the_runs_scatter_is_chance() -> None:
    found = speed((100.0, 80.0, 120.0, 95.0), (105.0, 85.0, 122.0, 99.0))

    assert found.verdict == "no real difference"


@pytest.mark.parametrize(
    ("after", "others", "reason"),
    [
        ((100.0,), {}, "one run says nothing"),
        ((100.0, 101.0), {"machine": "another"}, "another machine"),
        ((100.0, 101.0), {"workload": "one by one"}, "another workload"),
        ((100.0, 101.0), {"is_whole": False}, "did not answer every question"),
    ],
)
def test_speed_that_cannot_be_compared_says_why(
    after: tuple[float, ...], others: dict[str, Any], reason: str
) -> None:
    found = speed((200.0, 201.0), after, **others)

    assert found.verdict.startswith("cannot be told: ")
    assert reason in found.verdict


def test_questions_of_one_side_alone_are_left_out() -> None:
    comparison = compare(measured([0.5] * 20), measured([0.5] * 15))

    assert comparison.questions == 15
    assert "5 questions are in one of the two alone" in comparison.notes[0]


def test_other_references_make_scores_incomparable() -> None:
    texts = {f"q{number}": "a" for number in range(20)}
    before = measured([0.5] * 20, references=texts)
    after = measured([0.1] * 20, references=texts | {"q3": "b"})

    found = quality(compare(before, after))

    assert found.verdict == "cannot be told: 1 questions have other references"
    assert quality(compare(before, measured([0.1] * 20, references=texts))).is_worse


def test_no_shared_question_is_refused() -> None:
    other = measured([0.5], course={"other": 0.5})

    with pytest.raises(BadFile, match="share no question"):
        compare(measured([0.5]), other)


def test_details_of_the_seed_evaluator_are_read(tmp_path: Path) -> None:
    rows = [
        {"question": f"q{n}", "reference": "r", "prediction": "p", "rougeL_f1": n / 20}
        for n in range(20)
    ]
    path = tmp_path / "seed.json"
    path.write_text(json.dumps(rows))

    read = read_grade(path)
    comparison = compare(read, measured([n / 20 for n in range(20)]))

    assert [one.name for one in comparison.changes] == ["ROUGE-L, course"]
    assert quality(comparison).change == 0


_SCORED = '[{{"question": "q", "rougeL_f1": {}}}]'


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{}",
        '{"facts": {}, "runs": []}',
        '[{"question": "q"}]',
        "[1]",
        "null",
        "[" * 200_000,
        _SCORED.format("NaN"),
        _SCORED.format('"abc"'),
    ],
)
def test_other_files_are_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "other.json"
    path.write_text(text)

    with pytest.raises(BadFile, match=r"other\.json"):
        read_grade(path)


def test_details_of_a_server_that_never_was_ready_say_so(tmp_path: Path) -> None:
    path = tmp_path / "never.json"
    write_ungraded(GradeFinding("never_ready", "error", "not ready within 4 s"), path)

    with pytest.raises(BadFile, match="nothing was graded: never_ready: not ready within 4 s"):
        read_grade(path)


def test_description_has_a_line_for_every_difference() -> None:
    before, after = measured([0.5] * 20, (100.0, 101.0)), measured([0.4] * 20, (50.0, 51.0))

    lines = describe(compare(before, after), before, after)

    assert sum("really worse" in line for line in lines) == 3
    assert "0 better, 20 worse, 0 the same" in lines[-1]
