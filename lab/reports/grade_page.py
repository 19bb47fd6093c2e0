"""The HTML report: one file that asks nobody for anything; screen or phone, light or dark."""

from __future__ import annotations

import re
import statistics
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from lab.grade.findings import Finding
from lab.grade.grade_result import Answer, Grade, RunResult
from lab.grade.leaderboard import PUBLISHED
from lab.grade.rouge import mark_common, quantile
from lab.reports.output_files import write_file
from lab.reports.plots import Bar, Series, Span, draw_bars, draw_histogram, draw_spans

_WORST = 12
_MOST_LISTED = 1000
_CHINESE = re.compile(r"[\u3400-\u9fff]")
_PAGE = Path(__file__).parent / "templates" / "grade.html"
_STYLE = _PAGE.with_name("report.css")


def write_report(grade: Grade, path: Path) -> None:
    write_file(path, render(grade))


def render(grade: Grade) -> str:
    """The page around it is report.html; its marks are replaced here."""
    parts = {
        "style": _STYLE.read_text(encoding="utf-8"),
        "title": escape(f"Grade of {grade.facts.model or grade.facts.server_url}"),
        "head": _head(grade),
        "findings": _findings(grade.findings),
        "tiles": "".join(_tiles(grade)),
        "plots": "".join(_plots(grade)),
        "runs": _runs(grade.runs),
        "worst": _worst(grade),
        "all": _all(grade),
        "facts": _facts(grade),
    }
    page = _PAGE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page)


def _head(grade: Grade) -> str:
    errors = sum(finding.severity == "error" for finding in grade.findings)
    word = "fault" if errors == 1 else "faults"
    badge = (
        f'<b class="bad">{errors} {word} found</b>' if errors else '<b class="good">no faults</b>'
    )
    facts = grade.facts
    where = [facts.date, f"{facts.questions} questions {facts.sending}", facts.machine]
    shown = " · ".join(escape(one) for one in where)
    return f"<h1>{escape(facts.model or facts.server_url)} {badge}</h1><p>{shown}</p>"


def _findings(findings: Sequence[Finding]) -> str:
    if not findings:
        return ""
    rows = []
    for finding in findings:
        links = "".join(f' <a href="#q{n}">{n}</a>' for n in finding.questions[:24])
        jump = f'<span class="jump">→{links}</span>' if links else ""
        rows.append(
            f'<li class="{finding.severity}"><code>{finding.code}</code> '
            f"<span>{escape(finding.text)}</span>{jump}</li>"
        )
    return f'<section><h2>What was found</h2><ul class="findings">{"".join(rows)}</ul></section>'


def _tiles(grade: Grade) -> Iterator[str]:
    facts, runs = grade.facts, grade.runs
    course = [run.rouge_course for run in runs]
    yield _tile("ROUGE-L, course reading", course, "{:.4f}", f"of at most {facts.ceiling:.4f}")
    yield _tile(
        "ROUGE-L, all tokens", [run.rouge_whitespace for run in runs], "{:.4f}", "Chinese counts"
    )
    if facts.unique_questions < facts.questions:
        unique = [run.unique_rouge_course for run in runs]
        note = f"{facts.unique_questions} different questions"
        yield _tile("course reading, each once", unique, "{:.4f}", note)
    exact = [run.exact for run in runs]
    yield _tile("exactly the reference", exact, "{:.1%}", f"of {facts.questions} answers")
    tokens = [run.speed.tokens_per_s for run in runs if run.speed.tokens_per_s is not None]
    if tokens:
        yield _tile("tokens/s", tokens, "{:,.0f}", f"by {facts.tokens_by}")
    else:
        yield _tile("tokens/s", [], "", "not counted")
    characters = [run.speed.characters_per_s for run in runs]
    yield _tile("characters/s", characters, "{:,.0f}", "of the answers")
    if facts.unique_questions < facts.questions:
        speeds = [run.unique_speed.characters_per_s for run in runs]
        yield _tile("characters/s, each once", speeds, "{:,.0f}", "every different question")
    elapsed = [run.elapsed_s for run in runs]
    yield _tile("seconds", elapsed, "{:,.2f}", f"of at most {facts.limit_s:g}")


def _tile(name: str, values: Sequence[float], form: str, note: str) -> str:
    """The median over the runs, and their range."""
    figure = form.format(statistics.median(values)) if values else "–"
    if len({form.format(value) for value in values}) > 1:
        span = f"{form.format(min(values))} to {form.format(max(values))} in {len(values)} runs"
        note = f"{span}; {note}"
    return (
        f'<div class="tile"><small>{name}</small><b>{figure}</b><small>{escape(note)}</small></div>'
    )


def _plots(grade: Grade) -> Iterator[str]:
    answers = grade.answers
    scores = [
        Series("course reading", [one.scores[0].rouge_course for one in answers], "a"),
        Series("all tokens", [one.scores[0].rouge_whitespace for one in answers], "b"),
    ]
    plot = draw_histogram(scores, x_label="ROUGE-L", x_max=1.0, bins=20)
    yield _figure("Scores", plot, "How many answers have which score.")
    yield _figure("Lengths", _lengths(answers), _describe_lengths(answers))
    yield _figure("Calls", _calls(grade), _describe_calls(grade.runs))
    caption = (
        "Published: an RTX 5090 and the course's own 358 questions. Another machine, model or "
        "question file makes another figure. What the course calls tokens may be characters."
    )
    yield _figure("Speed and the published leaderboard", _speeds(grade), caption)


def _figure(title: str, plot: str, caption: str) -> str:
    return f"<figure><h3>{title}</h3>{plot}<figcaption>{escape(caption)}</figcaption></figure>"


def _lengths(answers: Sequence[Answer]) -> str:
    ours = [float(len(one.texts[0])) for one in answers]
    theirs = [float(len(one.reference)) for one in answers]
    # A few very long answers must not press all others into one bar; the last bin holds them.
    most = max(quantile(ours, 0.98), quantile(theirs, 0.98), 20.0)
    step = max(1, round(most / 20 / 5 + 0.5) * 5)
    bins = int(most // step) + 1
    series = [Series("answers", ours, "a"), Series("references", theirs, "b")]
    return draw_histogram(series, x_label="characters", x_max=float(step * bins), bins=bins)


def _describe_lengths(answers: Sequence[Answer]) -> str:
    ours = statistics.median(len(one.texts[0]) for one in answers)
    theirs = statistics.median(len(one.reference) for one in answers)
    return f"Medians: answers {ours:.0f}, references {theirs:.0f}. The last bar holds all longer."


def _calls(grade: Grade) -> str:
    spans = [
        Span(
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
    return draw_spans(spans, groups=len(grade.runs), x_label="seconds", limit=limit)


def _describe_calls(runs: Sequence[RunResult]) -> str:
    times = [call.seconds for run in runs for call in run.calls]
    if len(times) == 1:
        return f"1 call of {times[0]:.3f} s.{_explain_red(runs)}"
    p50, p90, p99 = (quantile(times, share) for share in (0.5, 0.9, 0.99))
    return (
        f"{len(times)} calls: median {p50:.3f} s, 90 % within {p90:.3f} s, 99 % within "
        f"{p99:.3f} s, longest {max(times):.3f} s.{_explain_red(runs)}"
    )


def _explain_red(runs: Sequence[RunResult]) -> str:
    is_any = any(call.answered < call.asked for run in runs for call in run.calls)
    return " Red ones left something unanswered." if is_any else ""


def _speeds(grade: Grade) -> str:
    bars = [
        Bar(p.name, p.tokens_per_s, "dim", f"ROUGE-L {p.rouge_course}" if p.rouge_course else "")
        for p in PUBLISHED
    ]
    score = f"ROUGE-L {statistics.median(run.rouge_course for run in grade.runs):.4f}"
    tokens = [run.speed.tokens_per_s for run in grade.runs if run.speed.tokens_per_s is not None]
    if tokens:
        bars.append(Bar("this run, tokens", statistics.median(tokens), "a", score))
    characters = statistics.median(run.speed.characters_per_s for run in grade.runs)
    bars.append(Bar("this run, characters", characters, "b", score))
    bars.sort(key=lambda bar: -bar.value)
    return draw_bars(bars, unit="/s")


def _runs(runs: Sequence[RunResult]) -> str:
    heads = ["run", "seconds", "tokens/s", "characters/s", "course", "all tokens", "exact"]
    heads += ["answered", "empty", "refused", "none"]
    rows = "".join(_run_row(number, run) for number, run in enumerate(runs, start=1))
    cells = "".join(f"<th>{head}</th>" for head in heads)
    table = f"<table><thead><tr>{cells}</tr></thead><tbody>{rows}</tbody></table>"
    return f'<section><h2>Runs</h2><div class="scroll">{table}</div></section>'


def _run_row(number: int, run: RunResult) -> str:
    speed = run.speed
    tokens = "–" if speed.tokens_per_s is None else f"{speed.tokens_per_s:,.0f}"
    cells = [
        str(number),
        f"{run.elapsed_s:.3f}",
        tokens,
        f"{speed.characters_per_s:,.0f}",
        f"{run.rouge_course:.4f}",
        f"{run.rouge_whitespace:.4f}",
        f"{run.exact:.1%}",
        *(str(count) for count in (run.answered, run.empty, run.refused, run.missing)),
    ]
    return "<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>"


def _worst(grade: Grade) -> str:
    """Every different question once, the least alike first."""
    first = {one.question: (n, one) for n, one in reversed(list(enumerate(grade.answers)))}
    order = sorted(first.values(), key=lambda row: (_least(row[1]), row[0]))
    shown = [(n, one) for n, one in order if not all(s.is_exact for s in one.scores)][:_WORST]
    if not shown:
        return "<section><h2>Worst answers</h2><p>Every answer is its reference.</p></section>"
    cards = "".join(_card(number, one) for number, one in shown)
    note = "What an answer has in common with its reference, in the same order, is marked."
    return f"<section><h2>Worst answers</h2><p>{note}</p>{cards}</section>"


def _least(one: Answer) -> float:
    return min(score.rouge_whitespace for score in one.scores)


def _card(number: int, one: Answer) -> str:
    worst = min(range(len(one.texts)), key=lambda n: one.scores[n].rouge_whitespace)
    text, score = one.texts[worst], one.scores[worst]
    ours, theirs = mark_common(text, one.reference)
    answer = _marked(ours) if text.strip() else f"<em>{_explain_blank(one, worst)}</em>"
    run = f" · run {worst + 1}" if len(one.texts) > 1 else ""
    figures = f"course {score.rouge_course:.4f} · all tokens {score.rouge_whitespace:.4f}{run}"
    return (
        f'<article><h4{_lang(one.question)}><a href="#q{number + 1}">{number + 1}</a> '
        f"{escape(one.question)}</h4><p><small>{figures}</small></p>"
        f'<div class="sides"><div><small>answer, {len(text)} characters</small>'
        f"<p{_lang(text)}>{answer}</p></div>"
        f"<div><small>reference, {len(one.reference)} characters</small>"
        f"<p{_lang(one.reference)}>{_marked(theirs)}</p></div></div></article>"
    )


def _explain_blank(one: Answer, run: int) -> str:
    words = {"empty": "an empty answer", "missing": "no answer", "answered": ""}
    state = one.states[run]
    return escape(f"refused: {one.refusal}" if state == "refused" else words[state])


def _marked(pieces: Sequence[tuple[str, bool]]) -> str:
    """Neighbours under one mark, so that the text stays readable."""
    parts: list[str] = []
    is_open = False
    for piece, is_common in pieces:
        if is_common != is_open:
            parts.append("<mark>" if is_common else "</mark>")
            is_open = is_common
        parts.append(escape(piece))
    return "".join(parts) + ("</mark>" if is_open else "")


def _all(grade: Grade) -> str:
    rows = "".join(_row(number, one) for number, one in enumerate(grade.answers[:_MOST_LISTED]))
    total = len(grade.answers)
    more = (
        f"<p>The first {_MOST_LISTED} of {total}; the JSON details hold all.</p>"
        if total > _MOST_LISTED
        else ""
    )
    return (
        f"<section><h2>All answers</h2>{more}"
        '<input id="filter" type="search" placeholder="a word, #17, empty, exact, below 0.3" '
        f'aria-label="filter"><p><small id="count">{min(total, _MOST_LISTED)} answers</small></p>'
        f'<div id="answers">{rows}</div></section>'
    )


def _row(number: int, one: Answer) -> str:
    score, state = one.scores[0], one.states[0]
    text = one.texts[0]
    answer = escape(text) if text.strip() else f"<em>{_explain_blank(one, 0)}</em>"
    words = "exact" if score.is_exact else ("" if state == "answered" else state)
    tag = f'<span class="tag {state}">{words}</span>' if words else ""
    scores = f"{score.rouge_course:.2f} · {score.rouge_whitespace:.2f}"
    return (
        f'<details id="q{number + 1}" data-score="{score.rouge_whitespace:.4f}" '
        f'data-tag="{words}"><summary><b>{number + 1}</b><i>{scores}</i>'
        f"<span{_lang(one.question)}>{escape(one.question)}</span>{tag}</summary>"
        f'<div class="sides"><div><small>answer</small><p{_lang(text)}>{answer}</p></div>'
        f"<div><small>reference</small><p{_lang(one.reference)}>{escape(one.reference)}</p></div>"
        "</div></details>"
    )


def _lang(text: str) -> str:
    """Chinese glyphs and not Japanese ones, where a font has both."""
    return ' lang="zh-Hans"' if _CHINESE.search(text) else ' lang="en"'


def _facts(grade: Grade) -> str:
    facts = grade.facts
    skipped = ("skipped", "engine", "tokens_missing", "unscored", "ceiling")
    rows = [(key, value) for key, value in vars(facts).items() if key not in skipped and value]
    rows += [(f"engine: {key}", value) for key, value in facts.engine.items()]
    shown = "".join(
        f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(_plain(value))}</dd>"
        for key, value in rows
    )
    return f"<section><h2>How it was measured</h2><dl>{shown}</dl></section>"


def _plain(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
