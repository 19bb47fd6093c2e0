"""Fourteen checks of a running gateway, through the OpenAI SDK: one line each.

Eight are the course text's engine test (tokenisation, model loading, simple inference,
detokenisation, batch inference, sampling strategies, streaming, performance metrics), six are the
grader's contract in odd cases. Exit codes: 0 all passed, 1 some failed, 2 bad options or a file
that cannot be written, 3 nobody answers, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import httpx
import openai

from lab import options
from lab.failures import LabFailure
from lab.records.record import RecordFigure, RunRecord, take_facts, write_record
from lab.reports.console import GREEN, RED, paint, tame
from lab.reports.output_files import ensure_writable, write_json
from lab.selftest.checked_gateway import CheckedGateway, CheckFailed, Observation, open_gateway
from lab.selftest.contract_checks import CONTRACT_CHECKS
from lab.selftest.engine_checks import ENGINE_CHECKS

Check = Callable[[CheckedGateway], Observation]
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


class NobodyAnswers(LabFailure):
    """No gateway that serves a model is there to be checked."""

    exit_code = 3


@dataclass(frozen=True)
class CheckOutcome:
    """One check's line."""

    name: str
    passed: bool
    text: str
    seconds: float
    figures: dict[str, float] = field(default_factory=dict)


def main(words: Sequence[str]) -> int:
    arguments = parse_arguments(words)
    for name in (arguments.json, arguments.record):
        if name and name != "-":
            ensure_writable(Path(name))
    lines = sys.stderr if arguments.json == "-" else sys.stdout
    outcomes = []
    try:
        with open_gateway(arguments.url, arguments.status_url, arguments.api_key) as gateway:
            for name, check in CHECKS:
                if fits(name, arguments.only):
                    outcomes.append(perform(name, check, gateway))
                    print(describe(outcomes[-1], coloured=lines.isatty()), file=lines, flush=True)
            model = gateway.model
    except (openai.APIError, httpx.HTTPError, CheckFailed) as error:
        raise NobodyAnswers(f"{arguments.url}/v1/models: {explain(error)}") from None
    passed = sum(outcome.passed for outcome in outcomes)
    print(f"{passed} of {len(outcomes)} passed", file=lines)
    keep(arguments, outcomes, model)
    return int(passed < len(outcomes))


def fits(name: str, only: Sequence[str]) -> bool:
    return not only or any(word.lower() in name.lower() for word in only)


def perform(name: str, check: Check, gateway: CheckedGateway) -> CheckOutcome:
    """Whatever a check runs into is its failure, and the next one is tried."""
    started = time.perf_counter()
    figures: dict[str, float] = {}
    try:
        seen = check(gateway)
        passed, text, figures = True, seen.text, seen.figures
    except Exception as error:  # noqa: BLE001 - a strange answer can break a check anywhere
        passed, text = False, str(error) if isinstance(error, CheckFailed) else explain(error)
    seconds = time.perf_counter() - started
    return CheckOutcome(name, passed, tame(" ".join(text.split())), seconds, figures)


def explain(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"[:300]


def describe(outcome: CheckOutcome, *, coloured: bool) -> str:
    word, colour = ("ok  ", GREEN) if outcome.passed else ("FAIL", RED)
    shown = paint(word, colour, coloured=coloured)
    return f"{shown} {outcome.name:20} {outcome.seconds:6.2f} s  {outcome.text}"


def keep(arguments: argparse.Namespace, outcomes: Sequence[CheckOutcome], model: str) -> None:
    if arguments.json:
        packed = {
            "server_url": arguments.url,
            "model": model,
            "passed": all(outcome.passed for outcome in outcomes),
            "checks": [asdict(outcome) for outcome in outcomes],
        }
        if arguments.json == "-":
            print(json.dumps(packed, ensure_ascii=False, indent=1))
        else:
            write_json(Path(arguments.json), packed)
    if arguments.record:
        passed = sum(outcome.passed for outcome in outcomes)
        count = RecordFigure("checks passed", passed, f"of {len(outcomes)}")
        others = [build_figure(*item) for outcome in outcomes for item in outcome.figures.items()]
        facts = take_facts(arguments.machine, arguments.api_key)
        record = RunRecord(f"Self-test of {model}", figures=(count, *others), **facts)
        write_record(record, Path(arguments.record))


def build_figure(key: str, value: float) -> RecordFigure:
    name, unit, factor = _FIGURES[key]
    return RecordFigure(name, round(value * factor, 2), unit)


def parse_arguments(words: Sequence[str]) -> argparse.Namespace:
    parser = options.build_parser("selftest", __doc__)
    options.add_service(parser, "selftest", ["--server-url", "--url"])
    add = parser.add_argument
    add("--port", type=options.port, default=options.GATEWAY_PORT, help="default: 8000")
    add("--only", nargs="+", default=(), metavar="WORD", help="checks whose name holds a word")
    add("--json", metavar="FILE", help="the outcomes as JSON; - prints them, lines go to stderr")
    options.add_record(parser)
    arguments = options.parse_options(parser, words)
    if not any(fits(name, arguments.only) for name, _ in CHECKS):
        parser.error(f"--only: no check is called like {' or '.join(arguments.only)}")
    arguments.url = arguments.url or f"http://127.0.0.1:{arguments.port}"
    arguments.status_url = arguments.status_url or options.find_neighbour(arguments.url)
    return arguments
