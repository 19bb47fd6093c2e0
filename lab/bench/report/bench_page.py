"""A run of the benchmark as an HTML page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from pathlib import Path

from lab.bench.bench_figures import QUIET, BenchRow
from lab.bench.rate_sweep import Sweep
from lab.bench.relay.relay_comparison import CHUNKS, LATENCY, RATE, RelayResult
from lab.bench.report.bench_result import BenchResult, describe_quiet
from lab.bench.rounds import CPU_MEASURE, WorkloadRounds
from lab.intervals import find_value_at
from lab.reports import plots
from lab.reports.output_files import write_file
from lab.reports.pages import PageFigure, list_facts, render_page

_STYLES = {"direct": "b", "control": "dim", "gateway": "a", "plain": "dim"}
_WIDEST = 0.3
_BINS = 24


def write_report(result: BenchResult, path: Path) -> None:
    write_file(path, render(result))


def render(result: BenchResult) -> str:
    rows, facts = result.rows(), result.facts
    nested = {"engine": facts.engine, "gateway": facts.gateway, "asked": facts.asked}
    return render_page(
        "bench.html",
        title=f"Benchmark of {facts.model or 'the relay'}",
        name=facts.model or "stand-in",
        result=result,
        rows=rows,
        found=list(_findings(result)),
        tiles=[_tile(row) for row in rows if row.bound is not None or row.name.endswith("knee")],
        plots=list(_draw_plots(result, rows)),
        facts=list(list_facts({**vars(facts), "setting": ""}, nested)),
    )


def _findings(result: BenchResult) -> Iterator[dict[str, object]]:
    def found(severity: str, code: str, text: str) -> dict[str, object]:
        return {"severity": severity, "code": code, "text": text, "questions": ()}

    yield found("error" if result.unquiet() else "note", "control", describe_quiet(result))
    for row in result.rows():
        if row.bound is not None and row.bound_verdict != "within":
            severity = "error" if row.bound_verdict == "OVER" else "note"
            said = f"{row.span.value:.3f} {row.unit}, {row.bound.describe()} promised"
            yield found(severity, f"bound {row.bound_verdict}", f"{row.name}: {said}")
    for one in result.changes:
        if one.is_worse:
            text = f"{one.after.name}: {one.verdict} than {result.against}"
            yield found("error", "worse", text)
    for note in result.notes:
        yield found("note", "note", note)


def _tile(row: BenchRow) -> dict[str, str]:
    """The bounded figures and the knee: what people ask for first."""
    words = [row.unit]
    words += [row.span.describe()] if row.span.rounds > 1 else []
    words += [f"{row.bound.describe()}: {row.bound_verdict}"] if row.bound else []
    figure, style = f"{row.span.value:.3f}", "bad" if row.bound_verdict == "OVER" else ""
    return {"name": row.name, "figure": figure, "note": " · ".join(words), "style": style}


def _draw_plots(result: BenchResult, rows: Sequence[BenchRow]) -> Iterator[PageFigure]:
    ratios = [row for row in rows if row.part == "engine" and row.neutral == 1.0]
    cpu = [row for row in ratios if row.name.endswith(CPU_MEASURE)]
    times = [row for row in ratios if row not in cpu]
    if times:
        caption = (
            f"Below 1 is less, above it more, than direct. The band is 1.00 ± {QUIET:.2f}: where "
            "the control leaves it, the machine was not quiet."
        )
        yield _draw_ratios("Time, over direct", times, caption)
    if cpu:
        caption = "The same of the CPU time of all that serves: gateway and engine together."
        yield _draw_ratios("CPU, over direct", cpu, caption)
    if result.sweep:
        yield _draw_sweep(result.sweep)
    for measured in result.workloads:
        if measured.title == result.single_title:
            yield _draw_times(measured)
    if result.relayed:
        yield from _draw_relayed(result.relayed)


def _draw_ratios(title: str, rows: Sequence[BenchRow], caption: str) -> PageFigure:
    ranges = [
        plots.RangeMark(row.name, arm, interval.value, interval.low, interval.high, _STYLES[arm])
        for row in rows
        for arm, interval in (("gateway", row.span), ("control", row.control))
        if interval
    ]
    plot = plots.draw_ranges(ranges, centre=1.0, band=QUIET, x_label="× direct", widest=_WIDEST)
    return PageFigure(title, plot, caption)


def _draw_sweep(sweep: Sweep) -> PageFigure:
    dots = []
    for point in sweep.points:
        said = f"{point.arm} at {point.rate:.0f}/s: 95 % within {point.p95_s:.2f} s"
        title = f"{said}; {point.trouble or 'served'}"
        place = (point.rate, point.p95_s)
        dots.append(
            plots.PlotDot(point.arm, *place, _STYLES[point.arm], bool(point.trouble), title)
        )
    names = {"x_label": "calls/s", "y_label": "95 % within, s", "limit_name": "bound"}
    plot = plots.draw_dots(dots, limit=sweep.bound_s, **names)
    caption = (
        "Each dot is one rate for one target; a hollow one was not served: 95 % took more than "
        f"{sweep.bound_s:g} s, the queue grew, or calls were refused."
    )
    return PageFigure("Open loop: time over rate", plot, caption)


def _draw_times(measured: WorkloadRounds) -> PageFigure:
    times = next(one for one in measured.series if one.measure == "time")
    every = [value for values in times.by_arm.values() for value in values]
    # The slowest few would press all others into one bar; the last bin holds them.
    low, high = min(every), find_value_at(every, 0.98)
    step = max((high - low) / _BINS, 1e-6)
    first, bins = math.floor(low / step) * step, _BINS + 1
    series = [plots.PlotSeries(arm, values, _STYLES[arm]) for arm, values in times.by_arm.items()]
    span = {"x_min": first, "x_max": first + step * bins}
    plot = plots.draw_histogram(series, x_label="ms", bins=bins, y_label="calls", **span)
    caption = "Every call of the measured rounds, in milliseconds."
    return PageFigure(measured.title, plot, caption)


def _draw_relayed(relayed: RelayResult) -> Iterator[PageFigure]:
    captions = {
        LATENCY: "One call at a time, to an engine that answers at once.",
        RATE: "64 connections; more is better.",
        CHUNKS: "64 streams; more is better.",
    }
    for series in (one for one in relayed.series if one.measure in captions):
        bars = []
        for arm, values in series.by_arm.items():
            note = f"{min(values):,.3g} to {max(values):,.3g}"
            bars.append(plots.NamedBar(arm, statistics.median(values), _STYLES[arm], note))
        plot = plots.draw_bars(bars, unit=series.unit)
        title = f"Stand-in engine: {series.measure}"
        yield PageFigure(title, plot, captions[series.measure])
