"""The benchmark's verdicts: what is real, what the control forbids, what has changed."""

from __future__ import annotations

import json
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from lab.bench.answer_book import AnswerBook, MixedUp, build_book
from lab.bench.bench_figures import (
    BenchFailed,
    BenchRow,
    Bound,
    RoundSeries,
    build_added,
    build_ratio,
)
from lab.bench.report.earlier_run import StoredRun, compare_runs, read_run
from lab.failures import BadFile
from lab.intervals import Interval, find_interval
from lab.records.figure_change import FigureChange, describe_changes

SETTING = {"engine": {"machine": "this one", "workload": "x"}, "relay": {"machine": "this one"}}


def take(
    gateway: float, control: float = 1.0, *, rounds: int = 12, spread: float = 0.01, seed: int = 1
) -> RoundSeries:
    """Rounds in which the machine drifts by itself and each arm has its own factor."""
    chance = random.Random(seed)
    by_arm: dict[str, list[float]] = {"direct": [], "control": [], "gateway": []}
    for _ in range(rounds):
        drift = 100 * chance.uniform(0.8, 1.6)
        for arm, factor in (("direct", 1.0), ("control", control), ("gateway", gateway)):
            by_arm[arm].append(drift * factor * chance.gauss(1, spread))
    return RoundSeries("batch", "time", "ms", by_arm)


def row(value: float, half: float = 0.01, *, control: float = 1.0, rounds: int = 12) -> BenchRow:
    span = Interval(value, value - half, value + half, rounds)
    moved = Interval(control, control - half, control + half, rounds)
    return BenchRow("engine", "batch: time", "× direct", span, 1.0, moved)


# --- medians and intervals


@pytest.mark.parametrize("rounds", [6, 9, 20, 61])
def test_interval_holds_the_true_median_in_95_of_100_cases(rounds: int) -> None:
    chance = random.Random(rounds)
    tries = 3000
    spans = [
        find_interval([chance.lognormvariate(0, 1) for _ in range(rounds)]) for _ in range(tries)
    ]

    held = sum(span.low <= 1.0 <= span.high for span in spans) / tries

    assert 0.945 <= held <= 0.985


def test_interval_of_many_rounds_leaves_the_odd_ones_out() -> None:
    span = find_interval([100.0] * 50 + [900.0] * 5)

    assert (span.low, span.value, span.high) == (100, 100, 100)


def test_interval_of_few_rounds_is_all_that_was_seen_and_not_sure() -> None:
    span = find_interval([3.0, 1.0, 2.0])

    assert (span.low, span.value, span.high) == (1, 2, 3)
    assert not span.is_sure
    assert find_interval([1.0] * 6).is_sure


# --- against direct, with the control


def test_difference_beyond_control_and_chance_is_real() -> None:
    assert build_ratio("engine", take(1.10)).difference == "really more"
    assert build_ratio("engine", take(0.90)).difference == "really less"


def test_difference_within_chance_is_not_real() -> None:
    verdicts = [build_ratio("engine", take(1.0, seed=seed)).difference for seed in range(40)]

    assert verdicts.count("no real difference") >= 36


def test_difference_is_refused_when_the_control_moves_as_much() -> None:
    found = build_ratio("engine", take(1.10, control=1.12))

    assert found.difference == "cannot be told: the control moved as much"
    assert not found.is_quiet


def test_difference_beyond_a_control_that_moves_less_is_real_but_not_quiet() -> None:
    found = build_ratio("engine", take(1.40, control=1.08))

    assert found.difference == "really more"
    assert not found.is_quiet


def test_difference_of_too_few_rounds_cannot_be_told() -> None:
    found = build_ratio("engine", take(1.5, rounds=5))

    assert found.difference == "cannot be told: 5 rounds, 6 are needed"


def test_drift_of_the_machine_falls_out_of_the_ratios() -> None:
    """The times themselves go from 80 to 160 here."""
    found = build_ratio("engine", take(1.03, spread=0.002))

    assert found.span.value == pytest.approx(1.03, abs=0.005)
    assert found.difference == "really more"


def test_added_time_is_judged_against_the_controls_added_time() -> None:
    by_arm = {"direct": [10.0] * 8, "control": [10.0] * 8, "gateway": [12.0] * 8}
    moved = {**by_arm, "control": [13.0] * 8}

    assert (
        build_added("engine", RoundSeries("one", "time", "ms", by_arm), "added").difference
        == "really more"
    )
    added = build_added("engine", RoundSeries("one", "time", "ms", moved), "added")
    assert added.difference == "cannot be told: the control moved as much"


# --- bounds


def test_bound_is_broken_only_beyond_chance_and_control() -> None:
    limit = Bound("at most", 1.02)

    assert replace(row(1.01), bound=limit).bound_verdict == "within"
    assert replace(row(1.08), bound=limit).bound_verdict == "OVER"
    assert replace(row(1.08, half=0.07), bound=limit).bound_verdict == "unclear"
    assert replace(row(1.08, control=0.91), bound=limit).bound_verdict == "unclear"
    assert replace(row(1.08, rounds=5), bound=limit).bound_verdict == "unclear"


def test_bound_of_a_figure_where_more_is_better_points_the_other_way() -> None:
    limit = Bound("at least", 0.75)

    assert replace(row(0.8), bound=limit).bound_verdict == "within"
    assert replace(row(0.7), bound=limit).bound_verdict == "OVER"


def test_bound_of_what_is_measured_once_needs_no_rounds() -> None:
    once = BenchRow(
        "relay", "memory", "MB", Interval(200, 200, 200, 1), bound=Bound("at most", 150)
    )

    assert once.bound_verdict == "OVER"
    assert once.difference == ""


# --- against a stored run


def change(before: BenchRow, after: BenchRow, **setting: str) -> FigureChange:
    other = {part: {**values, **setting} for part, values in SETTING.items()}
    (found,) = compare_runs(StoredRun((before,), SETTING), StoredRun((after,), other))
    return found


def test_change_beyond_both_runs_chance_is_real() -> None:
    assert change(row(1.02), row(1.10)).verdict == "really worse"
    assert change(row(1.10), row(1.02)).verdict == "really better"
    faster = [replace(row(value), is_more_better=True) for value in (0.8, 0.9)]
    assert change(*faster).verdict == "really better"


def test_change_within_both_runs_chance_is_not_real() -> None:
    assert change(row(1.02, half=0.05), row(1.08, half=0.05)).verdict == "no real difference"


@pytest.mark.parametrize("control", [0.9, 1.09])
def test_change_is_refused_when_either_control_moved_as_much(control: float) -> None:
    wanted = "cannot be told: the control moved as much"

    assert change(row(1.02, control=control), row(1.10)).verdict == wanted
    assert change(row(1.02), row(1.10, control=control)).verdict == wanted


def test_change_of_too_few_rounds_cannot_be_told() -> None:
    assert change(row(1.0), row(2.0, rounds=3)).verdict == (
        "cannot be told: 3 rounds, 6 are needed"
    )


def test_change_between_unlike_runs_cannot_be_told() -> None:
    assert change(row(1.0), row(2.0), machine="another one").verdict == (
        "cannot be told: another machine"
    )
    relay = replace(row(1.0), part="relay"), replace(row(2.0), part="relay")
    before, after = (StoredRun((one,), SETTING) for one in relay)
    after = replace(after, setting={**SETTING, "engine": {"machine": "this one", "workload": "y"}})
    assert [one.verdict for one in compare_runs(before, after)] == ["really worse"]


def test_change_of_cpu_is_refused_when_the_direct_doors_moved_as_much() -> None:
    def cpu(value: float, reference: float) -> BenchRow:
        span = Interval(value, value * 0.99, value * 1.01, 12)
        return BenchRow("engine", "CPU", "ms", span, reference=reference)

    assert change(cpu(1.0, 50), cpu(1.2, 50)).verdict == "really worse"
    assert change(cpu(1.0, 50), cpu(1.2, 62)).verdict == "cannot be told: the control moved as much"


def test_change_of_what_is_measured_once_must_be_large() -> None:
    def memory(value: float) -> BenchRow:
        return BenchRow("relay", "memory", "MB", Interval(value, value, value, 1))

    assert change(memory(80), memory(82)).verdict == "no real difference"
    assert change(memory(80), memory(120)).verdict == "really worse"


def test_stored_run_comes_back_as_it_was(tmp_path: Path) -> None:
    kept = [
        replace(row(1.02), bound=Bound("at most", 1.5)),
        BenchRow("relay", "x", "", find_interval([1])),
    ]
    path = tmp_path / "run.json"
    data = {"format": 1, "rows": [asdict(one) for one in kept], "setting": SETTING}
    path.write_text(json.dumps(data))

    stored = read_run(path)

    assert stored == StoredRun(tuple(kept), SETTING)
    lines = list(describe_changes(compare_runs(stored, stored)))
    assert [line.endswith("no real difference") for line in lines] == [True, True]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "No such file"),
        ("{", "Expecting"),
        ("[]", "no run of the benchmark"),
        ('{"format": 0}', "another version"),
        ('{"format": 1, "rows": [{"name": 1}], "setting": {}}', "no run of the benchmark"),
    ],
)
def test_stored_run_that_is_none_is_named(tmp_path: Path, content: Any, said: str) -> None:
    path = tmp_path / "run.json"
    if content is not None:
        path.write_text(content)

    with pytest.raises(BadFile, match=said) as caught:
        read_run(path)

    assert "run.json" in str(caught.value)


# --- whose answer it is

ANSWERS = {
    "q1": "The first answer speaks of warps and of nothing else.",
    "q2": "The second answer speaks of memory, which is shared.",
    "q3": "A third one is about grids.",
}


def book(*, by_heart: bool = True) -> AnswerBook:
    return build_book(ANSWERS if by_heart else {}, dict(ANSWERS))


@pytest.mark.parametrize("by_heart", [True, False])
def test_answers_to_other_questions_are_refused_and_named(by_heart: bool) -> None:
    mixed = [ANSWERS["q2"], ANSWERS["q1"], ANSWERS["q3"]]

    with pytest.raises(MixedUp) as caught:
        book(by_heart=by_heart).check("gateway", ["q1", "q2", "q3"], mixed, cut=False)

    assert str(caught.value) == (
        "gateway answered question 1 (q1) with the answer to question 2 (q2)"
    )


def test_answer_cut_by_its_limit_is_known_by_its_beginning() -> None:
    known = book()

    known.check("gateway", ["q1"], [ANSWERS["q1"][:15]], cut=True)

    assert (known.checked, known.differing) == (1, 0)
    with pytest.raises(MixedUp, match="answer to question 2"):
        known.check("gateway", ["q1"], [ANSWERS["q2"][:15]], cut=True)
    with pytest.raises(MixedUp, match="no known answer"):
        known.check("gateway", ["q1"], [ANSWERS["q1"][:15]], cut=False)


def test_answer_known_to_nobody_is_refused_by_heart_and_counted_else() -> None:
    other = ANSWERS["q1"][:30] + "something of its own"

    with pytest.raises(MixedUp, match="no known answer"):
        book().check("gateway", ["q1"], [other], cut=False)
    learned = book(by_heart=False)
    learned.check("gateway", ["q1"], [other], cut=False)
    assert (learned.checked, learned.differing) == (1, 1)


def test_answer_nearly_another_questions_is_refused() -> None:
    nearly = ANSWERS["q2"][:-3] + "."

    with pytest.raises(MixedUp, match="answer to question 2"):
        book(by_heart=False).check("gateway", ["q1"], [nearly], cut=False)


@pytest.mark.parametrize("answers", [[], ["", ""], [ANSWERS["q1"]]])
def test_answers_that_are_too_few_or_empty_are_refused(answers: list[str]) -> None:
    with pytest.raises(MixedUp):
        book(by_heart=False).check("gateway", ["q1", "q2"], answers, cut=False)


def test_model_whose_answers_tell_nothing_apart_is_refused() -> None:
    with pytest.raises(BenchFailed, match="nobody could see"):
        build_book({}, {f"q{number}": "always the same" for number in range(9)})
    with pytest.raises(BenchFailed, match="with nothing"):
        build_book({}, {"q1": "text", "q2": ""})


def test_model_that_knows_all_but_one_by_heart_is_learned_from() -> None:
    assert book().is_by_heart
    assert not build_book(ANSWERS, {**ANSWERS, "q3": "Another text."}).is_by_heart
