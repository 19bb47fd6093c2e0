"""A run of the benchmark on a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterator

from lab.bench.bench_figures import ARMS, BenchRow, RoundSeries
from lab.bench.relay.relay_comparison import describe_relay
from lab.bench.report.bench_result import BenchResult, describe_quiet
from lab.bench.rounds import WorkloadRounds
from lab.records.figure_change import describe_changes
from lab.reports.console import BOLD, RED, count, paint

_NAME = 32


def describe_result(result: BenchResult, *, coloured: bool) -> Iterator[str]:
    rows = {row.name: row for row in result.rows()}
    if result.measured():
        arms = "".join(f"{arm:>11}" for arm in ARMS)
        yield f"{'':{_NAME}}{arms}   {'gateway/direct (95 %)':24}{'control':>9}"
    for measured in result.measured():
        yield from _describe_workload(measured, rows)
    yield ""
    if result.relayed:
        yield f"relay beside a stand-in engine, {count(result.relayed.series[0].rounds, 'round')}"
        yield from (f"  {line}" for line in describe_relay(result.relayed))
        yield ""
    for row in rows.values():
        if row.bound is not None:
            shown = f"{row.span.value:.3f} {row.unit} ({row.bound.describe()})"
            yield f"{row.bound_verdict:7} {row.name}: {shown}"
    if result.against:
        yield ""
        yield f"against {result.against}, {count(len(result.changes), 'figure')} in common:"
        yield from describe_changes(result.changes)
    yield ""
    yield from result.notes
    is_loud = coloured and bool(result.unquiet())
    yield paint(describe_quiet(result), RED + BOLD, coloured=is_loud)


def _describe_workload(measured: WorkloadRounds, rows: dict[str, BenchRow]) -> Iterator[str]:
    said = [measured.title, count(measured.series[0].rounds, "round")]
    if measured.neighbours is not None:
        said.append(f"other programs took {measured.neighbours:.0%} of the machine")
    yield ", ".join(said)
    for series in measured.series:
        yield _line(f"{series.measure}, {series.unit}", _medians(series), rows.get(series.name))
        added = rows.get(f"{series.name}, added")
        if added:
            yield _line(f"added, {added.unit}", "", added)
    if measured.gateway_cpu_ms:
        middle = statistics.median(measured.gateway_cpu_ms)
        yield f"{'  of which the gateway took':{_NAME}}{'':22}{middle:>11.3f}"


def _line(name: str, medians: str, row: BenchRow | None) -> str:
    relation = ""
    if row is not None and row.control is not None:
        loud = " " if row.is_quiet else "!"
        shown = f"{row.span.value:.3f} ({row.span.describe()})"
        relation = f"{shown:24}{row.control.value:>9.3f} {loud} {row.difference}"
    return f"  {name:{_NAME - 2}}{medians:33}   {relation}".rstrip()


def _medians(series: RoundSeries) -> str:
    return "".join(f"{statistics.median(values):>11.2f}" for values in series.by_arm.values())
