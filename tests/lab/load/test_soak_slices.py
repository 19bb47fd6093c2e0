"""Hours in slices: what grows is found, what does not is not accused, and slices add up."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from lab.failures import BadFile
from lab.intervals import Point, fit_slope
from lab.load.run_load import find_growing
from lab.load.soak_slices import Samples, SoakSlice, fit_slopes, read_slices, write_slices


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
    line: list[Point] = [(hour, 100 * hour) for hour in range(5)]
    slope = fit_slope([line])
    assert slope is not None
    assert slope.value == pytest.approx(100)
    assert slope.points == 5

    assert list(find_growing({"engine: memory_mb": slope, "core: files": slope})) == []
    assert len(list(find_growing({"launcher: files": slope}))) == 1
    assert fit_slope([line[:2]]) is None


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
