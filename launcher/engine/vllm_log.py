"""What vLLM's log lines mean: how far it has got, what went wrong, what nobody needs to see.

Callers' texts can stand in them, so every pattern takes a time that grows with the line and no
faster (`tests/test_patterns.py`).
"""

from __future__ import annotations

import json
import re
import signal
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
    ("loading_weights", re.compile(r"checkpoint shards:\s++(?P<percent>\d+)% Completed")),
    ("loading_weights", re.compile(r"(?:Model l|L)oading (?:weights )?took (?P<detail>.+)")),
    ("compiling", re.compile(r"(?:Start compiling|Dynamo bytecode transform|Compiling a graph)")),
    ("compiling", re.compile(r"torch\.compile (?:takes|took) (?P<detail>[\d.]+ s)")),
    ("compiled_before", re.compile(r"Directly load the compiled graph|Directly load AOT")),
    ("sizing_cache", re.compile(r"KV cache size: (?P<detail>[\d,]+ tokens)")),
    ("capturing_graphs", re.compile(r"Capturing CUDA graphs?[^:]{0,99}+:\s++(?P<percent>\d+)%")),
    ("capturing_graphs", re.compile(r"Graph capturing finished in (?P<detail>.+)")),
    ("warming_kernels", re.compile(r"init engine \([^)]{0,200}+\) took (?P<detail>[\d.]+ s)")),
    ("listening", re.compile(r"Starting vLLM (?:API )?server|Application startup complete")),
)
# Banners, argparse's usage (three hundred lines before the one that matters), and warnings about
# what is so by design on a CPU: nobody can act on them.
_NOISE = re.compile(
    r"Route: /|Available routes are|nanobind|leaked (?:instance|type|function)|\.\.\. skipped rem"
    r"|reference counting issue|api_utils\.py:\d+\]\s*+(?:$|[█▄▀])|checkpoint shards"
    r"|Triton is (?:not )?installed|requires Triton|Enforce eager set|Inductor compilation was"
    r"|Reset SSM cache|reduce_op|triton_utils/dispatcher|hasattr\(value, |wrapper = lookup\("
    r"|^usage: |^\s{12,}[\[{]"
    r"|Using custom scheduler class"
    r"|NUMA binding|found in LD_PRELOAD|OMP_NUM_THREADS=\d+ is|torch\.set_num_threads|Found ulimit"
)
_LEVEL = re.compile(r"\b(DEBUG|INFO|WARNING|ERROR|CRITICAL)\b")
_ORIGIN = re.compile(r"^\((?P<who>\w++)[^)]*+\) ")
_STAMP = re.compile(
    r"(?:DEBUG|INFO|WARNING|ERROR|CRITICAL) \d\d-\d\d [\d:]{1,20}+ \[[^\]]{1,200}+\]\s*"
)
_LINE = re.compile(
    r"^(?:\((?P<process>\w+)(?: pid=(?P<pid>\d+))?\) )?"
    r"(?:(?P<level>DEBUG|INFO|WARNING|ERROR|CRITICAL)"
    r"(?: \d\d-\d\d [\d:]+ \[(?P<place>[^\]]+)\]\s*|:\s+))?(?P<message>.*)$"
)
# `cmpl-<X-Request-Id>-<place in the list>`, and in its core eight digits more.
_REQUEST = re.compile(
    r"^(?:(?P<inner>Added request)|Received request|Generated response|Request)"
    r" (?P<id>(?P<kind>[a-z]+)-[\w.:-]+)"
)
# Its beginning is told twice; the other line is three times as long, with the sampling in it.
_RECEIVED = "Received request "
_SCHEDULER = re.compile(r"Decode scheduler: (?P<state>on|off|gave up)\b[^:]*(?:: (?P<reason>.+))?$")
_ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")
_CORE_DEAD = re.compile(
    r"EngineCore (?:failed to start|encountered a fatal error|encountered an issue)\."
)
_ACTOR_DIED = re.compile(r"The actor died unexpectedly before finishing this task")
_ACTOR_FACT = re.compile(r"(?P<name>class_name|actor_id|pid|name|namespace|ip): (?P<value>\S++)")
_CHILD_KILLED = re.compile(r"^parent_death: child (?P<pid>\d+) was killed by (?P<signal>SIG\w+)$")
# What a core says of its workers; the same words in a prompt that is logged say nothing.
_EXECUTOR = re.compile(
    r"^(?:\(\w++[^)]{0,200}+\) )?+ERROR \d\d-\d\d [\d:]{1,20}+ "
    r"\[(?:[\w.]{1,99}+/){0,9}+(?:multiproc_executor|ray_executor_v2)\.py:\d{1,9}+\] "
)
# In a log of objects.
_EXECUTOR_NAMES = ("vllm.v1.executor.multiproc_executor", "vllm.v1.executor.ray_executor_v2")
_WORKER_KILLED = re.compile(
    r"^Worker proc (?P<name>[\w-]{1,99}+) died unexpectedly \(exit code: -(?P<number>\d{1,2})\)"
)
_RAY_WORKER_DIED = re.compile(
    r"^RayWorkerProc rank=\[(?P<ranks>[\d, ]{1,99}+)\] died unexpectedly,"
)
_SIGNAL_MEANS = {
    "SIGILL": (
        "it used an instruction that this CPU does not have or that its kernel refuses, as it may "
        "refuse AMX; --set dtype=float32 does without AMX"
    ),
}
_CAUSE = re.compile(
    r"^(?:[\w.]*(?:Error|Exception|Interrupt)\b.*|.*\berror: .*|\s*Value error, .*"
    r"|.*No space left.*|Killed|.*out of memory.*)$",
    re.IGNORECASE,
)
# They say that something failed elsewhere; the elsewhere is the cause.
_ECHO = re.compile(
    r"[Ss]ee (?:root cause|stack trace)|initialization failed|EngineDeadError|parent_death: "
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


@dataclass(frozen=True)
class SchedulerState:
    """What the launcher's own scheduler, if the engine has it, says of itself."""

    state: str  # "on", "off" or "gave up"
    reason: str = ""


def read_scheduler(line: str) -> SchedulerState | None:
    match = _SCHEDULER.search(line)
    return SchedulerState(match["state"], match["reason"] or "") if match else None


def is_noise(line: str) -> bool:
    """Informational lines, which the launcher's own progress sums up, and known clutter."""
    level = _LEVEL.search(line[:60])
    return bool(level and level[1] in ("INFO", "DEBUG")) or bool(_NOISE.search(line))


def is_request(line: str) -> bool:
    """Tells that a request began or failed; there are such lines only if the engine logs them."""
    message = _find_parts(line)["message"]
    return bool(_REQUEST.match(message)) and not message.startswith(_RECEIVED)


def level_of(line: str) -> str:
    match = _LEVEL.search(line[:60])
    return match[1].lower() if match else "info"


def split_line(line: str) -> dict[str, str | int]:
    """Its parts, for a log of objects: which process, how bad, where, what, which request."""
    parts = _find_parts(clean(line))
    row: dict[str, str | int] = {"level": level_of(line), "message": parts["message"]}
    if parts["process"]:
        row["process"] = parts["process"]
    if parts["pid"]:
        row["pid"] = int(parts["pid"])
    if parts["place"]:
        row["logger"] = parts["place"]
    if request := _REQUEST.match(parts["message"]):
        row["engine_request_id"] = name = request["id"].rstrip(".:")
        kind = request["kind"]
        row["request_id"] = _find_request_id(name, kind, is_inner=bool(request["inner"]))
    return row


def _find_parts(line: str) -> dict[str, str]:
    match = _LINE.match(line)
    parts = dict.fromkeys(_LINE.groupindex, "") | {"message": line}
    return match.groupdict("") if match else parts


def _find_request_id(name: str, kind: str, *, is_inner: bool) -> str:
    """The id that the gateway sent, without what vLLM put around it."""
    own = name.removeprefix(f"{kind}-")
    if is_inner:
        own = re.sub(r"-[0-9a-f]{8}$", "", own)
    return re.sub(r"-\d+$", "", own) if kind == "cmpl" else own


def is_core_dead(line: str) -> bool:
    """What follows is its API server's end, as a rule: one that still waits for its core's first
    word may stay for ever.
    """
    return bool(_CORE_DEAD.search(line))


@dataclass(frozen=True)
class Killed:
    """A process of the engine's that a signal has ended, or a worker of Ray's that is no more."""

    signal: str  # empty: of a worker of Ray's nobody tells
    pid: int | None = None
    name: str = ""  # a worker's, which its core knows by that alone

    def __str__(self) -> str:
        who = f"worker {self.name}" if self.name else f"process {self.pid}"
        if not self.signal:
            return f"its {who} died"
        means = _SIGNAL_MEANS.get(self.signal)
        return f"its {who} was killed by {self.signal}" + (f": {means}" if means else "")


def find_killed(line: str) -> Killed | None:
    """The server's own child, by the word of `parent_death.py`; its core's, by that of vLLM."""
    if child := _CHILD_KILLED.match(line):
        return Killed(child["signal"], int(child["pid"]))
    said = _read_executor(line)
    if of_ray := _RAY_WORKER_DIED.match(said):
        return Killed("", name=f"RayWorkerProc rank {of_ray['ranks']}")
    worker = _WORKER_KILLED.match(said)
    if worker is None:
        return None
    number = int(worker["number"])
    known = number in set(signal.Signals)
    return Killed(signal.Signals(number).name if known else f"signal {number}", name=worker["name"])


def _read_executor(line: str) -> str:
    """What an error says that the executor itself tells of, in either of vLLM's formats."""
    if "Worker proc " not in line and "RayWorkerProc " not in line:
        return ""
    if not line.startswith("{"):
        bare = clean(line)
        place = _EXECUTOR.match(bare)
        return bare[place.end() :] if place else ""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return ""
    is_its = row.get("levelname") == "ERROR" and row.get("name") in _EXECUTOR_NAMES
    return str(row.get("message", "")) if is_its else ""


@dataclass(frozen=True)
class LostActor:
    """A worker of Ray's that is no more, in Ray's own words."""

    host: str
    pid: int | None
    name: str
    why: str
    has_lost_host: bool


def find_lost_actor(lines: Iterable[str]) -> LostActor | None:
    """The last of which Ray says where it was."""
    found: LostActor | None = None
    facts: dict[str, str] | None = None
    for line in lines:
        bare = _STAMP.sub("", _ORIGIN.sub("", clean(line))).strip()
        if _ACTOR_DIED.search(bare):
            facts = {}
        elif facts is not None and (fact := _ACTOR_FACT.fullmatch(bare)):
            facts[fact["name"]] = fact["value"]
        elif facts is not None and bare:
            if "ip" in facts:
                pid = facts.get("pid", "")
                has_lost_host = "its node has died" in bare
                name = facts.get("class_name", "")
                where = facts["ip"], int(pid) if pid.isdecimal() else None, name
                found = LostActor(*where, bare[:400], has_lost_host)
            facts = None
    return found


def find_cause(lines: Iterable[str]) -> str:
    """The line that says why it died: the last error that does not just point at another."""
    bare = [_STAMP.sub("", _ORIGIN.sub("", line)).strip() for line in lines]
    causes = [line for line in bare if _CAUSE.match(line) and not _ECHO.search(line)]
    rest = [line for line in bare if line and not _NOISE.search(line) and not _ECHO.search(line)]
    chosen = (causes or rest or [""])[-1]
    return chosen.removeprefix("Value error, ").partition(" [type=")[0][:400]
