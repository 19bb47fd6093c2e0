"""Which flags `vllm serve` knows, and what became of those that other versions had.

Data: `flags.toml` (every flag of one version) and `flag_changes.toml` (renamed, removed, not there
yet). Whatever is installed is the judge: another version than the one in the file is asked itself.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import ProgramError, SettingsError
from common.files import write_file
from common.settings import suggest

_FOLDER = Path(__file__).parent
_PARSER = _FOLDER / "vllm_parser.py"
_PARSER_TIMEOUT_S = 120
KINDS = ("value", "switch", "mark", "list")


@dataclass(frozen=True)
class Flags:
    """The flags of one version of vLLM."""

    version: str
    kinds: dict[str, str]
    fields: dict[str, list[str]] = field(default_factory=dict)
    choices: dict[str, list[str]] = field(default_factory=dict)

    def kind(self, name: str) -> str:
        return self.kinds.get(name, "value")

    def resolve(self, key: str) -> str:
        """The option that a user's key means; an unknown one is refused."""
        head, dot, tail = key.partition(".")
        name = head.strip().lstrip("-").replace("_", "-") + dot + tail
        self.check(name, origin="--set")
        return name

    def check(self, name: str, *, origin: str) -> None:
        head, _, tail = name.partition(".")
        if head not in self.kinds:
            change = find_change(head)
            if change:
                raise SettingsError(f"{origin} {head}: {change['note']}")
            raise SettingsError(
                f"{origin} {head}: vLLM {self.version} has no such option"
                f"{suggest(head, self.kinds)}"
            )
        if tail:
            self._check_field(head, tail, origin)

    def check_value(self, name: str, value: Any, *, origin: str) -> None:
        """For flags whose values are a few names."""
        known = self.choices.get(name)
        if known and str(value) not in known:
            near = suggest(str(value), known) or f" (it knows {', '.join(known)})"
            raise SettingsError(f"{origin} {name}: vLLM {self.version} has no {value!r}{near}")

    def _check_field(self, head: str, tail: str, origin: str) -> None:
        known, path = self.fields.get(head), head
        for part in tail.split("."):
            if known is None:
                return  # a free dictionary below here
            if part not in known:
                change = find_change(f"{path}.{part}")
                what = change["note"] if change else f"{path} has no {part!r}{suggest(part, known)}"
                raise SettingsError(f"{origin} {head}.{tail}: {what}")
            path = f"{path}.{part}"
            known = self.fields.get(path)


def read_shipped_flags() -> Flags:
    data = tomllib.loads((_FOLDER / "flags.toml").read_text(encoding="utf-8"))
    kinds = {name: kind for kind in KINDS for name in data[kind]}
    return Flags(data["version"], kinds, data["fields"], data["choices"])


def read_flags(version: str, cache: Path) -> Flags:
    """Those of the installed `version`; asking its parser takes seconds, so once a version."""
    shipped = read_shipped_flags()
    if version in ("", shipped.version):
        return shipped
    file = cache / f"flags-{version}.json"
    data = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    if "choices" not in data:  # not asked yet, or by an earlier launcher, which asked for less
        answer = _ask_parser("list", [])[0]
        data = json.loads(answer)
        with contextlib.suppress(OSError):  # not kept: the next start asks again
            cache.mkdir(parents=True, exist_ok=True)
            write_file(file, answer)
    return Flags(version, data["flags"], data["fields"], data["choices"])


def try_commands(commands: Sequence[Sequence[str]]) -> list[str | None]:
    """What the installed vLLM's own parser objects to in each list of flags; None: nothing."""
    lines = _ask_parser("try", [json.dumps(list(command)) for command in commands])
    return [json.loads(line) for line in lines]


def list_changes() -> list[dict[str, Any]]:
    text = (_FOLDER / "flag_changes.toml").read_text(encoding="utf-8")
    changes: list[dict[str, Any]] = tomllib.loads(text)["change"]
    return changes


def find_change(flag: str) -> dict[str, Any] | None:
    return next((change for change in list_changes() if change["flag"] == flag), None)


def _ask_parser(task: str, lines: Sequence[str]) -> list[str]:
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR", "VLLM_NO_USAGE_STATS": "1"}
    command = [sys.executable, "-P", str(_PARSER), task]
    try:
        result = subprocess.run(
            command,
            input="".join(f"{line}\n" for line in lines),
            capture_output=True,
            text=True,
            timeout=_PARSER_TIMEOUT_S,
            check=False,
            env=environment,
        )
    except subprocess.TimeoutExpired:
        raise ProgramError("vLLM's parser did not answer within two minutes") from None
    answers = result.stdout.splitlines()
    if result.returncode != 0 or len(answers) < max(1, len(lines)):
        last = (result.stderr.strip().splitlines() or ["no word"])[-1]
        raise ProgramError(f"vLLM's parser cannot be asked: {last}")
    return answers
