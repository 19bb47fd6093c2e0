"""The figures of a grade: on a terminal, and as the record of a run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from lab.grade.grade_result import GradeFacts, GradeResult, RunScores
from lab.intervals import quantile
from lab.records.record import RecordFigure
from lab.reports.console import BOLD, RED, count, paint, tame


@dataclass(frozen=True)
class GradeFigure:
    """One figure of every run: its name in reports and records, its label on a terminal.

    `form` formats it; a share is a percentage in a record. `once` counts each question once and is
    left out where none is repeated.
    """

    name: str
    label: str
    form: str
    unit: str
    read: Callable[[RunScores], float | None]
    note: Callable[[GradeFacts], str] = lambda facts: ""
    once: bool = False

    def values(self, grade: GradeResult) -> list[float]:
        """Of all runs; none if this grade does not have it."""
        if self.once and grade.facts.unique_questions == grade.facts.questions:
            return []
        return [value for run in grade.runs if (value := self.read(run)) is not None]

    def build(self, grade: GradeResult) -> RecordFigure | None:
        """Medians over the runs, with their range."""
        factor = 100 if self.unit == "%" else 1
        values = [value * factor for value in self.values(grade)]
        if not values:
            return None
        low, high = (min(values), max(values)) if len(values) > 1 else (None, None)
        middle = statistics.median(values)
        return RecordFigure(self.name, middle, self.unit, low, high, self.note(grade.facts))


def _ceiling(facts: GradeFacts) -> str:
    return f"of at most {facts.ceiling:.4f}: the scorer counts Latin letters and digits alone"


def _different(facts: GradeFacts) -> str:
    return f"{facts.unique_questions} different questions"


ONCE = "each question once"
GRADE_FIGURES = (
    GradeFigure("ROUGE-L, course reading", "avg ROUGE-L (F1)", ".6f", "",
                lambda run: run.rouge_course, _ceiling),
    GradeFigure("ROUGE-L, all tokens", "  all tokens", ".6f", "", lambda run: run.rouge_whitespace),
    GradeFigure(f"ROUGE-L, course reading, {ONCE}", f"  {ONCE}", ".6f", "",
                lambda run: run.unique_rouge_course, _different, once=True),
    GradeFigure("exactly the reference", "exact match", ".1%", "%", lambda run: run.exact),
    GradeFigure("time for all answers", "elapsed (s)", ".3f", "s",
                lambda run: run.elapsed_s, lambda facts: facts.sending),
    GradeFigure("tokens/s", "tokens/s", ",.1f", "/s",
                lambda run: run.speed.tokens_per_s, lambda facts: f"by {facts.tokens_by}"),
    GradeFigure(f"tokens/s, {ONCE}", f"  {ONCE}", ",.1f", "/s",
                lambda run: run.unique_speed.tokens_per_s, _different, once=True),
    GradeFigure("characters/s", "characters/s", ",.1f", "/s",
                lambda run: run.speed.characters_per_s),
    GradeFigure(f"characters/s, {ONCE}", f"  {ONCE}", ",.1f", "/s",
                lambda run: run.unique_speed.characters_per_s, _different, once=True),
)  # fmt: skip


def build_figures(grade: GradeResult) -> list[RecordFigure]:
    """For the record of a run; no two of one name."""
    return [built for figure in GRADE_FIGURES if (built := figure.build(grade))]


def describe_grade(grade: GradeResult, *, coloured: bool) -> Iterator[str]:
    rows = list(_rows(grade))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        yield f"{name:{width}}  {tame(text)}"
    yield ""
    for finding in grade.findings:
        is_fault = finding.severity == "error"
        word = paint("FAULT", RED, coloured=coloured) if is_fault else "note "
        yield f"{word} {finding.code}: {tame(finding.text)}"
    yield paint(
        count(grade.faults, "fault") if grade.faults else "no faults", BOLD, coloured=coloured
    )


def _rows(grade: GradeResult) -> Iterator[tuple[str, str]]:
    facts, runs = grade.facts, grade.runs
    yield "server", " ".join(filter(None, [facts.server_url, facts.model, f"mode {facts.mode}"]))
    is_repeated = facts.unique_questions < facts.questions
    different = f", {facts.unique_questions} different" if is_repeated else ""
    yield "samples", f"{facts.questions}{different}, {facts.sending}"
    notes = {
        "avg ROUGE-L (F1)": f"  course, of at most {facts.ceiling:.4f}",
        "elapsed (s)": f"  of at most {facts.limit_s:g}",
        "tokens/s": f"  by {facts.tokens_by}",
    }
    for figure in GRADE_FIGURES:
        if values := figure.values(grade):
            yield figure.label, describe_range(values, figure.form) + notes.get(figure.label, "")
    if facts.tokens_by:
        yield "total tokens", describe_range([run.speed.tokens or 0 for run in runs], ",d")
    yield "call latency (s)", describe_times([c.seconds for run in runs for c in run.calls])
    yield "answer length", _describe_lengths([len(t) for one in grade.answers for t in one.texts])
    yield "reference length", _describe_lengths([len(one.reference) for one in grade.answers])
    yield "answered", describe_range([run.answered for run in runs], "d")
    if any(run.answered < run.asked for run in runs):
        for name in ("empty", "refused", "missing"):
            yield f"  {name}", describe_range([getattr(run, name) for run in runs], "d")


def describe_range(values: Sequence[float], form: str) -> str:
    """The median over the runs and their range."""
    median = statistics.median_low if form.endswith("d") else statistics.median
    middle = f"{median(values):{form}}"
    if min(values) == max(values):
        return middle
    return f"{middle} ({min(values):{form}} to {max(values):{form}})"


def describe_times(times: Sequence[float]) -> str:
    if len(times) == 1:
        return f"{times[0]:.3f}"
    shown = ", ".join(f"p{n} {quantile(times, n / 100):.3f}" for n in (50, 90, 99))
    return f"{shown}, longest {max(times):.3f}, {len(times)} calls"


def _describe_lengths(lengths: Sequence[int]) -> str:
    return f"{statistics.median(lengths):.0f} characters ({min(lengths)} to {max(lengths)})"
