"""A soak in slices: what each has counted and sampled, kept in one file until it has been hours."""

from __future__ import annotations

import itertools
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pydantic import TypeAdapter, ValidationError

from lab.failures import BadFile
from lab.intervals import Point, Slope, fit_slope
from lab.reports.output_files import write_json

_WARM_UP_S = 120.0  # caches and pools are filled in it
_FEWEST_MINUTES = 5


@dataclass(frozen=True)
class SoakSlice:
    """One run. `lives` are the minutes of each process's life, by what was measured of it."""

    date: str
    commit: str
    seconds: float
    outcomes: dict[str, int]
    hung_up: int
    recoveries: list[tuple[str, float]]
    problems: list[str]
    lives: dict[str, list[list[Point]]]


_SLICES = TypeAdapter(list[SoakSlice])


@dataclass
class Samples:
    """What processes held while a slice ran; one with another number is another life."""

    _lives: defaultdict[tuple[str, int], list[Point]] = field(
        default_factory=lambda: defaultdict(list)
    )

    def add(self, measure: str, pid: int, when: float, value: float) -> None:
        self._lives[measure, pid].append((when, value))

    def list_lives(self) -> dict[str, list[list[Point]]]:
        lives: defaultdict[str, list[list[Point]]] = defaultdict(list)
        for (measure, _), life in self._lives.items():
            rounded = [(round(when, 1), round(value, 2)) for when, value in thin_out(life)]
            if rounded:
                lives[measure].append(rounded)
        return dict(lives)


def thin_out(life: Sequence[Point]) -> list[Point]:
    """A life's minutes without its first ones: the median of each. A short life tells nothing."""
    began = life[0][0]
    kept = [point for point in life if point[0] - began >= _WARM_UP_S]
    minutes = [
        list(points)
        for _, points in itertools.groupby(kept, lambda point: int((point[0] - began) // 60))
    ]
    if len(minutes) < _FEWEST_MINUTES:
        return []
    return [
        (one[len(one) // 2][0], statistics.median(value for _, value in one)) for one in minutes
    ]


def fit_slopes(slices: Iterable[SoakSlice]) -> dict[str, Slope]:
    """By measure, how much an hour: over all lives of all slices.

    A process that is restarted begins anew, so each life has a level of its own.
    """
    lives: defaultdict[str, list[list[Point]]] = defaultdict(list)
    for one in slices:
        for measure, more in one.lives.items():
            lives[measure] += [[(when / 3600, value) for when, value in life] for life in more]
    slopes = {measure: fit_slope(all_of_them) for measure, all_of_them in lives.items()}
    return {measure: slope for measure, slope in slopes.items() if slope is not None}


def read_slices(path: Path) -> list[SoakSlice]:
    """None where there is no such file yet."""
    if not path.exists():
        return []
    try:
        return _SLICES.validate_json(path.read_bytes())
    except (OSError, ValidationError) as error:
        reason = str(error).partition("\n")[0]
        raise BadFile(f"{path}: these are no slices of a soak: {reason}") from None


def write_slices(slices: Sequence[SoakSlice], path: Path) -> None:
    write_json(path, [asdict(one) for one in slices])
