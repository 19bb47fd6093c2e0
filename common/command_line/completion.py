"""Shell completion for every program here: a script for bash, zsh or fish, by shtab."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import shtab
from pydantic_settings import CliSettingsSource

from common.errors import SettingsError
from common.settings import ProgramSettings, name_flag, suggest

SHELLS = ("bash", "zsh", "fish")


def complete(words: Sequence[str], parser: argparse.ArgumentParser) -> str:
    """The script that `completion SHELL` prints; `words` are what follows `completion`."""
    if len(words) != 1 or words[0] not in SHELLS:
        near = suggest(words[0], SHELLS) if words else ""
        raise SettingsError(f"completion takes one shell of {', '.join(SHELLS)}{near}")
    return shtab.complete(parser, shell=words[0])


def build_parser(
    program: str,
    commands: Mapping[str, type[ProgramSettings]],
    others: Mapping[str, str],
    *,
    settings: type[ProgramSettings] | None = None,
) -> argparse.ArgumentParser:
    """Of a program whose commands have settings as flags; `others` have none, only a meaning.
    `settings` are the flags that need no command.
    """
    parents = [build_flag_parser(settings)] if settings else []
    parser = argparse.ArgumentParser(prog=program, parents=parents, add_help=not parents)
    subparsers = parser.add_subparsers()
    for command, kind in commands.items():
        flags = build_flag_parser(kind)
        subparsers.add_parser(command, parents=[flags], add_help=False, help=kind.__doc__)
    for command, meaning in others.items():
        subparsers.add_parser(command, help=meaning)
    completion = subparsers.add_parser("completion", help="Prints a script for a shell.")
    completion.add_argument("shell", choices=SHELLS)
    return parser


def build_flag_parser(kind: type[ProgramSettings]) -> argparse.ArgumentParser:
    """The settings as flags, with what each takes: a name of a few, a file, anything."""
    parser: argparse.ArgumentParser = CliSettingsSource[Any](kind).root_parser
    fields = {name_flag(name): field.annotation for name, field in kind.model_fields.items()}
    for action in parser._actions:  # noqa: SLF001 — argparse has no public list of them
        for kind_of_value in map(fields.get, action.option_strings):
            if get_origin(kind_of_value) is Literal:
                action.choices = get_args(kind_of_value)
            elif kind_of_value is Path or Path in get_args(kind_of_value):
                action.complete = shtab.FILE  # type: ignore[attr-defined]
    return parser
