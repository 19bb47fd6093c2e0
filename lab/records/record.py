"""The record of a run: figures with the command, commit, machine and date that made them.

Whatever measures writes one with `take_record` and `write_record`; `python -m lab results` makes
docs/results.md of those kept in docs/results/.
"""

from __future__ import annotations

import functools
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

import psutil
from pydantic import ConfigDict, TypeAdapter, ValidationError

from lab.failures import BadFile
from lab.options import hide
from lab.paths import ROOT
from lab.reports.output_files import write_json

_GIB = 2**30
# Nothing but what is declared, no text for a number, and no infinity.
_EXACTLY = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)


@dataclass(frozen=True)
class RecordFigure:
    """One number; `low` and `high` are its range, over repeats unless `note` says otherwise."""

    __pydantic_config__ = _EXACTLY

    name: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    note: str = ""


@dataclass(frozen=True)
class RunRecord:
    """One run: `name` says what was measured, `about` in a sentence under which conditions."""

    __pydantic_config__ = _EXACTLY

    name: str
    command: str
    commit: str
    machine: str
    date: str
    figures: tuple[RecordFigure, ...]
    about: str = ""


_RECORD = TypeAdapter(RunRecord)


@dataclass(frozen=True)
class RunFacts:
    """What every report says of the run that it is about."""

    date: str
    commit: str
    machine: str
    command: str


def take_facts(machine: str = "", *secrets: str) -> dict[str, Any]:
    """Of the run that this process is; `machine` where the work was done on another one."""
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": describe_commit(),
        "machine": machine or describe_machine(),
        "command": hide(describe_command(), *secrets),
    }


def take_record(
    name: str,
    figures: Sequence[RecordFigure],
    *,
    about: str = "",
    command: str = "",
    machine: str = "",
) -> RunRecord:
    facts = take_facts(machine) | ({"command": command} if command else {})
    return RunRecord(name=name, figures=tuple(figures), about=about, **facts)


def write_record(record: RunRecord, path: Path) -> None:
    write_json(path, asdict(record))


def read_record(path: Path) -> RunRecord:
    try:
        return parse_record(path.read_bytes())
    except (OSError, BadFile) as error:
        raise BadFile(f"{path}: {error}") from None


def parse_record(text: bytes | str) -> RunRecord:
    try:
        return _RECORD.validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise BadFile(f"no record of a run: {where}: {first['msg']}") from None


def describe_command() -> str:
    """As it can be typed again from the repository's root."""
    program, *arguments = sys.argv or [""]
    path = Path(program)
    shown = ["python", "-m", path.parent.name] if path.name == "__main__.py" else [path.name]
    return shlex.join([*shown, *arguments]).replace(f"{ROOT}/", "")


@functools.cache
def describe_commit() -> str:
    """The commit, and whether tracked files differed from it."""
    short = run_quietly("git", "-C", str(ROOT), "rev-parse", "--short=10", "HEAD")
    if not short:
        return "unknown"
    changed = run_quietly("git", "-C", str(ROOT), "status", "--porcelain", "--untracked-files=no")
    return f"{short} with changes" if changed else short


@functools.cache
def describe_machine() -> str:
    """GPUs, processor, cores that this process may use, memory."""
    names = run_quietly("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    gpus = [f"{names.count(one)}× {one}".removeprefix("1× ") for one in dict.fromkeys(names)]
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    processors = re.findall(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)[:1]
    memory = psutil.virtual_memory().total / _GIB
    cores = f"{len(os.sched_getaffinity(0))} cores"
    return ", ".join([*gpus, *(one.strip() for one in processors), cores, f"{memory:.0f} GiB"])


def run_quietly(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
