"""Plots as inline SVG: drawn here, so that a report is one file and asks nobody for anything.

Colours come from the page's CSS (classes `a`, `b`, `bad`, `dim`), so they follow light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_WIDTH, _HEIGHT = 460, 250
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 26, 38
_MOST_LANES_IN_FULL = 24


@dataclass(frozen=True)
class Series:
    """Values under a name; `style` is a class of the page's CSS."""

    name: str
    values: Sequence[float]
    style: str


@dataclass(frozen=True)
class Bar:
    """One named length."""

    name: str
    value: float
    style: str
    note: str = ""


@dataclass(frozen=True)
class Span:
    """From when to when, in which group."""

    group: int
    start: float
    end: float
    style: str
    title: str


@dataclass(frozen=True)
class Dot:
    """One value over another; a hollow one is no success."""

    x: float
    y: float
    is_hollow: bool
    title: str


@dataclass(frozen=True)
class Cloud:
    """Dots under a name."""

    name: str
    dots: Sequence[Dot]
    style: str


@dataclass(frozen=True)
class Range:
    """A value with its interval; those of one `group` stand close together under its name."""

    group: str
    name: str
    value: float
    low: float
    high: float
    style: str


@dataclass(frozen=True)
class _Frame:
    """Places of values inside the axes."""

    x_max: float
    y_max: float
    height: int = _HEIGHT
    x_min: float = 0.0

    def x(self, value: float) -> float:
        share = (value - self.x_min) / ((self.x_max - self.x_min) or 1)
        return _LEFT + share * (_WIDTH - _LEFT - _RIGHT)

    def y(self, value: float) -> float:
        return self.height - _BOTTOM - value / (self.y_max or 1) * (self.height - _TOP - _BOTTOM)


def draw_histogram(
    series: Sequence[Series],
    *,
    x_label: str,
    x_max: float,
    bins: int,
    x_min: float = 0.0,
    y_label: str = "answers",
) -> str:
    """The series' bars stand side by side in each bin."""
    width = (x_max - x_min) / bins
    counts = [_count(one.values, x_min, width, bins) for one in series]
    frame = _Frame(x_max, _round_up(max((max(row) for row in counts), default=1)), x_min=x_min)
    parts = _axes(frame, x_label, y_label, _format_plain)
    slot = (frame.x(x_min + width) - frame.x(x_min)) / len(series)
    for place, (one, row) in enumerate(zip(series, counts, strict=True)):
        for number, count in enumerate(row):
            low = x_min + number * width
            left, top = frame.x(low) + place * slot + 0.5, frame.y(count)
            title = f"{one.name}: {count} between {low:g} and {low + width:g}"
            size = (slot - 1, frame.y(0) - top)
            parts.append(_rect((left, top), size, one.style, title))
    return _wrap(parts, series, f"{x_label}: " + ", ".join(one.name for one in series))


def draw_bars(bars: Sequence[Bar], *, unit: str) -> str:
    """Named horizontal bars with their figures."""
    row, label_left = 40, 6
    height = row * len(bars) + 8
    longest = max((bar.value for bar in bars), default=1) or 1
    parts = []
    for number, bar in enumerate(bars):
        top = number * row + 4
        length = max(2.0, bar.value / longest * (_WIDTH - 2 * label_left))
        parts.append(_text(label_left, top + 13, bar.name, "start"))
        figure = f"{_format_plain(bar.value)} {unit}" + (f" · {bar.note}" if bar.note else "")
        parts.append(_text(_WIDTH - label_left, top + 13, figure, "end", "dim"))
        title = f"{bar.name}: {figure}"
        parts.append(_rect((label_left, top + 19), (length, 12), bar.style, title))
    return _wrap(parts, (), "speed", height)


def draw_spans(spans: Sequence[Span], *, groups: int, x_label: str, limit: float | None) -> str:
    """Each call as a bar from its start to its end; one band a run, one lane a call at a time."""
    end = max((span.end for span in spans), default=1.0)
    if limit is not None and limit <= end * 1.25:
        end = max(end, limit)
    else:
        limit = None
    lanes = [_assign_lanes([span for span in spans if span.group == g]) for g in range(groups)]
    lane_counts = [max((lane for lane, _ in row), default=0) + 1 for row in lanes]
    total = sum(lane_counts) + groups - 1
    lane_height = min(26.0, max(2.0, 190 / max(1, total)))
    first = 6.0 if limit is None else float(_TOP)
    height = int(first + _BOTTOM + total * lane_height)
    frame = _Frame(_round_up(end), 1, height)
    parts = _x_axis(frame, x_label, _format_plain)
    top = first
    for number, row in enumerate(lanes):
        middle = top + lane_counts[number] * lane_height / 2 + 4
        if groups > 1:
            parts.append(_text(_LEFT - 8, middle, f"run {number + 1}", "end", "dim"))
        for lane, span in row:
            left, right = frame.x(span.start), frame.x(span.end)
            size = max(1.0, lane_height - (2 if total <= _MOST_LANES_IN_FULL else 0.4))
            place = top + lane * lane_height
            across = max(1.5, right - left - 0.5)
            parts.append(_rect((left, place), (across, size), span.style, span.title))
        top += (lane_counts[number] + 1) * lane_height
    if limit is not None:
        x = frame.x(limit)
        parts.append(f'<line class="bad" x1="{x:.1f}" x2="{x:.1f}" y1="4" y2="{frame.y(0):.1f}"/>')
        parts.append(_text(x - 4, 14, "limit", "end", "bad"))
    return _wrap(parts, (), x_label, height)


def draw_cloud(
    clouds: Sequence[Cloud], *, x_label: str, y_label: str, limit: float | None, limit_name: str
) -> str:
    """Dots from nought; what lies far above the limit is drawn at the upper edge."""
    dots = [dot for cloud in clouds for dot in cloud.dots]
    highest = max((dot.y for dot in dots if math.isfinite(dot.y)), default=1.0)
    top = highest if limit is None else min(highest, limit * 1.5)
    frame = _Frame(
        _round_up(max((dot.x for dot in dots), default=1.0)), _round_up(max(top, limit or 0.0))
    )
    parts = _axes(frame, x_label, y_label, _format_plain)
    if limit is not None:
        y = frame.y(limit)
        edges = f'x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"'
        parts.append(f'<line class="bad" {edges}/>')
        parts.append(_text(_LEFT + 4, y - 4, limit_name, "start", "bad"))
    for cloud in clouds:
        for dot in cloud.dots:
            style = f"{cloud.style} hollow" if dot.is_hollow else cloud.style
            place = frame.x(dot.x), frame.y(min(dot.y, frame.y_max))
            parts.append(_circle(place, style, dot.title))
    series = [Series(cloud.name, (), cloud.style) for cloud in clouds]
    return _wrap(parts, series, f"{y_label} over {x_label}")


def draw_ranges(
    ranges: Sequence[Range], *, centre: float, band: float, x_label: str, widest: float
) -> str:
    """Each value as a dot on its interval; a band around the centre; all within `widest` of it."""
    groups = list(dict.fromkeys(one.group for one in ranges))
    lanes = {group: [one for one in ranges if one.group == group] for group in groups}
    head, lane, first = 20, 13, 8
    height = first + sum(head + lane * len(row) + 6 for row in lanes.values()) + _BOTTOM
    far = max((abs(v - centre) for one in ranges for v in (one.low, one.high)), default=band)
    reach = min(widest, max(far, band) * 1.1)
    frame = _Frame(centre + reach, 1, height, centre - reach)
    base = frame.y(0)
    shade = (frame.x(centre - band), first), (frame.x(centre + band) - frame.x(centre - band),
                                              base - first)  # fmt: skip
    parts = [_rect(*shade, "band", f"within {band:.0%}")]
    x = frame.x(centre)
    parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{first}" y2="{base:.1f}"/>')
    parts += _x_axis(frame, x_label, lambda value: f"{value:.4g}")
    top = first
    for group, row in lanes.items():
        parts.append(_text(6, top + 13, group, "start"))
        for number, one in enumerate(row):
            parts += _draw_range(one, frame, top + head + number * lane + 4)
        top += head + lane * len(row) + 6
    styles = {one.name: one.style for one in ranges}
    series = [Series(name, (), style) for name, style in styles.items()]
    return _wrap(parts, series, x_label, height)


def _draw_range(one: Range, frame: _Frame, y: float) -> list[str]:
    low, value, high = (
        frame.x(min(frame.x_max, max(frame.x_min, v))) for v in (one.low, one.value, one.high)
    )
    title = f"{one.group}, {one.name}: {one.value:.4g} ({one.low:.4g} to {one.high:.4g})"
    line = f'<line class="{one.style}" x1="{low:.1f}" x2="{high:.1f}" y1="{y:.1f}" y2="{y:.1f}"/>'
    return [line, _circle((value, y), one.style, title)]


def _assign_lanes(spans: Sequence[Span]) -> list[tuple[int, Span]]:
    """The first lane that is free when a call begins."""
    ends: list[float] = []
    found = []
    for span in sorted(spans, key=lambda one: one.start):
        lane = next((n for n, end in enumerate(ends) if end <= span.start + 1e-6), len(ends))
        if lane == len(ends):
            ends.append(0.0)
        ends[lane] = span.end
        found.append((lane, span))
    return found


def _count(values: Sequence[float], x_min: float, width: float, bins: int) -> list[int]:
    counts = [0] * bins
    for value in values:
        counts[max(0, min(bins - 1, int((value - x_min) / width)))] += 1
    return counts


def _axes(frame: _Frame, x_label: str, y_label: str, show: Callable[[float], str]) -> list[str]:
    parts = []
    for value in _ticks(0, frame.y_max, 4):
        y = frame.y(value)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(_text(_LEFT - 6, y + 4, show(value), "end", "dim"))
    parts.append(_text(4, 13, y_label, "start", "dim"))
    return parts + _x_axis(frame, x_label, show)


def _x_axis(frame: _Frame, label: str, show: Callable[[float], str]) -> list[str]:
    base = frame.y(0)
    parts = [
        f'<line class="axis" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{base:.1f}" y2="{base:.1f}"/>'
    ]
    parts += [
        _text(frame.x(value), base + 15, show(value), "middle", "dim")
        for value in _ticks(frame.x_min, frame.x_max, 5)
    ]
    parts.append(_text(_WIDTH - _RIGHT, frame.height - 6, label, "end", "dim"))
    return parts


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


def _format_plain(value: float) -> str:
    if value >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def _rect(place: tuple[float, float], size: tuple[float, float], style: str, title: str) -> str:
    (x, y), (width, height) = place, (max(0.0, size[0]), max(0.0, size[1]))
    return (
        f'<rect class="{style}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" '
        f'height="{height:.1f}"><title>{escape(title)}</title></rect>'
    )


def _circle(place: tuple[float, float], style: str, title: str) -> str:
    return (
        f'<circle class="{style}" cx="{place[0]:.1f}" cy="{place[1]:.1f}" r="3.5">'
        f"<title>{escape(title)}</title></circle>"
    )


def _text(x: float, y: float, text: str, anchor: str, style: str = "") -> str:
    mark = f' class="{style}"' if style else ""
    return f'<text{mark} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}">{escape(text)}</text>'


def _wrap(parts: Sequence[str], series: Sequence[Series], label: str, height: int = _HEIGHT) -> str:
    keys = "".join(f'<span><i class="{s.style}"></i>{escape(s.name)}</span>' for s in series)
    legend = f'<div class="legend">{keys}</div>' if keys else ""
    return (
        f'{legend}<svg viewBox="0 0 {_WIDTH} {height}" role="img" aria-label="{escape(label)}">'
        f"{''.join(parts)}</svg>"
    )
