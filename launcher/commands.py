"""The commands up, serve, explain, doctor, tune: read the settings, do the one thing."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from functools import partial

from common.errors import ProgramError, SettingsError
from common.settings import suggest
from launcher.config import (
    COMMANDS,
    ExplainSettings,
    Settings,
    TuneSettings,
    load_settings,
)
from launcher.doctor import run_doctor
from launcher.engine.terminal import Terminal
from launcher.explain import explain
from launcher.plan.prepare import prepare
from launcher.session import run
from launcher.tuning.tune import tune

_HELP = """usage: python -m launcher COMMAND [--help]

  up       start the engine, then the gateway; stop both on a signal
  serve    start the engine alone
  explain  what the engine would be told, why, and what fits into its memory
  doctor   check this host, the model and every flag before anything is started
  tune     measure what is fastest on this host, for the profile `course` to use
"""


def run_command(words: Sequence[str]) -> int:
    command, *arguments = words or ["--help"]
    if command in ("--help", "-h", "help"):
        print(_HELP, end="")
        return 0
    try:
        if command not in COMMANDS:
            raise SettingsError(f"unknown command {command}{suggest(command, COMMANDS)}")
        return _dispatch(command, load_settings(COMMANDS[command], arguments))
    except ProgramError as error:
        print(f"launcher: {error}", file=sys.stderr)
        return error.exit_code


def _dispatch(command: str, settings: Settings) -> int:
    terminal = Terminal(settings.log_format, settings.engine_log)
    terminal.configure_logging("warning" if command == "tune" else "info")
    if isinstance(settings, ExplainSettings):
        print(explain(settings, as_json=settings.json_output))
        return 0
    if command == "doctor":
        return run_doctor(settings, print)
    if isinstance(settings, TuneSettings):
        return tune(settings, partial(print, flush=True))  # minutes between two lines
    return asyncio.run(run(prepare(settings), terminal, with_gateway=command == "up"))
