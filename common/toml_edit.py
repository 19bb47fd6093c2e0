"""Changes in a TOML file that people keep, such as course.toml: a table written anew, values set,
every other line as it was. What was changed is read back, and not written if it came out otherwise.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import SettingsError
from common.files import read_text, write_file

_HEADER = re.compile(r"\s*\[+\s*([\w\".-]+)")


def replace_table(path: Path, name: str, table: Mapping[str, Any]) -> None:
    """With the tables below it, at the file's end."""
    text, before = _read(path)
    kept, is_kept = [], True
    for line in text.splitlines():
        if found := _HEADER.match(line):
            is_kept = found[1] != name and not found[1].startswith(f"{name}.")
        if is_kept:
            kept.append(line)
    lines = ["\n".join(kept).rstrip(), "", *_render(name, table)]
    _write(path, "\n".join(lines).lstrip() + "\n", {**before, name: dict(table)})


def set_values(path: Path, name: str, values: Mapping[str, Any]) -> None:
    """In the table of that name, or with no name above all tables; what stands there already keeps
    its place.
    """
    text, before = _read(path)
    lines, is_inside, at = [], not name, None if name else 0
    left = dict(values)
    for line in text.splitlines():
        if found := _HEADER.match(line):
            is_inside = found[1] == name
        key = line.partition("=")[0].strip()
        if is_inside and "=" in line and key in left:
            line = f"{key} = {render_value(left.pop(key))}"  # noqa: PLW2901
        lines.append(line)
        if is_inside and line.strip():
            at = len(lines)
    if at is None:
        lines += ["", f"[{name}]"]
        at = len(lines)
    lines[at:at] = [f"{key} = {render_value(value)}" for key, value in left.items()]
    wanted = {name: {**before.get(name, {}), **values}} if name else values
    _write(path, "\n".join(lines) + "\n", {**before, **wanted})


def render_value(value: Any) -> str:
    """JSON's words are TOML's too, but for tables."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f'"{k}" = {render_value(v)}' for k, v in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)


def _render(name: str, table: Mapping[str, Any]) -> list[str]:
    """Its values first: in TOML whatever follows a table's name belongs to that."""
    tables = {key: value for key, value in table.items() if isinstance(value, dict)}
    lines = [f"[{name}]", *_render_rows({k: v for k, v in table.items() if k not in tables})]
    for key, value in tables.items():
        lines += ["", f'[{name}."{key}"]', *_render_rows(value)]
    return lines


def _render_rows(values: Mapping[str, Any]) -> list[str]:
    return [f'"{key}" = {render_value(value)}' for key, value in values.items()]


def _read(path: Path) -> tuple[str, dict[str, Any]]:
    try:
        text = read_text(path)
        return text, tomllib.loads(text)
    except FileNotFoundError:
        return "", {}
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"cannot read {path}: {error}") from None


def _write(path: Path, text: str, wanted: Mapping[str, Any]) -> None:
    try:
        is_right = tomllib.loads(text) == wanted
    except tomllib.TOMLDecodeError:
        is_right = False
    if not is_right:
        raise SettingsError(
            f"{path} is written in a way that no program here can change; by hand, it takes "
            f"{json.dumps(wanted, ensure_ascii=False)}"
        )
    write_file(path, text)
