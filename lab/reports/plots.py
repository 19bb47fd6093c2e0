"""Plots as inline SVG: drawn here, so that a report is one file and asks nobody for anything.

Colours come from the page's CSS (classes `a`, `b`, `bad`, `dim`), so they follow light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from markupsafe import Markup

from lab.reports.pages import render_page

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
class PlotDot:
    """One value over another; a hollow one is no success."""

    x: float
    y: float
    is_hollow: bool
    title: str


@dataclass(frozen=True)
class DotCloud:
    """Dots under a name."""

    name: str
    dots: Sequence[PlotDot]
    style: str


@dataclass(frozen=True)
class RangeMark:
    """A value with its interval; those of one `group` stand close together under its name."""

    group: str
    name: str
    value: float
    low: float
    high: float
    style: str


@dataclass(frozen=True)
class _Axes:
    """Places of values inside the axes, and the axes themselves."""

    x_max: float
    y_max: float
    height: int = _HEIGHT
    x_min: float = 0.0

    def x(self, value: float) -> float:
        share = (value - self.x_min) / ((self.x_max - self.x_min) or 1)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return self.height - _BOTTOM - value / (self.y_max or 1) * (self.height - _TOP - _BOTTOM)

    def draw(self, x_label: str, y_label: str) -> list[_Mark]:
        parts = [_text(4, 13, y_label, "start", "dim")]
        for value in _ticks(0, self.y_max, 4):
            y = self.y(value)
            parts += [
                _line(_LEFT, y, _WIDTH - _RIGHT, y, "grid"),
                _text(_LEFT - 6, y + 4, _format(value), "end", "dim"),
            ]
        return parts + self.draw_x(x_label)

    def draw_x(self, label: str, show: Callable[[float], str] | None = None) -> list[_Mark]:
        base = self.y(0)
        ticks = [
            _text(self.x(value), base + 15, (show or _format)(value), "middle", "dim")
            for value in _ticks(self.x_min, self.x_max, 5)
        ]
        line = _line(_LEFT, base, _WIDTH - _RIGHT, base, "axis")
        return [line, *ticks, _text(_WIDTH - _RIGHT, self.height - 6, label, "end", "dim")]


def draw_histogram(
    series: Sequence[PlotSeries],
    *,
    x_label: str,
    x_max: float,
    bins: int,
    x_min: float = 0.0,
    y_label: str = "answers",
) -> Markup:
    """The series' bars stand side by side in each bin."""
    width = (x_max - x_min) / bins
    counts = [_count(one.values, x_min, width, bins) for one in series]
    most = max((max(row) for row in counts), default=1)
    axes = _Axes(x_max, _round_up(most), x_min=x_min)
    parts = axes.draw(x_label, y_label)
    slot = (axes.x(x_min + width) - axes.x(x_min)) / len(series)
    for place, (one, row) in enumerate(zip(series, counts, strict=True)):
        for number, count in enumerate(row):
            low = x_min + number * width
            left, top = axes.x(low) + place * slot + 0.5, axes.y(count)
            title = f"{one.name}: {count} between {low:g} and {low + width:g}"
            parts.append(_rect((left, top), (slot - 1, axes.y(0) - top), one.style, title))
    return _render(parts, series, f"{x_label}: " + ", ".join(one.name for one in series))


def draw_bars(bars: Sequence[NamedBar], *, unit: str) -> Markup:
    """Named horizontal bars with their figures."""
    row, label_left = 40, 6
    longest = max((bar.value for bar in bars), default=1) or 1
    parts = []
    for number, bar in enumerate(bars):
        top = number * row + 4
        length = max(2.0, bar.value / longest * (_WIDTH - 2 * label_left))
        figure = f"{_format(bar.value)} {unit}" + (f" · {bar.note}" if bar.note else "")
        parts += [
            _text(label_left, top + 13, bar.name, "start"),
            _text(_WIDTH - label_left, top + 13, figure, "end", "dim"),
            _rect((label_left, top + 19), (length, 12), bar.style, f"{bar.name}: {figure}"),
        ]
    return _render(parts, (), "speed", row * len(bars) + 8)


def draw_call_bars(
    bars: Sequence[CallBar], *, groups: int, x_label: str, limit: float | None
) -> Markup:
    """Each call as a bar from its start to its end; one band a run, one lane a call at a time."""
    end = max((bar.end for bar in bars), default=1.0)
    # A limit that was never near would press all calls into one line.
    limit = limit if limit is not None and limit <= end * 1.25 else None
    lanes = [_assign_lanes([bar for bar in bars if bar.group == g]) for g in range(groups)]
    lane_counts = [max((lane for lane, _ in row), default=0) + 1 for row in lanes]
    total = sum(lane_counts) + groups - 1
    lane_height = min(26.0, max(2.0, 190 / max(1, total)))
    top = 6.0 if limit is None else float(_TOP)
    axes = _Axes(_round_up(max(end, limit or 0.0)), 1, int(top + _BOTTOM + total * lane_height))
    gap = 2 if total <= _MOST_LANES_IN_FULL else 0.4
    parts = axes.draw_x(x_label)
    for number, row in enumerate(lanes):
        if groups > 1:
            middle = top + lane_counts[number] * lane_height / 2 + 4
            parts.append(_text(_LEFT - 8, middle, f"run {number + 1}", "end", "dim"))
        for lane, bar in row:
            left, across = axes.x(bar.start), axes.x(bar.end) - axes.x(bar.start) - 0.5
            size = max(1.5, across), max(1.0, lane_height - gap)
            parts.append(_rect((left, top + lane * lane_height), size, bar.style, bar.title))
        top += (lane_counts[number] + 1) * lane_height
    if limit is not None:
        x = axes.x(limit)
        parts += [_line(x, 4, x, axes.y(0), "bad"), _text(x - 4, 14, "limit", "end", "bad")]
    return _render(parts, (), x_label, axes.height)


def draw_clouds(
    clouds: Sequence[DotCloud], *, x_label: str, y_label: str, limit: float, limit_name: str
) -> Markup:
    """Dots from 0; what lies far above the limit is drawn at the upper edge."""
    dots = [dot for cloud in clouds for dot in cloud.dots]
    highest = max((dot.y for dot in dots if math.isfinite(dot.y)), default=1.0)
    furthest = max((dot.x for dot in dots), default=1.0)
    axes = _Axes(_round_up(furthest), _round_up(max(min(highest, limit * 1.5), limit)))
    y = axes.y(limit)
    parts = [
        *axes.draw(x_label, y_label),
        _line(_LEFT, y, _WIDTH - _RIGHT, y, "bad"),
        _text(_LEFT + 4, y - 4, limit_name, "start", "bad"),
    ]
    for cloud in clouds:
        for dot in cloud.dots:
            style = f"{cloud.style} hollow" if dot.is_hollow else cloud.style
            parts.append(_circle(axes.x(dot.x), axes.y(min(dot.y, axes.y_max)), style, dot.title))
    series = [PlotSeries(cloud.name, (), cloud.style) for cloud in clouds]
    return _render(parts, series, f"{y_label} over {x_label}")


def draw_ranges(
    ranges: Sequence[RangeMark], *, centre: float, band: float, x_label: str, widest: float
) -> Markup:
    """Each value as a dot on its interval; a band around the centre; all within `widest` of it."""
    rows: dict[str, list[RangeMark]] = {}
    for one in ranges:
        rows.setdefault(one.group, []).append(one)
    head, lane, top = 20, 13, 8
    height = top + sum(head + lane * len(row) + 6 for row in rows.values()) + _BOTTOM
    far = max((abs(v - centre) for one in ranges for v in (one.low, one.high)), default=band)
    reach = min(widest, max(far, band) * 1.1)
    axes = _Axes(centre + reach, 1, height, centre - reach)
    left, x, base = axes.x(centre - band), axes.x(centre), axes.y(0)
    across = axes.x(centre + band) - left
    parts = [_rect((left, top), (across, base - top), "band", f"within {band:.0%}")]
    parts += [_line(x, top, x, base, "axis"), *axes.draw_x(x_label, lambda v: f"{v:.4g}")]
    for group, row in rows.items():
        parts.append(_text(6, top + 13, group, "start"))
        for number, one in enumerate(row):
            parts += _draw_range(one, axes, top + head + number * lane + 4)
        top += head + lane * len(row) + 6
    styles = {one.name: one.style for one in ranges}
    series = [PlotSeries(name, (), style) for name, style in styles.items()]
    return _render(parts, series, x_label, height)


def _draw_range(one: RangeMark, axes: _Axes, y: float) -> list[_Mark]:
    low, value, high = (
        axes.x(min(axes.x_max, max(axes.x_min, v))) for v in (one.low, one.value, one.high)
    )
    title = f"{one.group}, {one.name}: {one.value:.4g} ({one.low:.4g} to {one.high:.4g})"
    return [_line(low, y, high, y, one.style), _circle(value, y, one.style, title)]


def _assign_lanes(bars: Sequence[CallBar]) -> list[tuple[int, CallBar]]:
    """The first lane that is free when a call begins."""
    ends: list[float] = []
    found = []
    for bar in sorted(bars, key=lambda one: one.start):
        lane = next((n for n, end in enumerate(ends) if end <= bar.start + 1e-6), len(ends))
        ends[lane : lane + 1] = [bar.end]
        found.append((lane, bar))
    return found


def _count(values: Sequence[float], x_min: float, width: float, bins: int) -> list[int]:
    counts = [0] * bins
    for value in values:
        counts[max(0, min(bins - 1, int((value - x_min) / width)))] += 1
    return counts


def _ticks(low: float, high: float, about: int) -> list[float]:
    step = _find_step((high - low) / about)
    first = math.ceil(low / step)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _find_step(least: float) -> float:
    if least <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(least))
    return next((f * power for f in (1, 2, 5, 10) if f * power >= least * 0.999), 10 * power)


def _round_up(value: float) -> float:
    step = _find_step(value / 5)
    return max(step, math.ceil(value / step - 1e-9) * step)


def _format(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


@dataclass(frozen=True)
class _Mark:
    """One element of the drawing; the page shows a title when it is pointed at."""

    tag: str
    style: str
    places: dict[str, float | str]
    title: str = ""
    text: str = ""


def _rect(place: tuple[float, float], size: tuple[float, float], style: str, title: str) -> _Mark:
    across = {"width": max(0.0, size[0]), "height": max(0.0, size[1])}
    return _Mark("rect", style, {"x": place[0], "y": place[1], **across}, title)


def _circle(x: float, y: float, style: str, title: str) -> _Mark:
    return _Mark("circle", style, {"cx": x, "cy": y, "r": 3.5}, title)


def _line(x1: float, y1: float, x2: float, y2: float, style: str) -> _Mark:
    return _Mark("line", style, {"x1": x1, "x2": x2, "y1": y1, "y2": y2})


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> _Mark:
    return _Mark("text", style, {"x": x, "y": y, "text-anchor": anchor}, text=text)


def _render(
    marks: Sequence[_Mark], series: Sequence[PlotSeries], label: str, height: int = _HEIGHT
) -> Markup:
    size = {"width": _WIDTH, "height": height}
    drawn = render_page("plot.svg", marks=marks, series=series, label=label, **size)
    return Markup(drawn)  # noqa: S704 - of a template that escapes
