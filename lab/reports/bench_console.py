"""The run on a terminal."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence

from lab.bench import earlier_run as against
from lab.bench.bench_figures import Row, Series
from lab.bench.bench_result import Result, describe_quiet
from lab.bench.rate_sweep import Sweep
from lab.bench.relay.relay_comparison import describe_relayed
from lab.bench.rounds import Measured

_NAME = 32
_RED, _BOLD, _RESET = "\x1b[31m", "\x1b[1m", "\x1b[0m"


def describe_result(result: Result, *, coloured: bool) -> Iterator[str]:
    rows = {row.name: row for row in result.rows()}
    if result.measured() or result.sweep:
        yield _head()
    for measured in result.measured():
        yield from _describe_measured(measured, rows)
    if result.sweep:
        yield from _describe_sweep(result.sweep, rows)
    yield ""
    if result.relayed:
        rounds = _count(result.relayed.series[0].rounds)
        yield f"relay beside a stand-in engine, {rounds}"
        yield from (f"  {line}" for line in describe_relayed(result.relayed))
        yield ""
    yield from _describe_bounds(list(rows.values()))
    if result.changes or result.against:
        yield ""
        yield from against.describe(result.changes, result.against)
    yield ""
    yield from result.notes
    said = describe_quiet(result)
    yield f"{_RED}{_BOLD}{said}{_RESET}" if coloured and result.unquiet() else said


def _head() -> str:
    arms = "".join(f"{arm:>11}" for arm in ("direct", "control", "gateway"))
    return f"{'':{_NAME}}{arms}   {'gateway/direct (95 %)':24}{'control':>9}"


def _describe_measured(measured: Measured, rows: dict[str, Row]) -> Iterator[str]:
    said = [measured.title, _count(measured.series[0].rounds)]
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


def _line(name: str, medians: str, row: Row | None) -> str:
    relation = ""
    if row is not None and row.control is not None:
        loud = " " if row.is_quiet else "!"
        relation = f"{_interval(row):24}{row.control.value:>9.3f} {loud} {row.difference}"
    return f"  {name:{_NAME - 2}}{medians:33}   {relation}".rstrip()


def _medians(series: Series) -> str:
    return "".join(f"{statistics.median(values):>11.2f}" for values in series.by_arm.values())


def _interval(row: Row) -> str:
    return f"{row.span.value:.3f} ({row.span.low:.3f} to {row.span.high:.3f})"


def _count(rounds: int) -> str:
    return f"{rounds} round{'' if rounds == 1 else 's'}"


def _describe_sweep(sweep: Sweep, rows: dict[str, Row]) -> Iterator[str]:
    series = sweep.series()
    yield (
        f"open loop, {_count(series.rounds)}: the highest rate with 95 % of the calls within "
        f"{sweep.bound_s:g} s and no growing queue"
    )
    yield _line(f"knee, {series.unit}", _medians(series), rows.get(series.name))
    if sweep.was_client_the_limit():
        yield (
            "  this program itself was busy for most of a window that a door failed in: the knee "
            "may be its own; ask from a machine with more to give"
        )


def _describe_bounds(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if row.bound is not None:
            word = row.bound_verdict
            yield f"{word:7} {row.name}: {row.span.value:.3f} {row.unit} ({row.bound.describe()})"
