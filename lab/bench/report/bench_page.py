"""A run of the benchmark as an HTML page."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from markupsafe import Markup

from lab.bench.bench_figures import QUIET, BenchRow, RoundSeries
from lab.bench.relay.relay_comparison import CHUNKS, LATENCY, RATE
from lab.bench.report.bench_result import BenchResult, describe_quiet
from lab.bench.rounds import CPU_MEASURE, WorkloadRounds
from lab.intervals import quantile
from lab.reports import plots
from lab.reports.output_files import write_file
from lab.reports.pages import list_facts, render_page

_STYLES = {"direct": "b", "control": "dim", "gateway": "a", "plain": "dim"}
_WIDEST = 0.3
_BINS = 24
_RELAY_CAPTIONS = {
    LATENCY: "One call at a time, to an engine that answers at once.",
    RATE: "64 connections; more is better.",
    CHUNKS: "64 streams; more is better.",
}


def write_report(result: BenchResult, path: Path) -> None:
    write_file(path, render(result))


def render(result: BenchResult) -> str:
    rows, facts = result.rows(), result.facts
    nested = {"engine": facts.engine, "gateway": facts.gateway, "asked": facts.asked}
    ratios = [row for row in rows if row.part == "engine" and row.neutral == 1.0]
    return render_page(
        "bench.html",
        title=f"Benchmark of {facts.model or 'the relay'}",
        name=facts.model or "stand-in",
        result=result,
        rows=rows,
        quiet=describe_quiet(result),
        quiet_share=QUIET,
        has_findings=True,
        times=[row for row in ratios if not row.name.endswith(CPU_MEASURE)],
        cpu=[row for row in ratios if row.name.endswith(CPU_MEASURE)],
        relay_captions=_RELAY_CAPTIONS,
        draw_ratios=_draw_ratios,
        draw_times=_draw_times,
        draw_relayed=_draw_relayed,
        facts=list(list_facts({**vars(facts), "setting": ""}, nested)),
    )


def _draw_ratios(rows: Sequence[BenchRow]) -> Markup:
    ranges = [
        plots.RangeMark(row.name, arm, interval.value, interval.low, interval.high, _STYLES[arm])
        for row in rows
        for arm, interval in (("gateway", row.span), ("control", row.control))
        if interval
    ]
    return plots.draw_ranges(ranges, centre=1.0, band=QUIET, x_label="× direct", widest=_WIDEST)


def _draw_times(measured: WorkloadRounds) -> Markup:
    times = next(one for one in measured.series if one.measure == "time")
    every = [value for values in times.by_arm.values() for value in values]
    # The slowest few would press all others into one bar; the last bin holds them.
    low, high = min(every), quantile(every, 0.98)
    step = max((high - low) / _BINS, 1e-6)
    first, bins = math.floor(low / step) * step, _BINS + 1
    series = [plots.PlotSeries(arm, values, _STYLES[arm]) for arm, values in times.by_arm.items()]
    span = {"x_min": first, "x_max": first + step * bins}
    return plots.draw_histogram(series, x_label="ms", bins=bins, y_label="calls", **span)


def _draw_relayed(series: RoundSeries) -> Markup:
    bars = []
    for arm, values in series.by_arm.items():
        note = f"{min(values):,.3g} to {max(values):,.3g}"
        bars.append(plots.NamedBar(arm, statistics.median(values), _STYLES[arm], note))
    return plots.draw_bars(bars, unit=series.unit)
