"""The lab's command line: `python -m lab grade|judge|sweep|bench|…`; help has them all.

A command's module is loaded only when the command is given, so that help is quick. What ends any
of them is here: failures, Ctrl-C, SIGTERM.
"""

from __future__ import annotations

import argparse
import importlib
import signal
import sys
from collections.abc import Callable, Sequence

from common.command_line.interpreter import is_too_old, quick_imports, refuse_interpreter
from common.errors import ProgramError
from common.project import read_version
from common.questions import BadQuestions

COMMANDS = {
    "grade": ("lab.grade.run_grade", "scores, speed and faults of a server, as the judge sees it"),
    "judge": (
        "lab.course.run_judge",
        "the course's image built, run offline, timed, graded: PASS?",
    ),
    "sweep": (
        "lab.course.run_sweep",
        "which prompt, length and form a model scores and runs best with",
    ),
    "bench": ("lab.bench.run_bench", "what the gateway costs over the engine itself"),
    "selftest": ("lab.selftest.run_selftest", "fourteen checks of a running gateway"),
    "gpu": ("lab.gpu.run_gpu", "profiles, schedulers and others side by side on this host's GPUs"),
    "load": ("lab.load.run_load", "a soak: mixed traffic and faults, every answer checked"),
    "faults": ("lab.faults.run_faults", "the fault table: each injected for real, under load"),
    "lanes": ("lab.load.run_lanes", "what a batch job costs callers who wait"),
    "attack": ("lab.load.run_attack", "what a hostile caller costs the others"),
    "fuzz": ("lab.fuzz.run_fuzz", "hostile requests by the hundred thousand: what survives them"),
    "scale": ("lab.scale.run_scale", "hundreds of engines behind one gateway, simulated and real"),
    "scheduler": ("lab.scheduler.run_scheduler", "what a step costs vLLM's scheduler and ours"),
    "results": ("lab.records.results_page", "docs/results.md from the records of runs"),
}
_BAD_OPTIONS, _INTERRUPTED = 2, 130
_EXTRA = frozenset(("jieba", "openai", "rouge_score"))


def main(words: Sequence[str] | None = None) -> int:
    given = list(sys.argv[1:] if words is None else words)
    if is_too_old("lab"):
        return _BAD_OPTIONS
    if not given or given[0] not in COMMANDS:
        build_parser().parse_args(given)  # prints help or version, or says what is wrong
    is_interruptible = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_interruptible:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C in the imports, without a traceback
    try:
        with quick_imports():
            module = importlib.import_module(COMMANDS[given[0]][0])
    except ModuleNotFoundError as error:
        if str(error.name).partition(".")[0] not in _EXTRA:
            return refuse_interpreter("lab", error)
        needed = f"it needs {error.name}, of the extra `lab`: pip install 'vllm-gateway[lab]'"
        print(f"{given[0]}: {needed}", file=sys.stderr)
        return _BAD_OPTIONS
    if is_interruptible:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, interrupt)
    return run_command(given[0], module.main, given[1:])


def run_command(name: str, command: Callable[[Sequence[str]], int], words: Sequence[str]) -> int:
    """The command's exit code, or that of the failure that ended it."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            # A terminal's encoding may lack Chinese: what it lacks is shown as an escape.
            stream.reconfigure(errors="backslashreplace")
    try:
        return command(words)
    except ProgramError as error:
        text, code = str(error), error.exit_code
    except BadQuestions as error:
        text, code = str(error), _BAD_OPTIONS
    except KeyboardInterrupt:
        text, code = "interrupted", _INTERRUPTED
    print(f"{name}: {text}", file=sys.stderr)
    return code


def interrupt(*_: object) -> None:
    """SIGTERM as Ctrl-C: a server that was started is stopped on the way out.

    By SIGINT itself, which asyncio turns into a cancellation: raised wherever the program happens
    to be, an interrupt can be swallowed. Only a shell's background job ignores SIGINT.
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        raise KeyboardInterrupt
    signal.raise_signal(signal.SIGINT)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m lab", description="Measures and judges.")
    parser.add_argument("--version", action="version", version=f"vllm-lab {read_version()}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, (_, meaning) in COMMANDS.items():
        commands.add_parser(name, help=meaning)
    return parser


if __name__ == "__main__":
    sys.exit(main())
