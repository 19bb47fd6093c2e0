"""The grade: what was asked, what came back, what it is worth; and its JSON."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from common.questions import QuestionSet
from lab.grade.judge import JudgeCall, JudgeRun
from lab.grade.scores import AnswerScore, score
from lab.intervals import mean
from lab.records.record import RunFacts
from lab.reports.output_files import write_json

State = Literal["answered", "empty", "refused", "missing"]
STATES: tuple[State, ...] = get_args(State)
FORMAT = 1


@dataclass(frozen=True)
class GradedAnswer:
    """One question over all runs."""

    question: str
    reference: str
    texts: tuple[str, ...]
    scores: tuple[AnswerScore, ...]
    tokens: tuple[int, ...] | None
    states: tuple[State, ...]
    refusal: str = ""


@dataclass(frozen=True)
class AnswerSpeed:
    """Texts over time."""

    tokens: int | None
    tokens_per_s: float | None
    characters: int
    characters_per_s: float


@dataclass(frozen=True)
class RunScores:
    """One run's figures. `unique` counts every different question once."""

    elapsed_s: float
    calls: tuple[JudgeCall, ...]
    asked: int
    answered: int
    empty: int
    refused: int
    missing: int
    rouge_course: float
    rouge_whitespace: float
    exact: float
    speed: AnswerSpeed
    unique_rouge_course: float
    unique_rouge_whitespace: float
    unique_speed: AnswerSpeed


@dataclass(frozen=True)
class GradeFacts(RunFacts):
    """Under which conditions."""

    server_url: str
    mode: str
    sending: str
    limit_s: float
    model: str
    engine: dict[str, Any]
    questions_file: str
    questions_digest: str
    questions: int
    unique_questions: int
    skipped: tuple[str, ...]
    tokens_by: str
    tokens_missing: str
    ready_s: float = 0.0
    ceiling: float = 0.0
    unscored: int = 0


def build_answers(
    asked: QuestionSet, runs: Sequence[JudgeRun], counts: Sequence[int] | None
) -> list[GradedAnswer]:
    """`counts` holds the tokens of the first run's answers, then of the second's."""
    answers = []
    for place, pair in enumerate(asked.pairs):
        texts = tuple(run.answers[place] for run in runs)
        refusals = (run.refusals[place] for run in runs if place in run.refusals)
        answer = GradedAnswer(
            question=pair.question,
            reference=pair.reference,
            texts=texts,
            scores=tuple(score(text, pair.reference) for text in texts),
            tokens=None if counts is None else tuple(counts[place :: len(asked.pairs)]),
            states=tuple(_read_state(run, place) for run in runs),
            refusal=next(refusals, ""),
        )
        answers.append(answer)
    return answers


def _read_state(run: JudgeRun, place: int) -> State:
    if place in run.refusals:
        return "refused"
    if run.answers[place].strip():
        return "answered"
    return "empty" if place in run.received else "missing"


def build_run(run: JudgeRun, number: int, answers: Sequence[GradedAnswer]) -> RunScores:
    first = list({one.question: one for one in reversed(answers)}.values())[::-1]
    counts = Counter(one.states[number] for one in answers)
    scores = [one.scores[number] for one in answers]
    unique = [one.scores[number] for one in first]
    return RunScores(
        elapsed_s=run.elapsed_s,
        calls=tuple(run.calls),
        asked=len(answers),
        **{state: counts[state] for state in STATES},
        rouge_course=mean([one.rouge_course for one in scores]),
        rouge_whitespace=mean([one.rouge_whitespace for one in scores]),
        exact=mean([float(one.is_exact) for one in scores]),
        speed=_measure(answers, number, run.elapsed_s),
        unique_rouge_course=mean([one.rouge_course for one in unique]),
        unique_rouge_whitespace=mean([one.rouge_whitespace for one in unique]),
        unique_speed=_measure(first, number, run.elapsed_s),
    )


def _measure(answers: Sequence[GradedAnswer], number: int, elapsed_s: float) -> AnswerSpeed:
    seconds = max(1e-9, elapsed_s)
    characters = sum(len(one.texts[number]) for one in answers)
    counts = [one.tokens[number] for one in answers if one.tokens is not None]
    tokens = sum(counts) if counts else None
    per_s = None if tokens is None else tokens / seconds
    return AnswerSpeed(tokens, per_s, characters, characters / seconds)


def find_ceiling(references: Sequence[str]) -> tuple[float, int]:
    """What the course reading gives the references themselves, and how many get nothing."""
    own = [score(reference, reference).rouge_course for reference in references]
    return mean(own), own.count(0.0)


@dataclass(frozen=True)
class GradeResult:
    """Everything that the summary, the report and a comparison need."""

    facts: GradeFacts
    runs: tuple[RunScores, ...]
    answers: tuple[GradedAnswer, ...]
    findings: tuple[Any, ...]

    @property
    def faults(self) -> int:
        return sum(finding.severity == "error" for finding in self.findings)

    @property
    def is_good(self) -> bool:
        return not self.faults

    def pack(self) -> dict[str, Any]:
        """The JSON details; an answer's names are those of the seed entry's evaluator."""
        return {
            "format": FORMAT,
            "is_good": self.is_good,
            "facts": asdict(self.facts),
            "findings": [asdict(finding) for finding in self.findings],
            "runs": [asdict(run) for run in self.runs],
            "answers": [_pack_answer(one) for one in self.answers],
        }

    def write(self, path: Path) -> None:
        write_json(path, self.pack())


def write_ungraded(finding: Any, path: Path) -> None:
    """The details of a server that never could be asked."""
    packed = {"format": FORMAT, "is_good": False, "facts": {}, "findings": [asdict(finding)]}
    write_json(path, {**packed, "runs": [], "answers": []})


def _pack_answer(one: GradedAnswer) -> dict[str, Any]:
    """The first run's answer; those of other runs only where they differ."""
    packed = {"question": one.question, "reference": one.reference, **_pack_text(one, 0)}
    if one.refusal:
        packed["refusal"] = one.refusal
    others = [
        {"run": number + 1, **_pack_text(one, number)}
        for number in range(1, len(one.texts))
        if (one.texts[number], one.states[number]) != (one.texts[0], one.states[0])
    ]
    return {**packed, "other_runs": others} if others else packed


def _pack_text(one: GradedAnswer, number: int) -> dict[str, Any]:
    text, worth = one.texts[number], one.scores[number]
    return {
        "prediction": text,
        "rougeL_f1": worth.rouge_course,
        "rougeL_f1_whitespace": worth.rouge_whitespace,
        "is_exact": worth.is_exact,
        "tokens": None if one.tokens is None else one.tokens[number],
        "characters": len(text),
        "state": one.states[number],
    }
