"""The settings of a program as a person reads them: `--help`, and a settings file to begin with."""

from __future__ import annotations

import json
import shutil
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic.fields import FieldInfo

from common.settings import ProgramSettings, name_flag, name_variable, show_default

_WIDEST = 100
_INDENT = 6
_NUMBERS = {int: "NUMBER", float: "NUMBER"}


def wants_help(arguments: Sequence[str]) -> bool:
    return "--help" in arguments or "-h" in arguments


def format_help(kind: type[ProgramSettings]) -> str:
    """Grouped, with what each flag takes and what holds without it."""
    program = str(kind.model_config["cli_prog_name"])
    width = min(_WIDEST, shutil.get_terminal_size().columns)
    example = name_variable(kind, "host") if "host" in kind.model_fields else ""
    lines = [f"usage: {program} [--flag value] …", ""]
    for paragraph in (kind.__doc__ or "").strip().split("\n\n"):
        lines += [*textwrap.wrap(" ".join(paragraph.split()), width), ""]
    lines += textwrap.wrap(
        f"A flag wins over its variable (--host: {example}), that over the settings file "
        "(--config), that over the default, which stands in brackets.",
        width,
    )
    for title, names in _group(kind):
        lines += ["", title]
        for name in names:
            lines += _describe(kind, name, width)
    return "\n".join(lines)


def format_example(*kinds: type[ProgramSettings]) -> str:
    """A settings file with every setting of these commands, at its default and commented out."""
    lines = [
        "# Every setting, at its default. Take away the # before a line, and change it.",
    ]
    seen = {"config"}
    for kind in kinds:
        for title, names in _group(kind):
            new = [name for name in names if name not in seen]
            seen.update(new)
            if new:
                lines += ["", f"# --- {title} ---"]
            for name in new:
                field = kind.model_fields[name]
                lines += ["", *textwrap.wrap(f"# {field.description}", 96, subsequent_indent="# ")]
                lines.append(f"# {name} = {_write_toml(field.default)}")
    return "\n".join(lines) + "\n"


def _group(kind: type[ProgramSettings]) -> Iterator[tuple[str, list[str]]]:
    """In the order in which they are declared; `groups` names those that begin one."""
    title, names = "Settings", list[str]()
    for name in kind.model_fields:
        if name in kind.groups:
            if names:
                yield title, names
            title, names = kind.groups[name], []
        names.append(name)
    yield title, names


def _describe(kind: type[ProgramSettings], name: str, width: int) -> list[str]:
    field = kind.model_fields[name]
    flag = name_flag(name)
    short = (kind.model_config.get("cli_shortcuts") or {}).get(flag.removeprefix("--"))
    flags = f"{flag}, --{short}" if short else flag
    taken = _name_value(name, field)
    head = f"  {flags} {taken}" if taken else f"  {flags}, {name_flag(f'no_{name}')}"
    text = f"{field.description} [{_show(field.default)}]"
    indent = " " * _INDENT
    return [head, *textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent)]


def _name_value(name: str, field: FieldInfo) -> str:
    """What follows a flag; nothing follows a switch."""
    annotation = field.annotation
    kinds = [one for one in get_args(annotation) if one is not type(None)] or [annotation]
    if annotation is bool:
        return ""
    if get_origin(annotation) is Literal:
        return "|".join(map(str, get_args(annotation)))
    if kinds[0] in _NUMBERS:
        return "SECONDS" if name.endswith("_s") else _NUMBERS[kinds[0]]
    if kinds[0] is Path:
        return "PATH"
    return "A,B,…" if get_origin(annotation) is tuple else "TEXT"


def _show(default: Any) -> str:
    if isinstance(default, bool):
        return "yes" if default else "no"
    if isinstance(default, float):
        return f"{default:g}"
    return show_default(default) or "not set"


def _write_toml(default: Any) -> str:
    if default is None:
        return "  # not set"
    if isinstance(default, tuple):
        return json.dumps(list(default))
    if isinstance(default, bool | int | float):
        return json.dumps(default)
    return json.dumps(show_default(default), ensure_ascii=False)
