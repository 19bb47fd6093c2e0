"""What a user must know beside the figures: each fault by name, none of them averaged away."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from lab.grade.answer_order import check_order
from lab.grade.grade_result import GradedAnswer, GradeFacts, RunScores
from lab.grade.scores import score
from lab.intervals import mean
from lab.readiness import Problem

Severity = Literal["error", "note"]
_NOTES = ("list_of_one",)
_LEAST_SAME_SHARE = 0.05
_LEAST_SAME = 3
_LOOP = re.compile(r"(.{1,40}?)\1{3,}.{0,39}$", re.DOTALL)
_LEAST_LOOP = 24
_SHOWN_PLACES = 12


@dataclass(frozen=True)
class GradeFinding:
    """One fault (or remark), with the numbers of the questions it is about, counted from 1."""

    code: str
    severity: Severity
    text: str
    questions: tuple[int, ...] = ()


@dataclass(frozen=True)
class ScoreFloor:
    """The least score that is no fault, and why."""

    score: float
    reason: str


def find_all(
    facts: GradeFacts,
    answers: Sequence[GradedAnswer],
    runs: Sequence[RunScores],
    floor: ScoreFloor | None,
) -> list[GradeFinding]:
    found = [
        *_find_problems(runs),
        *_find_gaps(answers),
        *_find_disorder(answers, runs),
        *_find_sameness(answers),
        *_find_weakness(runs, floor),
        *_find_remarks(facts, answers, runs),
    ]
    return sorted(found, key=lambda finding: finding.severity)


def _find_problems(runs: Sequence[RunScores]) -> Iterator[GradeFinding]:
    """What went wrong with calls: one finding a kind, the first in full."""
    kinds: dict[str, list[str]] = {}
    for number, run in enumerate(runs, start=1):
        for problem in (problem for call in run.calls for problem in call.problems):
            kinds.setdefault(problem.code, []).append(_in_run(problem, number, run, len(runs)))
    for code, texts in kinds.items():
        more = f" (and {len(texts) - 1} more calls)" if len(texts) > 1 else ""
        yield GradeFinding(code, "note" if code in _NOTES else "error", texts[0] + more)


def _in_run(problem: Problem, number: int, run: RunScores, total: int) -> str:
    text = problem.text
    if problem.code in ("too_slow", "server_died"):
        text += f"; {run.answered} of {run.asked} questions had been answered"
    return f"run {number}: {text}" if total > 1 else text


def _find_gaps(answers: Sequence[GradedAnswer]) -> Iterator[GradeFinding]:
    total = len(answers)
    gaps = {"empty": "empty_answers", "missing": "no_answer", "refused": "refused"}
    for state, code in gaps.items():
        places = [place for place, one in enumerate(answers) if state in one.states]
        if not places:
            continue
        said = {
            "empty": f"answers {'is' if len(places) == 1 else 'are'} empty",
            "missing": "got no answer",
            "refused": "got a refusal",
        }
        text = f"{len(places)} of {total} {said[state]}: {_list_places(places)}"
        if state == "refused":
            text += f"; the first: {answers[places[0]].refusal}"
        yield _about(code, text, places)


def _find_disorder(
    answers: Sequence[GradedAnswer], runs: Sequence[RunScores]
) -> Iterator[GradeFinding]:
    """What runs have in common is one finding."""
    references = [one.reference for one in answers]
    texts_of = [tuple(one.texts[number] for one in answers) for number in range(len(runs))]
    orders = {texts: check_order(texts, references) for texts in dict.fromkeys(texts_of)}
    shuffled: dict[tuple[tuple[int, int], ...], list[int]] = {}
    unrelated: list[int] = []
    for number, texts in enumerate(texts_of):
        if moved := orders[texts].displaced:
            shuffled.setdefault(tuple(moved.items()), []).append(number)
        elif orders[texts].is_unrelated:
            unrelated.append(number)
    for moves, numbers in shuffled.items():
        label = _name_runs(numbers, len(runs))
        yield _describe_shuffle(dict(moves), texts_of[numbers[0]], references, label)
    if unrelated:
        text = (
            f"{_name_runs(unrelated, len(runs))}the answers resemble their own references no more "
            "than other questions'; the model is broken, or answers something else than it was "
            "asked"
        )
        yield GradeFinding("unrelated_answers", "error", text)


def _name_runs(numbers: Sequence[int], total: int) -> str:
    if len(numbers) == total:
        return ""
    said = " and ".join(str(number + 1) for number in numbers)
    return f"run {said}: " if len(numbers) == 1 else f"runs {said}: "


def _describe_shuffle(
    moved: Mapping[int, int], texts: Sequence[str], references: Sequence[str], label: str
) -> GradeFinding:
    here = mean([score(texts[place], references[place]).rouge_whitespace for place in moved])
    there = mean([score(texts[p], references[t]).rouge_whitespace for p, t in moved.items()])
    examples = ", ".join(f"{p + 1} answers {t + 1}" for p, t in list(moved.items())[:4])
    text = (
        f"{label}{len(moved)} answers are at the wrong place: they match other questions' "
        f"references better than their own ({there:.2f} against {here:.2f}); {examples}"
    )
    return _about("shuffled_answers", text, sorted(moved))


def _find_sameness(answers: Sequence[GradedAnswer]) -> Iterator[GradeFinding]:
    """One answer for many questions, and answers that go round in circles."""
    owners: dict[str, set[str]] = {}
    for one in answers:
        if one.texts[0].strip():
            owners.setdefault(one.texts[0].strip(), set()).add(one.reference)
    different = len({one.reference for one in answers})
    text, same = max(owners.items(), key=lambda item: len(item[1]), default=("", set[str]()))
    if len(same) >= max(_LEAST_SAME, _LEAST_SAME_SHARE * different):
        shown = text[:40]
        said = f"{len(same)} of {different} different questions got one and the same answer"
        yield GradeFinding("same_answer", "error", f"{said}: {shown}…")
    loops = [place for place, one in enumerate(answers) if is_looping(one.texts[0])]
    if loops:
        text = f"answers that end going round in circles: {_list_places(loops)}"
        yield _about("looping_answers", text, loops, "note")


def is_looping(text: str) -> bool:
    found = _LOOP.search(text[-400:])
    return found is not None and len(found[0]) >= _LEAST_LOOP and bool(found[1].strip())


def _find_weakness(runs: Sequence[RunScores], floor: ScoreFloor | None) -> Iterator[GradeFinding]:
    worst = min(run.rouge_course for run in runs)
    if floor and worst < floor.score:
        text = f"ROUGE-L in the course reading is {worst:.4f}, below {floor.score:.4f}"
        yield GradeFinding("below_floor", "error", f"{text} ({floor.reason})")


def _find_remarks(
    facts: GradeFacts, answers: Sequence[GradedAnswer], runs: Sequence[RunScores]
) -> Iterator[GradeFinding]:
    if facts.skipped:
        text = f"left out of the question file: {len(facts.skipped)}; {facts.skipped[0]}"
        yield GradeFinding("skipped_questions", "note", text)
    if facts.unique_questions < facts.questions:
        text = (
            f"only {facts.unique_questions} of the {facts.questions} questions are different; a "
            "server may answer the others from memory, so the figures of the different ones "
            "stand beside"
        )
        yield GradeFinding("repeated_questions", "note", text)
    if facts.unscored:
        text = (
            f"references without any Latin letter or digit: {facts.unscored}; in the course "
            f"reading they score 0 whatever is answered, so it ends at {facts.ceiling:.4f}"
        )
        yield GradeFinding("unscored_references", "note", text)
    unstable = [place for place, one in enumerate(answers) if len(set(one.texts)) > 1]
    if unstable:
        where = f"{len(unstable)}, {_list_places(unstable)}"
        text = f"answers that differed between the {len(runs)} runs: {where}"
        yield _about("unstable_answers", text, unstable, "note")
    if not facts.tokens_by:
        text = f"tokens were not counted: {facts.tokens_missing}; name a folder with --model_path"
        yield GradeFinding("no_tokenizer", "note", text)


def _about(
    code: str, text: str, places: Sequence[int], severity: Severity = "error"
) -> GradeFinding:
    return GradeFinding(code, severity, text, tuple(place + 1 for place in places))


def _list_places(places: Sequence[int]) -> str:
    shown = ", ".join(str(place + 1) for place in places[:_SHOWN_PLACES])
    more = len(places) - _SHOWN_PLACES
    word = "question" if len(places) == 1 else "questions"
    return f"{word} {shown}" + (f" and {more} more" if more > 0 else "")
