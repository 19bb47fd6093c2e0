"""The record of a run: figures with the command, commit, machine and date that made them.

Whatever measures writes one with `take_record` and `write_record`; `python -m lab results` makes
docs/results.md of those kept in docs/results/.
"""

from __future__ import annotations

import functools
import json
import math
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lab.paths import ROOT
from lab.reports.output_files import write_file

_GIB = 2**30
_WORDS = ("name", "command", "commit", "machine", "date", "about")


class BadRecord(ValueError):
    """A file that is no record of a run; says what is wrong with it."""


@dataclass(frozen=True)
class Figure:
    """One number; `low` and `high` are its range, over repeats unless `note` says otherwise."""

    name: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class Record:
    """One run: `name` says what was measured, `about` in a sentence under which conditions."""

    name: str
    command: str
    commit: str
    machine: str
    date: str
    figures: tuple[Figure, ...]
    about: str = ""


def take_record(
    name: str,
    figures: Sequence[Figure],
    *,
    about: str = "",
    command: str | None = None,
    machine: str | None = None,
) -> Record:
    """Of the run that this process is; `machine` where the work was done on another one."""
    return Record(
        name=name,
        command=command or describe_command(),
        commit=describe_commit(),
        machine=machine or describe_machine(),
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        figures=tuple(figures),
        about=about,
    )


def write_record(record: Record, path: Path) -> None:
    text = json.dumps(asdict(record), indent=1, ensure_ascii=False, allow_nan=False)
    write_file(path, text + "\n")


def read_record(path: Path) -> Record:
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BadRecord(f"{path}: {error}") from None
    try:
        return parse_record(data)
    except BadRecord as error:
        raise BadRecord(f"{path}: {error}") from None


def parse_record(data: Any) -> Record:
    if not isinstance(data, dict) or not isinstance(data.get("figures"), list):
        raise BadRecord("a record is an object with a list `figures`")
    words: dict[str, Any] = {key: data.get(key, "" if key == "about" else None) for key in _WORDS}
    wrong = [key for key, word in words.items() if not isinstance(word, str)]
    if wrong:
        raise BadRecord(f"`{wrong[0]}` is missing or no text")
    unknown = data.keys() - {*_WORDS, "figures"}
    if unknown:
        raise BadRecord(f"unknown field `{min(unknown)}`")
    return Record(**words, figures=tuple(_parse_figure(row) for row in data["figures"]))


def _parse_figure(row: Any) -> Figure:
    try:
        figure = Figure(**row)
    except TypeError as error:
        raise BadRecord(f"a figure is not one: {error}") from None
    numbers = [n for n in (figure.value, figure.low, figure.high) if n is not None]
    if figure.value is None or not all(_is_number(number) for number in numbers):
        raise BadRecord(f"the figure `{figure.name}` has a value, low or high that is no number")
    if not all(isinstance(word, str) for word in (figure.name, figure.unit, figure.note)):
        raise BadRecord(f"the figure `{figure.name}` has a name, unit or note that is no text")
    return figure


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def describe_command() -> str:
    """As it can be typed again from the repository's root."""
    program, *arguments = sys.argv or [""]
    path = Path(program)
    shown = ["python", "-m", path.parent.name] if path.name == "__main__.py" else [path.name]
    return shlex.join([*shown, *arguments]).replace(f"{ROOT}/", "")


@functools.cache
def describe_commit() -> str:
    """The commit, and whether tracked files differed from it."""
    short = _read(["git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD"])
    if not short:
        return "unknown"
    changed = _read(["git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no"])
    return f"{short} with changes" if changed else short


@functools.cache
def describe_machine() -> str:
    """GPUs, processor, cores that this process may use, memory."""
    cores = len(os.sched_getaffinity(0))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / _GIB
    parts = [_processor(), f"{cores} cores", f"{memory:.0f} GiB"]
    return ", ".join([*_gpus(), *(part for part in parts if part)])


def _gpus() -> list[str]:
    names = _read(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]).splitlines()
    counts = {name: names.count(name) for name in dict.fromkeys(names)}
    return [f"{count}× {name}" if count > 1 else name for name, count in counts.items()]


def _processor() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _read(command: list[str]) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
