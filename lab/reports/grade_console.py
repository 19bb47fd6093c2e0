"""The grade on a terminal, and as the record of a run."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator, Sequence

from lab.grade.grade_result import Grade, RunResult
from lab.grade.rouge import quantile
from lab.records.record import Figure
from lab.reports.output_files import tame

_RED, _BOLD, _RESET = "\x1b[31m", "\x1b[1m", "\x1b[0m"


def describe_grade(grade: Grade, *, coloured: bool) -> Iterator[str]:
    rows = list(_rows(grade))
    width = max(len(name) for name, _ in rows)
    for name, text in rows:
        yield f"{name:{width}}  {tame(text)}"
    yield ""
    for finding in grade.findings:
        is_fault = finding.severity == "error"
        word = "FAULT" if is_fault else "note "
        if coloured and is_fault:
            word = f"{_RED}{word}{_RESET}"
        yield f"{word} {finding.code}: {tame(finding.text)}"
    faults = sum(finding.severity == "error" for finding in grade.findings)
    verdict = f"{faults} {'fault' if faults == 1 else 'faults'}" if faults else "no faults"
    yield f"{_BOLD}{verdict}{_RESET}" if coloured else verdict


def _rows(grade: Grade) -> Iterator[tuple[str, str]]:
    facts, runs = grade.facts, grade.runs
    repeated = facts.unique_questions < facts.questions
    yield "server", " ".join(filter(None, [facts.server_url, facts.model, f"mode {facts.mode}"]))
    different = f", {facts.unique_questions} different" if repeated else ""
    yield "samples", f"{facts.questions}{different}, {facts.sending}"
    ceiling = f"of at most {facts.ceiling:.4f}"
    yield "avg ROUGE-L (F1)", f"{_span(runs, lambda r: r.rouge_course, '.6f')}  course, {ceiling}"
    yield "  all tokens", f"{_span(runs, lambda r: r.rouge_whitespace, '.6f')}"
    if repeated:
        yield "  each question once", _span(runs, lambda r: r.unique_rouge_course, ".6f")
    yield "exact match", _span(runs, lambda r: r.exact, ".1%")
    yield (
        "elapsed (s)",
        f"{_span(runs, lambda r: r.elapsed_s, '.3f')}  of at most {facts.limit_s:g}",
    )
    if facts.tokens_by:
        yield "total tokens", _span(runs, lambda r: r.speed.tokens or 0, ",d")
        speed = _span(runs, lambda r: r.speed.tokens_per_s or 0.0, ",.1f")
        yield "tokens/s", f"{speed}  by {facts.tokens_by}"
        if repeated:
            once = _span(runs, lambda r: r.unique_speed.tokens_per_s or 0.0, ",.1f")
            yield "  each question once", once
    yield "characters/s", _span(runs, lambda r: r.speed.characters_per_s, ",.1f")
    if repeated:
        yield "  each question once", _span(runs, lambda r: r.unique_speed.characters_per_s, ",.1f")
    yield "call latency (s)", _describe_times([c.seconds for run in runs for c in run.calls])
    yield "answer length", _describe_lengths([len(t) for one in grade.answers for t in one.texts])
    yield "reference length", _describe_lengths([len(one.reference) for one in grade.answers])
    yield "answered", _span(runs, lambda r: r.answered, "d")
    if any(run.answered < run.asked for run in runs):
        for name in ("empty", "refused", "missing"):
            yield f"  {name}", _span(runs, lambda r, key=name: getattr(r, key), "d")


def _span(runs: Sequence[RunResult], read: Callable[..., float], form: str) -> str:
    """The median over the runs and their range."""
    values = [read(run) for run in runs]
    if form.endswith("d"):
        middle = f"{statistics.median_low(values):{form}}"
    else:
        middle = f"{statistics.median(values):{form}}"
    if min(values) == max(values):
        return middle
    return f"{middle} ({min(values):{form}} to {max(values):{form}})"


def _describe_times(times: Sequence[float]) -> str:
    if len(times) == 1:
        return f"{times[0]:.3f}"
    p50, p90, p99 = (quantile(times, share) for share in (0.5, 0.9, 0.99))
    return (
        f"p50 {p50:.3f}, p90 {p90:.3f}, p99 {p99:.3f}, longest {max(times):.3f}, {len(times)} calls"
    )


def _describe_lengths(lengths: Sequence[int]) -> str:
    return f"{statistics.median(lengths):.0f} characters ({min(lengths)} to {max(lengths)})"


def build_figures(grade: Grade) -> list[Figure]:
    """For the record of a run: medians over the runs, with their range; no two of one name."""
    facts, runs = grade.facts, grade.runs

    def figure(name: str, read: Callable[[RunResult], float], unit: str, note: str = "") -> Figure:
        values = [read(run) for run in runs]
        low, high = (min(values), max(values)) if len(values) > 1 else (None, None)
        return Figure(name, statistics.median(values), unit, low, high, note)

    ceiling = f"of at most {facts.ceiling:.4f}: the scorer counts Latin letters and digits alone"
    figures = [
        figure("ROUGE-L, course reading", lambda r: r.rouge_course, "", ceiling),
        figure("ROUGE-L, all tokens", lambda r: r.rouge_whitespace, ""),
        figure("exactly the reference", lambda r: r.exact * 100, "%"),
        figure("time for all answers", lambda r: r.elapsed_s, "s", facts.sending),
    ]
    if facts.tokens_by:
        figures.append(figure("tokens/s", lambda r: r.speed.tokens_per_s or 0.0, "/s"))
    figures.append(figure("characters/s", lambda r: r.speed.characters_per_s, "/s"))
    if facts.unique_questions < facts.questions:
        note = f"{facts.unique_questions} different questions"
        name = "characters/s, each question once"
        figures.append(figure(name, lambda r: r.unique_speed.characters_per_s, "/s", note))
    return figures
