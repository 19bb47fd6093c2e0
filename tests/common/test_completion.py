"""Shell completion: what the scripts complete, asked of the shells themselves."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field

from common.command_line.completion import SHELLS, build_flag_parser, build_parser, complete
from common.errors import SettingsError
from common.settings import ProgramSettings

BASH = shutil.which("bash") or ""
ROOT = Path(__file__).parents[2]


class Settings(ProgramSettings):
    """Serves."""

    style: Literal["plain", "rich"] = Field("plain", description="A style's name, `plain` [or] $1.")


class OtherSettings(Settings):
    """Explains."""

    as_json: bool = Field(False, description="A switch.")


PARSER = build_parser("demo", {"up": Settings, "explain": OtherSettings}, {"schema": "Prints."})


def ask_bash(script: Path, *words: str) -> set[str]:
    """What bash would offer for the last word."""
    line = " ".join(f"'{word}'" for word in ("demo", *words))
    code = (
        f"source {script}; COMP_WORDS=({line}); COMP_CWORD={len(words)}; "
        '_shtab_demo; printf "%s\\n" "${COMPREPLY[@]}"'
    )
    asked = subprocess.run([BASH, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(asked.stdout.split())


@pytest.mark.parametrize("shell", [shell for shell in SHELLS if shutil.which(shell)])
def test_script_is_one_that_its_shell_reads(tmp_path: Path, shell: str) -> None:
    script = tmp_path / "script"
    script.write_text(complete([shell], PARSER))
    read = subprocess.run([shell, "-n", script], capture_output=True, text=True, check=False)
    assert (read.returncode, read.stderr) == (0, "")


def test_commands_flags_names_and_files_are_completed(tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(complete(["bash"], PARSER))
    assert ask_bash(script, "") >= {"up", "explain", "schema", "completion"}
    assert ask_bash(script, "up", "--st") == {"--style"}
    assert ask_bash(script, "up", "--style", "r") == {"rich"}
    assert ask_bash(script, "up", "--as") == set()
    assert ask_bash(script, "completion", "") >= set(SHELLS)
    assert ask_bash(script, "explain", "--") >= {"--as-json", "--no-as-json", "--config"}
    assert ask_bash(script, "up", "--config", "pypro") == {"pyproject.toml"}


def test_program_of_one_command_has_its_flags_at_the_root(tmp_path: Path) -> None:
    parser = build_flag_parser(OtherSettings)
    parser.prog = "demo"
    script = tmp_path / "script"
    script.write_text(complete(["bash"], parser))
    assert ask_bash(script, "--sty") == {"--style"}


@pytest.mark.parametrize("words", [[], ["fsh"], ["bash", "zsh"]])
def test_other_shells_are_refused(words: list[str]) -> None:
    with pytest.raises(SettingsError, match="completion takes one shell of bash, zsh, fish"):
        complete(words, PARSER)
