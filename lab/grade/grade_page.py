"""A grade as an HTML page; screen or phone, light or dark."""

from __future__ import annotations

import itertools
import re
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from markupsafe import Markup

from lab.grade.grade_console import GRADE_FIGURES, describe_times
from lab.grade.grade_result import GradedAnswer, GradeResult
from lab.grade.scores import mark_common
from lab.intervals import quantile
from lab.reports import plots
from lab.reports.output_files import write_file
from lab.reports.pages import render_page

# What the course published: an RTX 5090, the course's own 358 questions. Whether its "tokens" are
# tokens or characters is not certain; three entries believe the latter.
PUBLISHED = (
    ("first place", 54_174, 0.3721),
    ("seed entry", 41_923, 0.3663),
    ("seed entry, 4B AWQ", 16_000, None),
)
_WORST = 12
_MOST_LISTED = 1000
_CHINESE = re.compile(r"[\u3400-\u9fff]")
_HIDDEN_FACTS = ("engine", "skipped", "tokens_missing", "unscored", "ceiling")


def write_report(grade: GradeResult, path: Path) -> None:
    write_file(path, render(grade))


def render(grade: GradeResult) -> str:
    facts = grade.facts
    name = facts.model or facts.server_url
    return render_page(
        "grade.html",
        find_language=find_language,
        mark_runs=mark_runs,
        title=f"Grade of {name}",
        name=name,
        grade=grade,
        has_findings=bool(grade.findings),
        tiles=list(_tiles(grade)),
        draw_scores=_draw_scores,
        draw_lengths=_draw_lengths,
        draw_calls=_draw_calls,
        draw_speeds=_draw_speeds,
        describe_times=describe_times,
        median=statistics.median,
        worst=list(_find_worst(grade)),
        most_listed=_MOST_LISTED,
        facts={**vars(facts), **{f"engine: {key}": value for key, value in facts.engine.items()}},
        hidden=_HIDDEN_FACTS,
    )


def _tiles(grade: GradeResult) -> Iterator[dict[str, str]]:
    """The median over the runs, and their range."""
    notes = {
        "ROUGE-L, course reading": f"of at most {grade.facts.ceiling:.4f}",
        "exactly the reference": f"of {grade.facts.questions} answers",
        "time for all answers": f"at most {grade.facts.limit_s:g} s are allowed",
    }
    units = {"time for all answers": " s"}
    for figure in GRADE_FIGURES:
        form = figure.form.replace(".6f", ".4f").replace(",.1f", ",.0f")
        values = figure.values(grade)
        parts = [notes.get(figure.name) or figure.note(grade.facts)]
        if len({f"{value:{form}}" for value in values}) > 1:
            low, high = min(values), max(values)
            parts.insert(0, f"median of {len(values)} runs from {low:{form}} to {high:{form}}")
        if values:
            middle = f"{statistics.median(values):{form}}{units.get(figure.name, '')}"
            yield {"name": figure.name, "figure": middle, "note": "; ".join(filter(None, parts))}


def _draw_scores(answers: Sequence[GradedAnswer]) -> Markup:
    scores = [
        plots.PlotSeries("course reading", [one.scores[0].rouge_course for one in answers], "a"),
        plots.PlotSeries("all tokens", [one.scores[0].rouge_whitespace for one in answers], "b"),
    ]
    return plots.draw_histogram(scores, x_label="ROUGE-L", x_max=1.0, bins=20)


def _draw_lengths(answers: Sequence[GradedAnswer]) -> Markup:
    ours = [float(len(one.texts[0])) for one in answers]
    theirs = [float(len(one.reference)) for one in answers]
    # A few very long answers must not press all others into one bar; the last bin holds them.
    most = max(quantile(ours, 0.98), quantile(theirs, 0.98), 20.0)
    step = max(1, round(most / 20 / 5 + 0.5) * 5)
    bins = int(most // step) + 1
    series = [plots.PlotSeries("answers", ours, "a"), plots.PlotSeries("references", theirs, "b")]
    return plots.draw_histogram(series, x_label="characters", x_max=float(step * bins), bins=bins)


def _draw_calls(grade: GradeResult) -> Markup:
    bars = [
        plots.CallBar(
            group=number,
            start=call.started_s,
            end=call.started_s + call.seconds,
            style="bad" if call.answered < call.asked else "a",
            title=f"run {number + 1}, questions {call.first + 1} to {call.first + call.asked}: "
            f"{call.answered} answered in {call.seconds:.3f} s",
        )
        for number, run in enumerate(grade.runs)
        for call in run.calls
    ]
    limit = grade.facts.limit_s
    return plots.draw_call_bars(bars, groups=len(grade.runs), x_label="seconds", limit=limit)


def _draw_speeds(grade: GradeResult) -> Markup:
    bars = [
        plots.NamedBar(name, speed, "dim", f"ROUGE-L {score}" if score else "")
        for name, speed, score in PUBLISHED
    ]
    score = f"ROUGE-L {statistics.median(run.rouge_course for run in grade.runs):.4f}"
    tokens = [run.speed.tokens_per_s for run in grade.runs if run.speed.tokens_per_s is not None]
    if tokens:
        bars.append(plots.NamedBar("this run, tokens", statistics.median(tokens), "a", score))
    characters = statistics.median(run.speed.characters_per_s for run in grade.runs)
    bars.append(plots.NamedBar("this run, characters", characters, "b", score))
    return plots.draw_bars(sorted(bars, key=lambda bar: -bar.value), unit="/s", label="speed")


def _find_worst(grade: GradeResult) -> Iterator[tuple[int, GradedAnswer, int]]:
    """Every different question once, the least alike first, each with its worst run."""
    first = {one.question: (n, one) for n, one in reversed([*enumerate(grade.answers, start=1)])}
    ranked = []
    for number, one in first.values():
        scores = [score.rouge_whitespace for score in one.scores]
        if not all(score.is_exact for score in one.scores):
            ranked.append((min(scores), number, one, scores.index(min(scores))))
    for _, number, one, run in sorted(ranked, key=lambda item: item[:2])[:_WORST]:
        yield number, one, run


def mark_runs(text: str, other: str) -> Iterator[tuple[str, bool]]:
    """Pieces of a text and whether the other has them; neighbours together, to stay readable."""
    for is_common, row in itertools.groupby(mark_common(text, other), key=lambda piece: piece[1]):
        yield "".join(piece for piece, _ in row), is_common


def find_language(text: str) -> str:
    """Chinese glyphs and not Japanese ones, where a font has both."""
    return "zh-Hans" if _CHINESE.search(text) else "en"
