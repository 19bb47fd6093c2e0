"""Plots as inline SVG: drawn here, so that a report is one file and asks nobody for anything.

What is not here: the marks themselves, which `templates/plot.svg` makes.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from lab.reports.pages import load_macros

_WIDTH, _HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 26, 38
_MOST_LANES_IN_FULL = 24


@dataclass(frozen=True)
class PlotSeries:
    """Values under a name; `style` is a class of the page's CSS."""

    name: str
    values: Sequence[float]
    style: str


@dataclass(frozen=True)
class NamedBar:
    """One named length."""

    name: str
    value: float
    style: str
    note: str = ""


@dataclass(frozen=True)
class CallBar:
    """From when to when, in which group."""

    group: int
    start: float
    end: float
    style: str
    title: str


@dataclass(frozen=True)
class PlotAxes:
    """Places of values inside the axes."""

    x_max: float
    y_max: float
    height: int = _HEIGHT
    left: int = _LEFT
    right: int = _WIDTH - _RIGHT

    def x(self, value: float) -> float:
        return self.left + value / (self.x_max or 1) * (self.right - self.left)

    def y(self, value: float) -> float:
        return self.height - _BOTTOM - value / (self.y_max or 1) * (self.height - _TOP - _BOTTOM)

    def x_ticks(self) -> list[float]:
        return _list_ticks(self.x_max, 5)

    def y_ticks(self) -> list[float]:
        return _list_ticks(self.y_max, 4)


def draw_histogram(
    series: Sequence[PlotSeries], *, x_label: str, x_max: float, bins: int
) -> Markup:
    """The series' bars stand side by side in each bin."""
    step = x_max / bins
    counts = [_count(one.values, step, bins) for one in series]
    axes = PlotAxes(x_max, _round_up(max(map(max, counts))))
    return _draw("histogram", axes, series, counts, step, x_label)


def draw_bars(bars: Sequence[NamedBar], *, unit: str, label: str) -> Markup:
    """Named horizontal bars with their figures; a name that leaves no room for one is cut."""
    return _draw("bars", bars, unit, label)


def draw_call_bars(
    bars: Sequence[CallBar], *, groups: int, x_label: str, limit: float | None
) -> Markup:
    """Each call as a bar from its start to its end; one band a run, one lane a call at a time."""
    end = max((bar.end for bar in bars), default=1.0)
    # A limit that was never near would press all calls into one line.
    limit = limit if limit is not None and limit <= end * 1.25 else None
    assigned = [_assign_lanes([bar for bar in bars if bar.group == g]) for g in range(groups)]
    lane_counts = [max((lane for lane, _ in row), default=0) + 1 for row in assigned]
    total = sum(lane_counts) + groups - 1
    lane_height = min(26.0, max(2.0, 190 / max(1, total)))
    top = 6.0 if limit is None else float(_TOP)
    axes = PlotAxes(_round_up(max(end, limit or 0.0)), 1, int(top + _BOTTOM + total * lane_height))
    bands = []
    for row, lanes in zip(assigned, lane_counts, strict=True):
        bands.append({"top": top, "lanes": lanes, "bars": row})
        top += (lanes + 1) * lane_height
    gap = 2 if total <= _MOST_LANES_IN_FULL else 0.4
    return _draw("call_bars", axes, bands, lane_height, gap, x_label, limit)


def _assign_lanes(bars: Sequence[CallBar]) -> list[tuple[int, CallBar]]:
    """The first lane that is free when a call begins."""
    ends: list[float] = []
    found = []
    for bar in sorted(bars, key=lambda one: one.start):
        lane = next((n for n, end in enumerate(ends) if end <= bar.start + 1e-6), len(ends))
        ends[lane : lane + 1] = [bar.end]
        found.append((lane, bar))
    return found


def _count(values: Sequence[float], width: float, bins: int) -> list[int]:
    counts = [0] * bins
    for value in values:
        counts[max(0, min(bins - 1, int(value / width)))] += 1
    return counts


def _list_ticks(high: float, about: int) -> list[float]:
    step = _find_step(high / about)
    return [n * step for n in range(math.floor(high / step + 1e-9) + 1)]


def _find_step(least: float) -> float:
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next((f * power for f in (1, 2, 5, 10) if f * power >= least * 0.999), 10 * power)


def _round_up(value: float) -> float:
    step = _find_step(value / 5)
    return max(step, math.ceil(value / step - 1e-9) * step)


def _shorten(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _list_styles(named: Iterable[Any]) -> dict[str, str]:
    """For the legend."""
    return {one.name: one.style for one in named}


def _draw(macro: str, *parts: object) -> Markup:
    macros = load_macros("plot.svg", across=_WIDTH, short=_shorten, named=_list_styles)
    drawn: Markup = getattr(macros, macro)(*parts)
    return drawn
