"""What each command does: read its settings, do the one thing."""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from functools import partial

from common.command_line.help import format_example, format_help, wants_help
from common.command_line.output import show
from common.errors import ProgramError, SettingsError
from common.project import read_version
from common.settings import build_schema, suggest
from launcher.config import (
    COMMANDS,
    ExplainSettings,
    LauncherSettings,
    TuneSettings,
    load_settings,
)
from launcher.doctor import run_doctor
from launcher.engine.terminal import Terminal
from launcher.explain import explain
from launcher.host_resources import hold_gpus
from launcher.nodes.worker import run_worker
from launcher.plan.prepare import prepare
from launcher.plan.spreading import check_nodes
from launcher.sections import find_places, list_engines
from launcher.session import run
from launcher.tuning.tune import tune

_HELP = """usage: python -m launcher COMMAND [--help]

  up          start the engine, then the gateway; stop both on a signal
  serve       start the engine alone
  explain     what the engine would be told, why, and what fits into its memory
  doctor      check this host, the model and every flag before anything is started
  tune        measure what is fastest on this host, for the profile `course` to use

  completion  a script for bash, zsh or fish that completes `vllm-launcher`
  example     a settings file with every setting, at its default
  schema      the JSON schema of the settings file
  --version   which version this is
"""


def run_command(words: Sequence[str]) -> int:
    command, *arguments = words or ["--help"]
    try:
        if command in COMMANDS and wants_help(arguments):
            show([format_help(COMMANDS[command])])
            return 0
        if command in COMMANDS:
            return _dispatch(command, load_settings(COMMANDS[command], arguments))
        show([_describe(command, arguments)])
    except ProgramError as error:
        print(f"launcher: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _describe(command: str, arguments: Sequence[str]) -> str:
    """What the launcher says of itself."""
    if command in ("--help", "-h", "help"):
        return _HELP.rstrip()
    if command == "--version":
        return f"vllm-launcher {read_version()}"
    if command == "schema":
        return json.dumps(build_schema(*COMMANDS.values()), indent=2, ensure_ascii=False)
    if command == "example":
        return format_example(*COMMANDS.values()).rstrip()
    if command == "completion":
        # Imported late: its library is of no use to anything else.
        from common.command_line.completion import build_parser, complete  # noqa: PLC0415

        others = {
            "example": "Prints a settings file with every setting.",
            "schema": "Prints the JSON schema of the settings file.",
        }
        return complete(arguments, build_parser("vllm-launcher", COMMANDS, others))
    known = (*COMMANDS, "completion", "example", "schema")
    raise SettingsError(f"unknown command {command}{suggest(command, known)}")


def _dispatch(command: str, settings: LauncherSettings) -> int:
    terminal = Terminal(settings.log_format, settings.engine_log)
    terminal.configure_logging("warning" if command == "tune" else "info")
    check_hosts(command, settings)
    if isinstance(settings, ExplainSettings):
        engines = list_engines(settings)
        show(explain(engines, as_json=settings.json_output, is_long=settings.all_options))
        return 0
    if command == "doctor":
        return run_doctor(list_engines(settings), partial(print, flush=True), sys.stderr)
    if settings.join and command in ("up", "serve"):
        return asyncio.run(run_worker(settings, terminal))
    if command != "up" and (settings.engine or settings.copies > 1):
        raise SettingsError(
            f"copies and [[engine]] sections are for up, doctor and explain; {command} takes one "
            "engine"
        )
    with hold_gpus(settings, lambda one: find_places(prepare(one))) as placed:
        if isinstance(placed, TuneSettings):
            return tune(placed, partial(print, flush=True))  # minutes between two lines
        prepared = [prepare(one) for one in list_engines(placed)]
        return asyncio.run(run(prepared, terminal, with_gateway=command == "up"))


def check_hosts(command: str, settings: LauncherSettings) -> None:
    """Which commands make sense for an engine on several."""
    check_nodes(settings)
    if settings.join and command in ("explain", "tune"):
        raise SettingsError(
            f"{command} is for the head, which plans for all hosts; doctor compares"
        )
    if settings.nodes > 1 and command == "tune":
        raise SettingsError("tune measures on one host; leave LAUNCHER_NODES out")
    is_alone = not settings.engine and settings.copies == settings.nodes == 1
    if settings.gpu_locks and (settings.join or not is_alone):
        raise SettingsError(
            "LAUNCHER_GPU_LOCKS is for launchers of one engine on one host: leave it out, or "
            "[[engine]], copies, nodes and join"
        )
