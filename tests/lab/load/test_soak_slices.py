"""Hours in slices: what grows is found, what does not is not accused, and slices add up."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

import pytest

from lab.failures import BadFile
from lab.intervals import Point, Slope, fit_slope
from lab.load.run_load import find_growing
from lab.load.soak_slices import Samples, SoakSlice, fit_slopes, read_slices, write_slices

TRIES = 1000


def sample_life(samples: Samples, *, pid: int, mb_an_hour: float, level: float) -> None:
    """Two hours, every two seconds; noise that stays for a while, as memory's does."""
    chance = random.Random(pid)
    noise = 0.0
    for when in range(0, 7200, 2):
        noise = 0.99 * noise + chance.gauss(0, 0.2)
        samples.add("gateway: memory_mb", pid, when, level + mb_an_hour * when / 3600 + noise)


def build_slice(samples: Samples) -> SoakSlice:
    lives = samples.list_lives()
    return SoakSlice("today", "abc", 7200, {"chat: good": 5}, 1, [("kill-core", 9.5)], [], lives)


@pytest.mark.parametrize(("mb_an_hour", "grows"), [(0.0, False), (3.0, False), (20.0, True)])
def test_growth_is_found_over_restarts_and_slices(mb_an_hour: float, grows: bool) -> None:
    slices = []
    for number in range(3):
        samples = Samples()
        # Each life begins elsewhere, and the later ones lower: that is no shrinking.
        sample_life(samples, pid=number, mb_an_hour=mb_an_hour, level=100 - 20 * number)
        slices.append(build_slice(samples))

    slope = fit_slopes(slices)["gateway: memory_mb"]
    assert slope.low < mb_an_hour < slope.high
    assert slope.high - slope.low < 8
    assert bool(list(find_growing({"gateway: memory_mb": slope}))) is grows


def test_first_minutes_and_short_lives_tell_nothing() -> None:
    samples = Samples()
    for when in range(0, 1200, 2):  # filled at first, then level
        samples.add("gateway: files", 1, when, min(when, 100))
    for when in range(0, 240, 2):
        samples.add("gateway: files", 2, when, when)

    (life,) = samples.list_lives()["gateway: files"]
    assert len(life) == 18
    assert {value for _, value in life} == {100}


def test_growth_of_what_is_not_ours_is_told_and_not_judged() -> None:
    line: list[Point] = [(hour, 100 * hour) for hour in range(40)]
    slope = fit_slope([line])
    assert slope is not None
    assert slope.value == pytest.approx(100)
    assert slope.points == 40

    assert list(find_growing({"engine: memory_mb": slope, "core: files": slope})) == []
    assert len(list(find_growing({"launcher: files": slope}))) == 1
    assert fit_slope([line[:2]]) is None


def test_growth_in_few_minutes_is_not_judged() -> None:
    growing = Slope(90.0, 80.0, 100.0, points=29)

    assert list(find_growing({"gateway: memory_mb": growing})) == []
    assert len(list(find_growing({"gateway: memory_mb": replace(growing, points=30)}))) == 1


def draw_line(chance: random.Random, points: int, likeness: float) -> list[Point]:
    """A level one, each point of it like the one before."""
    rest = chance.gauss(0, 1) / (1 - likeness**2) ** 0.5
    line: list[Point] = []
    for when in range(points):
        line.append((when, rest))
        rest = likeness * rest + chance.gauss(0, 1)
    return line


@pytest.mark.parametrize(
    ("lines", "points", "likeness"), [(60, 5, 0.8), (12, 5, 0.5), (24, 58, 0.95), (60, 5, 0.0)]
)
def test_interval_of_short_lines_holds_the_truth_about_as_often_as_it_says(
    lines: int, points: int, likeness: float
) -> None:
    chance = random.Random(7)
    held = 0
    for _ in range(TRIES):
        slope = fit_slope([draw_line(chance, points, likeness) for _ in range(lines)])
        assert slope is not None
        held += slope.low <= 0 <= slope.high

    assert held >= 0.9 * TRIES


def test_slices_come_back_as_they_were_kept(tmp_path: Path) -> None:
    samples = Samples()
    sample_life(samples, pid=1, mb_an_hour=1, level=50)
    path = tmp_path / "slices.json"
    assert read_slices(path) == []

    write_slices([build_slice(samples)], path)
    kept = read_slices(path)
    write_slices([*kept, build_slice(samples)], path)
    assert [one.outcomes for one in read_slices(path)] == [{"chat: good": 5}] * 2
    assert fit_slopes(read_slices(path)).keys() == {"gateway: memory_mb"}

    path.write_text(json.dumps([{"date": "today"}]), encoding="utf-8")
    with pytest.raises(BadFile, match="no slices of a soak"):
        read_slices(path)
