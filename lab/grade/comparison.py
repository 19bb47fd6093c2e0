"""Two grades side by side: is a difference real, or could chance have made it?

Quality: the same questions in both, so the differences are paired, and resampling the questions
says how far their mean can be believed. Speed: the runs of each, by Welch's interval on the
logarithms, which needs two runs each to say anything and says little below four.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.json_text import parse_json
from lab.failures import BadFile
from lab.intervals import bootstrap, compare_speeds, mean
from lab.records.figure_change import FigureChange, describe_changes

_FEWEST_QUESTIONS = 8


@dataclass(frozen=True)
class GradeExtract:
    """What a comparison needs of one grade."""

    path: str
    course: dict[str, float]
    whitespace: dict[str, float] | None
    speeds: dict[str, tuple[float, ...]]
    workload: str
    machine: str
    is_whole: bool = True
    errors: tuple[str, ...] = ()
    references: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class GradeComparison:
    """All that two grades say about each other."""

    changes: tuple[FigureChange, ...]
    questions: int
    better: int
    worse: int
    notes: tuple[str, ...]

    @property
    def is_worse(self) -> bool:
        return any(one.is_worse for one in self.changes)


def read_grade(path: Path) -> GradeExtract:
    """Of a grade's JSON, or of a list as the seed entry's evaluator writes it (quality alone)."""
    try:
        data = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadFile(f"{path}: {error.strerror}") from None
    except ValueError as error:
        raise BadFile(f"{path}: no JSON: {error}") from None
    try:
        if isinstance(data, list):
            course, references = _collect(data, "rougeL_f1"), _read_references(data)
            return GradeExtract(str(path), course, None, {}, "", "", references=references)
        if not data["runs"]:
            found = data["findings"][0]
            raise BadFile(f"{path}: nothing was graded: {found['code']}: {found['text']}")
        return extract_grade(str(path), data)
    except (LookupError, TypeError, AttributeError, ArithmeticError) as error:
        what = f"a grade's details, as --details_out writes them ({type(error).__name__}: {error})"
        raise BadFile(f"{path}: this is not {what}") from None


def extract_grade(name: str, data: dict[str, Any]) -> GradeExtract:
    """Of a grade's details, wherever they are."""
    facts, runs = data["facts"], data["runs"]
    measured = {
        unit: [run["speed"][f"{unit}_per_s"] for run in runs] for unit in ("tokens", "characters")
    }
    return GradeExtract(
        name,
        _collect(data["answers"], "rougeL_f1", len(runs)),
        _collect(data["answers"], "rougeL_f1_whitespace", len(runs)),
        # Of the tokens nothing is known where nobody could count them.
        {unit: tuple(map(_number, row)) for unit, row in measured.items() if None not in row},
        f"{facts['questions']} questions ({facts['questions_digest']}) {facts['sending']}",
        facts["machine"],
        all(run["answered"] == run["asked"] for run in runs),
        tuple(one["code"] for one in data["findings"] if one["severity"] == "error"),
        _read_references(data["answers"]),
    )


def _number(value: object) -> float:
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise TypeError(f"{value!r} is no figure")
    return float(value)


def _read_references(rows: list[dict[str, Any]]) -> dict[str, str]:
    return {row["question"]: row["reference"] for row in rows if "reference" in row}


def _collect(rows: list[dict[str, Any]], key: str, runs: int = 1) -> dict[str, float]:
    """The mean by question: over the runs, and over its copies."""
    found: dict[str, list[float]] = {}
    for row in rows:
        others = [_number(other[key]) for other in row.get("other_runs", ())]
        value = (_number(row[key]) * (runs - len(others)) + sum(others)) / runs
        found.setdefault(row["question"], []).append(value)
    return {question: mean(values) for question, values in found.items()}


def compare(before: GradeExtract, after: GradeExtract) -> GradeComparison:
    shared = [question for question in before.course if question in after.course]
    if not shared:
        raise BadFile(f"{before.path} and {after.path} share no question")
    unclear = _find_unlike(before, after, shared)
    readings = [("ROUGE-L, course", before.course, after.course)]
    if before.whitespace and after.whitespace:
        readings.append(("ROUGE-L, all tokens", before.whitespace, after.whitespace))
    found = []
    for name, old, new in readings:
        changes = [new[one] - old[one] for one in shared]
        before_mean, after_mean = (mean([one[q] for q in shared]) for one in (old, new))
        low, high = bootstrap(changes)
        figures = (before_mean, after_mean, mean(changes), low, high)
        found.append(FigureChange(name, *figures, unclear=unclear))
    better, worse = sum(one > 0 for one in changes), sum(one < 0 for one in changes)
    if units := [unit for unit in before.speeds if unit in after.speeds]:
        found.append(_compare_speed(before, after, units[0]))
    notes = []
    alone = len(before.course) + len(after.course) - 2 * len(shared)
    if alone:
        notes.append(f"{alone} questions are in one of the two alone and were left out")
    faulty = (one for one in (before, after) if one.errors)
    notes += [f"{one.path} has faults of its own: {', '.join(one.errors)}" for one in faulty]
    return GradeComparison(tuple(found), len(shared), better, worse, tuple(notes))


def _find_unlike(before: GradeExtract, after: GradeExtract, shared: Sequence[str]) -> str:
    """Why scores of the same questions cannot be held against each other."""
    known = [one for one in shared if one in before.references and one in after.references]
    other = sum(before.references[one] != after.references[one] for one in known)
    if other:
        return f"{other} questions have other references"
    return f"{len(shared)} questions are too few" if len(shared) < _FEWEST_QUESTIONS else ""


def _compare_speed(before: GradeExtract, after: GradeExtract, unit: str) -> FigureChange:
    old, new = before.speeds[unit], after.speeds[unit]
    figures = (statistics.median(old), statistics.median(new), *compare_speeds(old, new))
    unclear = _find_unclear(before, after, min(len(old), len(new)))
    return FigureChange("speed", *figures, f"{unit}/s", is_relative=True, unclear=unclear)


def _find_unclear(before: GradeExtract, after: GradeExtract, runs: int) -> str:
    if before.machine != after.machine:
        return f"another machine ({before.machine}; {after.machine})"
    if before.workload != after.workload:
        return f"another workload ({before.workload}; {after.workload})"
    for one in (before, after):
        if not one.is_whole:
            return f"{one.path} did not answer every question"
    if runs < 2:
        return "one run says nothing about chance; measure with --runs 5"
    return ""


def describe(comparison: GradeComparison, before: GradeExtract, after: GradeExtract) -> list[str]:
    lines = [f"from {before.path}", f"to   {after.path}", ""]
    lines += describe_changes(comparison.changes)
    same = comparison.questions - comparison.better - comparison.worse
    lines.append(
        f"by question: {comparison.better} better, {comparison.worse} worse, {same} the same"
    )
    return [*lines, *comparison.notes]
