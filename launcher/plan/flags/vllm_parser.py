"""Runs inside the engine's Python: lists or tries the flags of the vLLM that is installed there.

A program, never imported by the launcher: importing vLLM takes seconds and gigabytes of address
space. `list` prints every flag with its kind; `try` reads one argv a line (JSON) and prints the
parser's verdict on each, `null` being no objection.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import json
import sys
from typing import Any

# Where vLLM builds its parser: 0.33, 0.29 or so, before.
PLACES = (
    "vllm.entrypoints.common.cli_args",
    "vllm.entrypoints.launchers.cli_args",
    "vllm.entrypoints.openai.cli_args",
)
NESTED = {
    "compilation-config": "CompilationConfig",
    "attention-config": "AttentionConfig",
    "speculative-config": "SpeculativeConfig",
    "kernel-config": "KernelConfig",
    "structured-outputs-config": "StructuredOutputsConfig",
    "compilation-config.pass_config": "PassConfig",
}


def main() -> int:
    with contextlib.redirect_stdout(sys.stderr):  # vLLM logs while it is imported
        parser = build_parser()
        flags = list_flags(parser)
        fields = list_fields(flags)
        choices = list_choices(parser)
    if sys.argv[1] == "list":
        print(json.dumps({"flags": flags, "fields": fields, "choices": choices}))  # noqa: T201
    else:
        for line in sys.stdin:
            print(json.dumps(try_argv(parser, json.loads(line))), flush=True)  # noqa: T201
    return 0


def build_parser() -> argparse.ArgumentParser:
    """vLLM's own."""
    module = find_module(PLACES)
    utils = find_module(("vllm.utils.argparse_utils", "vllm.utils"))
    parser: argparse.ArgumentParser = module.make_arg_parser(utils.FlexibleArgumentParser())
    return parser


def find_module(names: tuple[str, ...]) -> Any:
    """The first that is there; one that is there and lacks something of its own says so."""
    for name in names:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if not f"{name}.".startswith(f"{error.name}."):
                raise
    sys.exit(f"this vLLM has none of {', '.join(names)}")


def list_flags(parser: argparse.ArgumentParser) -> dict[str, str]:
    actions: dict[str, argparse.Action] = parser._option_string_actions  # noqa: SLF001
    names = {option[2:] for option in actions if option.startswith("--") and option != "--help"}
    kinds = {name: kind_of(actions[f"--{name}"], f"no-{name}" in names) for name in names}
    negations = {f"no-{name}" for name, kind in kinds.items() if kind == "switch"}
    return {name: kinds[name] for name in sorted(names - negations)}


def kind_of(action: argparse.Action, has_negation: bool) -> str:
    if isinstance(action, argparse.BooleanOptionalAction):
        # 0.33 has `--disable-x` beside `--enable-x`, and no negation of it.
        return "switch" if has_negation else "mark"
    if action.nargs == 0:
        return "mark"
    return "list" if action.nargs in ("+", "*") else "value"


def list_fields(flags: dict[str, str]) -> dict[str, list[str]]:
    config = importlib.import_module("vllm.config")
    fields = {}
    for name, kind in NESTED.items():
        where = (
            config if hasattr(config, kind) else importlib.import_module("vllm.config.compilation")
        )
        if name.split(".")[0] in flags and hasattr(where, kind):
            fields[name] = [f.name for f in dataclasses.fields(getattr(where, kind)) if f.init]
    return fields


def list_choices(parser: argparse.ArgumentParser) -> dict[str, list[str]]:
    """What the parser itself takes of flags with a few values; and names that it takes as any
    text, and the server refuses seconds later.
    """
    actions: dict[str, argparse.Action] = parser._option_string_actions  # noqa: SLF001
    few = {
        name[2:]: sorted(map(str, action.choices))
        for name, action in actions.items()
        if name.startswith("--") and action.choices and action.nargs is None
    }
    tools = importlib.import_module("vllm.tool_parsers").ToolParserManager
    reasoning = importlib.import_module("vllm.reasoning").ReasoningParserManager
    return few | {
        "tool-call-parser": sorted(tools.list_registered()),
        "reasoning-parser": sorted(reasoning.list_registered()),
    }


def try_argv(parser: argparse.ArgumentParser, argv: list[str]) -> str | None:
    complaint = io.StringIO()
    try:
        with contextlib.redirect_stderr(complaint), contextlib.redirect_stdout(io.StringIO()):
            parser.parse_args(argv)
    except SystemExit:
        usage, _, error = complaint.getvalue().partition("error: ")
        return " ".join((error or usage).split())[:300] or "refused without a word"
    except Exception as error:  # noqa: BLE001  (whatever vLLM raises is its verdict)
        return " ".join(str(error).split())[:300]
    return None


if __name__ == "__main__":
    sys.exit(main())
