"""What `python -m lab grade` is told, and what follows from it before anything is asked."""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import urlsplit

from common.questions import QuestionSet, read_questions
from lab import options
from lab.failures import BadOptions
from lab.launched_server import LaunchCommand
from lab.paths import OUT
from lab.reports.output_files import ensure_writable

_MOST_QUESTIONS = 1_000_000
# Options that name a file; a shell leaves the ~ of `--questions=~/file` alone.
_PATHS = ("questions", "details_out", "report_out", "record", "baseline")
# The seed entry's options for its own server, as settings of ours.
_SEED_SETTINGS = {
    "batch-size": "GATEWAY_WARMUP_PROMPTS",
    "max-input-length": "GATEWAY_MAX_INPUT_TOKENS",
    "max-new-tokens": "GATEWAY_MAX_TOKENS",
}
_SEED_ENGINE_OPTIONS = {
    "vllm-tp-size": "tensor-parallel-size",
    "vllm-dtype": "dtype",
    "vllm-max-model-len": "max-model-len",
    "vllm-max-num-seqs": "max-num-seqs",
    "vllm-gpu-mem-util": "gpu-memory-utilization",
}


def parse_arguments(words: Sequence[str], description: str | None = None) -> argparse.Namespace:
    arguments = options.parse_options(build_parser(description), words)
    arguments.url = arguments.url or f"http://{arguments.host}:{arguments.port}"
    arguments.status_url = arguments.status_url or options.find_neighbour(arguments.url)
    for name in _PATHS:
        expanded = Path(vars(arguments)[name] or "").parts[:1]
        if expanded and expanded[0].startswith("~"):
            with contextlib.suppress(RuntimeError):  # a user who is none stays as it is
                setattr(arguments, name, str(Path(vars(arguments)[name]).expanduser()))
    arguments.report_out = arguments.report_out or place_beside(arguments, ".html")
    return arguments


def place_beside(arguments: argparse.Namespace, ending: str) -> str:
    """By the details: the report `.html`, the log of a server that was started `-server.log`."""
    details = Path(arguments.details_out)
    return str(details.with_suffix(ending) if ending.startswith(".") else details.with_name(ending))


def build_parser(description: str | None = None) -> argparse.ArgumentParser:
    parser = options.build_parser("grade", description)
    _add_asking_options(parser)
    options.add_service(parser, "grade", ["--server-url", "--url"])
    _add_server_options(parser)
    _add_judging_options(parser)
    help_ = "two details files: which differences are real; nothing is asked"
    parser.add_argument("--compare", nargs=2, metavar=("BEFORE", "AFTER"), help=help_)
    return parser


def _add_asking_options(parser: argparse.ArgumentParser) -> None:
    options.add_questions(parser, "--official-test")
    positive, seconds = options.whole_number(1), options.seconds
    add = parser.add_argument_group("what is asked, and how").add_argument
    help_ = "ask so many: the first N, or the file again from its start"
    add("--count", type=positive, metavar="N", help=help_)
    help_ = "the whole list so many times in one run (default: 1)"
    add("--repeat", type=positive, default=1, metavar="N", help=help_)
    help_ = "measure so many times; five tell chance from change (default: 1)"
    add("--runs", type=positive, default=1, metavar="N", help=help_)
    help_ = "questions a call in batch mode; 0: all in one (default)"
    number = options.whole_number(0)
    add("--request-chunk-size", type=number, default=0, metavar="N", help=help_)
    help_ = "auto: what GET / says (default); ok: one question a call"
    add("--mode", choices=("auto", "batch", "ok"), default="auto", help=help_)
    help_ = "calls at a time (default: 1)"
    add("--concurrency", type=positive, default=1, metavar="N", help=help_)
    help_ = "limit for all answers of a run (default: 360)"
    add("--timeout", type=seconds, default=360.0, metavar="S", help=help_)
    help_ = "limit for GET / to name a mode (default: 420)"
    add("--ready-timeout", type=seconds, default=420.0, metavar="S", help=help_)


def _add_server_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("a server that is started").add_argument
    add("--host", default="127.0.0.1", help="default: 127.0.0.1")
    add("--port", type=options.port, default=options.GATEWAY_PORT, help="default: 8000")
    add("--no-start-server", action="store_true", help="grade a running server")
    help_ = "what it serves; its tokenizer counts the tokens (else the server's /tokenize does)"
    add("--model-path", default="", metavar="MODEL", help=help_)
    names = {**_SEED_SETTINGS, **{k: f"--set {v}" for k, v in _SEED_ENGINE_OPTIONS.items()}}
    for name, meaning in names.items():
        add(f"--{name}", metavar="VALUE", help=f"of a started server: {meaning}")
    add("--vllm-disable-warmup", action="store_true", help="a warm-up of one question")


def _add_judging_options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument_group("what comes of it").add_argument
    help_ = "the least ROUGE-L in the course reading that is no fault"
    add("--floor", type=options.share, metavar="SCORE", help=help_)
    help_ = "earlier details; really worse or slower than those is a fault"
    add("--baseline", metavar="FILE", help=help_)
    default = str(OUT / "grade.json")
    add("--details-out", default=default, metavar="FILE", help=f"JSON (default: {default})")
    add("--report-out", metavar="FILE", help="HTML report (default: beside the details)")
    options.add_record(parser)


def check_outputs(arguments: argparse.Namespace) -> None:
    """Before the work: each can be written, and none is what another needs."""
    outputs = {"--details_out": arguments.details_out, "--report_out": arguments.report_out}
    if arguments.record:
        outputs["--record"] = arguments.record
    if not arguments.no_start_server:
        outputs["the server's log"] = place_beside(arguments, "grade-server.log")
    taken = {Path(arguments.questions).resolve(): "--questions"}
    for name, path in outputs.items():
        other = taken.setdefault(Path(path).resolve(), name)
        if other != name:
            raise BadOptions(f"{name} and {other} are the same file, {path}; give it another name")
        ensure_writable(Path(path))


def choose_questions(arguments: argparse.Namespace) -> QuestionSet:
    asked = read_questions(Path(arguments.questions))
    total = (arguments.count or len(asked.pairs)) * arguments.repeat
    if total > _MOST_QUESTIONS:
        raise BadOptions(f"{total:,} questions are too many; --count or --repeat can be smaller")
    if arguments.count:
        asked = asked.take(arguments.count)
    return asked.repeat(arguments.repeat)


def build_launch_command(arguments: argparse.Namespace) -> LaunchCommand:
    where = urlsplit(arguments.url)
    given = {name.replace("_", "-"): value for name, value in vars(arguments).items()}
    environment = {key: str(given[name]) for name, key in _SEED_SETTINGS.items() if given[name]}
    if arguments.vllm_disable_warmup:
        environment["GATEWAY_WARMUP_PROMPTS"] = "1"
    words = list(arguments.launcher_options)
    for name, key in _SEED_ENGINE_OPTIONS.items():
        words += ["--set", f"{key}={given[name]}"] if given[name] else []
    host, port = where.hostname or "127.0.0.1", where.port or 80
    return LaunchCommand(host, port, arguments.model_path, words, environment)
