"""What vLLM's log lines mean: how far it has got, what went wrong, what nobody needs to see."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Progress:
    stage: str
    percent: int | None = None
    detail: str = ""


_STAGES: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("reading_config", re.compile(r"non-default args")),
    ("reading_config", re.compile(r"Resolved architecture: (?P<detail>\w+)")),
    ("starting_core", re.compile(r"Initializing a V1 LLM engine")),
    ("loading_weights", re.compile(r"Starting to load model")),
    ("loading_weights", re.compile(r"Loading .*?checkpoint shards:\s+(?P<percent>\d+)% Completed")),
    ("loading_weights", re.compile(r"(?:Model l|L)oading (?:weights )?took (?P<detail>.+)")),
    ("compiling", re.compile(r"(?:Start compiling|Dynamo bytecode transform|Compiling a graph)")),
    ("compiling", re.compile(r"torch\.compile (?:takes|took) (?P<detail>[\d.]+ s)")),
    ("compiled_before", re.compile(r"Directly load the compiled graph|Directly load AOT")),
    ("sizing_cache", re.compile(r"KV cache size: (?P<detail>[\d,]+ tokens)")),
    ("capturing_graphs", re.compile(r"Capturing CUDA graphs?.*?:\s+(?P<percent>\d+)%")),
    ("capturing_graphs", re.compile(r"Graph capturing finished in (?P<detail>.+)")),
    ("warming_kernels", re.compile(r"init engine \(.*?\) took (?P<detail>[\d.]+ s)")),
    ("listening", re.compile(r"Starting vLLM (?:API )?server|Application startup complete")),
)
# Banners, argparse's usage (three hundred lines before the one that matters), and warnings about
# what is so by design on a CPU: nobody can act on them.
_NOISE = re.compile(
    r"Route: /|Available routes are|nanobind|leaked (?:instance|type|function)|\.\.\. skipped rem"
    r"|reference counting issue|api_utils\.py:\d+\]\s*[█▄▀ ]*(?:$|[█▄▀])|checkpoint shards"
    r"|Triton is (?:not )?installed|requires Triton|Enforce eager set|Inductor compilation was"
    r"|Reset SSM cache|reduce_op|triton_utils/dispatcher|hasattr\(value, |wrapper = lookup\("
    r"|^usage: |^\s{12,}[\[{]"
    r"|NUMA binding|found in LD_PRELOAD|OMP_NUM_THREADS=\d+ is|torch\.set_num_threads|Found ulimit"
)
_LEVEL = re.compile(r"\b(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")
_ORIGIN = re.compile(r"^\((?P<who>\w+)[^)]*\) ")
_STAMP = re.compile(r"(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d [\d:]+ \[[^\]]+\]\s*")
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_CHILD_KILLED = re.compile(r"^leash: child (?P<pid>\d+) was killed by (?P<signal>SIG\w+)$")
_CAUSE = re.compile(
    r"^(?:[\w.]*(?:Error|Exception|Interrupt)\b.*|.*\berror: .*|\s*Value error, .*"
    r"|.*No space left.*|Killed|.*out of memory.*)$",
    re.IGNORECASE,
)
# They say that something failed elsewhere; the elsewhere is the cause.
_ECHO = re.compile(
    r"[Ss]ee (?:root cause|stack trace)|initialization failed|EngineDeadError|leash: "
)


def clean(line: str) -> str:
    return _ANSI.sub("", line)


def read_progress(line: str) -> Progress | None:
    for stage, pattern in _STAGES:
        if match := pattern.search(line):
            found = match.groupdict()
            percent = found.get("percent")
            return Progress(stage, int(percent) if percent else None, found.get("detail") or "")
    return None


def is_noise(line: str) -> bool:
    """Informational lines, which the launcher's own progress sums up, and known clutter."""
    level = _LEVEL.search(line[:60])
    return bool(level and level[1] in ("INFO", "DEBUG")) or bool(_NOISE.search(line))


def level_of(line: str) -> str:
    match = _LEVEL.search(line[:60])
    return match[1].lower() if match else "info"


def find_killed_child(line: str) -> tuple[int, str] | None:
    match = _CHILD_KILLED.match(line)
    return (int(match["pid"]), match["signal"]) if match else None


def find_cause(lines: Iterable[str]) -> str:
    """The line that says why it died: the last error that does not just point at another."""
    bare = [_STAMP.sub("", _ORIGIN.sub("", line)).strip() for line in lines]
    causes = [line for line in bare if _CAUSE.match(line) and not _ECHO.search(line)]
    rest = [line for line in bare if line and not _NOISE.search(line) and not _ECHO.search(line)]
    chosen = (causes or rest or [""])[-1]
    return chosen.removeprefix("Value error, ").partition(" [type=")[0][:400]
