"""Fourteen checks of a running gateway, through the OpenAI SDK: one line each.

Eight are the course text's engine test (tokenisation, model loading, simple inference,
detokenisation, batch inference, sampling strategies, streaming, performance metrics), six are the
grader's contract in odd cases. Exit codes: 0 all passed, 1 some failed, 2 bad options or a file
that cannot be written, 3 nobody answers, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from urllib.parse import urlsplit

import httpx
import openai

from lab.options import is_address, is_key
from lab.records.record import (
    Figure,
    describe_command,
    describe_machine,
    take_record,
    write_record,
)
from lab.reports.output_files import (
    Unwritable,
    accept_every_text,
    ensure_writable,
    tame,
    write_file,
)
from lab.selftest.checked_gateway import CheckFailed, Door, Seen, open_door
from lab.selftest.contract_checks import CONTRACT_CHECKS
from lab.selftest.engine_checks import ENGINE_CHECKS

Check = Callable[[Door], Seen]
CHECKS: tuple[tuple[str, Check], ...] = (*ENGINE_CHECKS, *CONTRACT_CHECKS)
# Of what checks measure: its name in a record, its unit there, how many of those a unit here has.
_FIGURES = {
    "load_s": ("load time of the engine", "s", 1),
    "first_token_s": ("first token of a stream", "ms", 1000),
    "stream_s": ("a stream of 64 tokens", "ms", 1000),
    "latency_s": ("one token, median of 5 calls", "ms", 1000),
    "tokens_per_s": ("64 prompts in one call", "tokens/s", 1),
    "main_MiB": ("main memory of the engine", "MiB", 1),
    "GPU_MiB": ("GPU memory of the engine", "MiB", 1),
    "many_s": ("1,025 prompts in one call, 4 tokens each", "s", 1),
    "freed_s": ("from a hang-up to a free engine", "ms", 1000),
}
_GREEN, _RED, _RESET = "\x1b[32m", "\x1b[31m", "\x1b[0m"


@dataclass(frozen=True)
class Outcome:
    """One check's line."""

    name: str
    passed: bool
    text: str
    seconds: float
    figures: dict[str, float] = field(default_factory=dict)


def main(words: Sequence[str] | None = None) -> int:
    accept_every_text()
    arguments = parse_arguments(sys.argv[1:] if words is None else words)
    try:
        for name in (arguments.json, arguments.record):
            if name and name != "-":
                ensure_writable(Path(name))
        return run(arguments)
    except Unwritable as error:
        print(f"selftest: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("selftest: interrupted", file=sys.stderr)
        return 130


def run(arguments: argparse.Namespace) -> int:
    lines = sys.stderr if arguments.json == "-" else sys.stdout
    try:
        with open_door(arguments.server_url, arguments.status_url, arguments.api_key) as door:
            chosen = [(name, check) for name, check in CHECKS if fits(name, arguments.only)]
            outcomes = []
            for name, check in chosen:
                outcomes.append(perform(name, check, door))
                print(describe(outcomes[-1], coloured=lines.isatty()), file=lines, flush=True)
            model = door.model
    except (openai.APIError, httpx.HTTPError, CheckFailed) as error:
        print(f"selftest: {arguments.server_url}/v1/models: {explain(error)}", file=sys.stderr)
        return 3
    failed = sum(not outcome.passed for outcome in outcomes)
    print(f"{len(outcomes) - failed} of {len(outcomes)} passed", file=lines)
    keep(arguments, outcomes, model)
    return int(failed > 0)


def fits(name: str, only: Sequence[str]) -> bool:
    return not only or any(word.lower() in name.lower() for word in only)


def perform(name: str, check: Check, door: Door) -> Outcome:
    """Whatever a check runs into is its failure, and the next one is tried."""
    started = time.perf_counter()
    figures: dict[str, float] = {}
    try:
        seen = check(door)
        passed, text, figures = True, seen.text, seen.figures
    except CheckFailed as error:
        passed, text = False, str(error)
    except Exception as error:  # noqa: BLE001 - a strange answer can break a check anywhere
        passed, text = False, explain(error)
    seconds = time.perf_counter() - started
    return Outcome(name, passed, tame(" ".join(text.split())), seconds, figures)


def explain(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def describe(outcome: Outcome, *, coloured: bool) -> str:
    word = "ok  " if outcome.passed else "FAIL"
    if coloured:
        word = f"{_GREEN if outcome.passed else _RED}{word}{_RESET}"
    return f"{word} {outcome.name:20} {outcome.seconds:6.2f} s  {outcome.text}"


def keep(arguments: argparse.Namespace, outcomes: Sequence[Outcome], model: str) -> None:
    if arguments.json:
        packed = {
            "server_url": arguments.server_url,
            "model": model,
            "passed": all(outcome.passed for outcome in outcomes),
            "checks": [asdict(outcome) for outcome in outcomes],
        }
        text = json.dumps(packed, ensure_ascii=False, indent=1)
        if arguments.json == "-":
            print(text)
        else:
            write_file(Path(arguments.json), text + "\n")
    if arguments.record:
        passed = sum(outcome.passed for outcome in outcomes)
        count = Figure("checks passed", passed, f"of {len(outcomes)}")
        others = [build_figure(*item) for outcome in outcomes for item in outcome.figures.items()]
        machine = arguments.machine or describe_machine()
        command = describe_command().replace(arguments.api_key or "\0", "…")
        name, figures = f"Self-test of {model}", [count, *others]
        record = take_record(name, figures, command=command, machine=machine)
        write_record(record, Path(arguments.record))


def build_figure(key: str, value: float) -> Figure:
    name, unit, factor = _FIGURES[key]
    return Figure(name, round(value * factor, 2), unit)


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m lab selftest",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("--server-url", default="", metavar="URL", help="default: http://127.0.0.1:PORT")
    add("--port", type=int, default=8000, help="default: 8000")
    add(
        "--status-url",
        default="",
        metavar="URL",
        help="the launcher's status page; default: two ports above the gateway's, which is one "
        "above the engine's",
    )
    add(
        "--api-key",
        default=os.environ.get("SELFTEST_API_KEY", ""),
        metavar="KEY",
        help="for a gateway with keys; also the variable SELFTEST_API_KEY",
    )
    add("--only", nargs="+", default=(), metavar="WORD", help="checks whose name holds a word")
    add("--json", metavar="FILE", help="the outcomes as JSON; - prints them, lines go to stderr")
    add("--record", metavar="FILE", help="the figures as a record of a run, for docs/results/")
    add("--machine", default="", help="what to write down as the machine, if it is another one")
    arguments = parser.parse_args(words)
    arguments.server_url = (arguments.server_url or f"http://127.0.0.1:{arguments.port}").rstrip(
        "/"
    )
    for name, url in (
        ("server", arguments.server_url),
        ("status", arguments.status_url or arguments.server_url),
    ):
        if not is_address(url):
            parser.error(f"--{name}-url {url} is no http address, like http://127.0.0.1:8000")
    if not is_key(arguments.api_key):
        parser.error("--api-key holds characters that no HTTP header can carry")
    where = urlsplit(arguments.server_url)
    if not any(fits(name, arguments.only) for name, _ in CHECKS):
        parser.error(f"--only: no check is called like {' or '.join(arguments.only)}")
    host = f"[{where.hostname}]" if ":" in (where.hostname or "") else where.hostname
    status = f"http://{host}:{(where.port or 80) + 2}"
    arguments.status_url = (arguments.status_url or status).rstrip("/")
    return arguments  # fmt: skip
