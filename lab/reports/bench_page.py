"""The HTML report: one file that asks nobody for anything."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from lab.bench.bench_figures import QUIET, Row, Span
from lab.bench.bench_result import Result, describe_quiet
from lab.bench.rate_sweep import Sweep
from lab.bench.relay.relay_comparison import CHUNKS, LATENCY, RATE, Relayed
from lab.bench.rounds import CPU_MEASURE, Measured
from lab.reports.output_files import write_file
from lab.reports.plots import (
    Bar,
    Cloud,
    Dot,
    Range,
    Series,
    draw_bars,
    draw_cloud,
    draw_histogram,
    draw_ranges,
)

_PAGE = Path(__file__).parent / "templates" / "bench.html"
_STYLE = _PAGE.with_name("report.css")
_STYLES = {"direct": "b", "control": "dim", "gateway": "a", "plain": "dim"}
_WIDEST = 0.3
_BINS = 24


def write_report(result: Result, path: Path) -> None:
    write_file(path, render(result))


def render(result: Result) -> str:
    """The page around it is report.html; its marks are replaced here."""
    rows = result.rows()
    parts = {
        "style": _STYLE.read_text(encoding="utf-8"),
        "title": escape(f"Benchmark of {result.facts.model or 'the relay'}"),
        "head": _head(result),
        "findings": _findings(result),
        "tiles": "".join(_tiles(rows)),
        "plots": "".join(_plots(result, rows)),
        "rows": _table(rows),
        "against": _against(result),
        "facts": _facts(result),
    }
    page = _PAGE.read_text(encoding="utf-8")
    return re.sub(r"\{\{(\w+)\}\}", lambda found: parts[found[1]], page)


def _head(result: Result) -> str:
    is_quiet = not result.unquiet()
    style, word = ("good", "quiet") if is_quiet else ("bad", "not quiet")
    overs = len(result.overs())
    held = f'<b class="bad">{overs} bounds broken</b>' if overs else ""
    facts = result.facts
    shown = " · ".join(filter(None, [facts.date, facts.machine, f"commit {facts.commit}"]))
    return (
        f'<h1>Gateway against direct, {escape(facts.model or "stand-in")} <b class="{style}">{word}'
        f"</b> {held}</h1><p>{escape(shown)}</p>"
    )


def _findings(result: Result) -> str:
    rows = [("error" if result.unquiet() else "note", "control", describe_quiet(result))]
    for row in result.rows():
        if row.bound is not None and row.bound_verdict != "within":
            severity = "error" if row.bound_verdict == "OVER" else "note"
            text = f"{row.name}: {row.span.value:.3f} {row.unit}, {row.bound.describe()} promised"
            rows.append((severity, f"bound {row.bound_verdict}", text))
    rows += [("error", "worse", f"{one.after.name}: {one.verdict} than {result.against}")
             for one in result.changes if one.is_worse]  # fmt: skip
    rows += [("note", "note", note) for note in result.notes]
    shown = "".join(
        f'<li class="{severity}"><code>{code}</code> <span>{escape(text)}</span></li>'
        for severity, code, text in rows
    )
    return f'<section><h2>What was found</h2><ul class="findings">{shown}</ul></section>'


def _tiles(rows: Sequence[Row]) -> Iterator[str]:
    """The bounded figures and the knee: what people ask for first."""
    for row in rows:
        if row.bound is not None or row.name.endswith("knee"):
            words = [row.unit]
            words += [_interval(row.span)] if row.span.rounds > 1 else []
            words += [f"{row.bound.describe()}: {row.bound_verdict}"] if row.bound else []
            note = " · ".join(words)
            style = ' class="bad"' if row.bound_verdict == "OVER" else ""
            yield (
                f'<div class="tile"><small>{escape(row.name)}</small>'
                f"<b{style}>{row.span.value:.3f}</b>"
                f"<small>{escape(note)}</small></div>"
            )


def _interval(span: Span) -> str:
    return f"{span.low:.3f} to {span.high:.3f}"


def _plots(result: Result, rows: Sequence[Row]) -> Iterator[str]:
    ratios = [row for row in rows if row.part == "engine" and row.neutral == 1.0]
    cpu = [row for row in ratios if row.name.endswith(CPU_MEASURE)]
    times = [row for row in ratios if row not in cpu]
    if times:
        caption = (
            f"Below 1 is less, above it more, than direct. The band is 1.00 ± {QUIET:.2f}: where "
            "the control leaves it, the machine was not quiet."
        )
        yield _figure("Time, over direct", _draw_ratios(times), caption)
    if cpu:
        caption = "The same of the CPU time of all that serves: gateway and engine together."
        yield _figure("CPU, over direct", _draw_ratios(cpu), caption)
    if result.sweep:
        caption = (
            f"Each dot is one rate for one door; a hollow one was not served: 95 % took more than "
            f"{result.sweep.bound_s:g} s, the queue grew, or calls were refused."
        )
        yield _figure("Open loop: time over rate", _draw_sweep(result.sweep), caption)
    for measured in result.workloads:
        if measured.title == result.single_title:
            caption = "Every call of the measured rounds, in milliseconds."
            yield _figure(measured.title, _draw_times(measured), caption)
    if result.relayed:
        yield from _draw_relayed(result.relayed)


def _figure(title: str, plot: str, caption: str) -> str:
    return (
        f"<figure><h3>{escape(title)}</h3>{plot}<figcaption>{escape(caption)}</figcaption></figure>"
    )


def _draw_ratios(rows: Sequence[Row]) -> str:
    ranges = []
    for row in rows:
        span, control = row.span, row.control
        ranges.append(Range(row.name, "gateway", span.value, span.low, span.high, "a"))
        if control:
            ranges.append(
                Range(row.name, "control", control.value, control.low, control.high, "dim")
            )
    return draw_ranges(ranges, centre=1.0, band=QUIET, x_label="× direct", widest=_WIDEST)


def _draw_sweep(sweep: Sweep) -> str:
    clouds = [
        Cloud(
            arm,
            [
                Dot(
                    point.rate,
                    point.p95_s,
                    not point.is_served,
                    f"{arm} at {point.rate:.0f}/s: 95 % within {point.p95_s:.2f} s; "
                    f"{point.trouble or 'served'}",
                )
                for point in sweep.points
                if point.arm == arm
            ],
            _STYLES[arm],
        )
        for arm in sweep.knees
    ]
    return draw_cloud(
        clouds,
        x_label="calls/s",
        y_label="95 % within, s",
        limit=sweep.bound_s,
        limit_name="bound",
    )


def _draw_times(measured: Measured) -> str:
    times = next(one for one in measured.series if one.measure == "time")
    every = sorted(value for values in times.by_arm.values() for value in values)
    # The slowest few would press all others into one bar; the last bin holds them.
    low, high = every[0], every[min(len(every) - 1, int(0.98 * len(every)))]
    step = max((high - low) / _BINS, 1e-6)
    first = math.floor(low / step) * step
    series = [Series(arm, values, _STYLES[arm]) for arm, values in times.by_arm.items()]
    return draw_histogram(
        series, x_label="ms", x_min=first, x_max=first + step * (_BINS + 1), bins=_BINS + 1,
        y_label="calls",
    )  # fmt: skip


def _draw_relayed(relayed: Relayed) -> Iterator[str]:
    captions = {
        LATENCY: "One call at a time, to an engine that answers at once.",
        RATE: "64 connections; more is better.",
        CHUNKS: "64 streams; more is better.",
    }
    for series in relayed.series:
        if series.measure in captions:
            bars = [
                Bar(
                    arm,
                    statistics.median(values),
                    _STYLES[arm],
                    f"{min(values):,.3g} to {max(values):,.3g}",
                )
                for arm, values in series.by_arm.items()
            ]
            plot = draw_bars(bars, unit=series.unit)
            yield _figure(f"Stand-in engine: {series.measure}", plot, captions[series.measure])


def _table(rows: Sequence[Row]) -> str:
    heads = ["figure", "value", "interval", "rounds", "control", "difference", "bound"]
    shown = "".join(
        f"<th{' class=name' if head in ('figure', 'difference') else ''}>{head}</th>"
        for head in heads
    )
    body = "".join(_row(row) for row in rows)
    table = f"<table><thead><tr>{shown}</tr></thead><tbody>{body}</tbody></table>"
    return f'<section><h2>Figures</h2><div class="scroll">{table}</div></section>'


def _row(row: Row) -> str:
    control = f"{row.control.value:.3f}" if row.control else "–"
    loud = "" if row.is_quiet else ' class="bad"'
    bound = f"{row.bound_verdict}, {row.bound.describe()}" if row.bound else ""
    over = ' class="bad"' if row.bound_verdict == "OVER" else ""
    interval = _interval(row.span) if row.span.rounds > 1 else "–"
    return (
        f'<tr><td class="name">{escape(row.name)}</td>'
        f"<td>{row.span.value:.3f} {escape(row.unit)}</td><td>{interval}</td>"
        f"<td>{row.span.rounds}</td><td{loud}>{control}</td>"
        f'<td class="name">{escape(row.difference)}</td><td{over}>{bound}</td></tr>'
    )


def _against(result: Result) -> str:
    if not result.changes:
        return ""
    heads = '<th class="name">figure</th><th>then</th><th>now</th><th>change</th>'
    heads += '<th class="name">verdict</th>'
    body = "".join(
        f'<tr><td class="name">{escape(one.after.name)}</td><td>{one.before.span.value:.3f}</td>'
        f"<td>{one.after.span.value:.3f}</td><td>{one.change:+.3f} ± {one.half:.3f}</td>"
        f'<td class="name">{escape(one.verdict)}</td></tr>'
        for one in result.changes
    )
    table = f"<table><thead><tr>{heads}</tr></thead><tbody>{body}</tbody></table>"
    title = escape(f"Against {result.against}")
    return f'<section><h2>{title}</h2><div class="scroll">{table}</div></section>'


def _facts(result: Result) -> str:
    facts = result.facts
    nested = {"engine": facts.engine, "gateway": facts.gateway, "asked": facts.asked}
    rows: list[tuple[str, object]] = [
        (key, value)
        for key, value in vars(facts).items()
        if key not in {*nested, "setting"} and value not in ("", None)
    ]
    for name, values in nested.items():
        rows += [(f"{name}: {key}", value) for key, value in values.items()]
    shown = "".join(
        f"<dt>{escape(key.replace('_', ' '))}</dt><dd>{escape(_plain(value))}</dd>"
        for key, value in rows
    )
    return f"<section><h2>How it was measured</h2><dl>{shown}</dl></section>"


def _plain(value: object) -> str:
    return f"{value:.2f}" if isinstance(value, float) else str(value)
