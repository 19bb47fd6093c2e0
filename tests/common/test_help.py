"""Settings as people read them: `--help` and the settings file to begin with."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import ClassVar, Literal

import pytest
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from common.command_line.help import format_example, format_help, wants_help
from common.settings import CommaList, ProgramSettings, read_settings


class Settings(ProgramSettings):
    """Serves."""

    model_config = SettingsConfigDict(
        env_prefix="DEMO_",
        cli_prog_name="demo",
        cli_shortcuts={"is-quick": "quick"},
    )
    groups: ClassVar[Mapping[str, str]] = {"config": "Files", "host": "Network", "wait_s": "Times"}

    host: str = Field("here", description="Where it listens.")
    names: CommaList = Field((), description="What it is called.")
    wait_s: float = Field(2.0, description="How long it waits.")
    most: int | None = Field(None, description="How many there are at most.")
    style: Literal["plain", "rich"] = Field("plain", description="How it looks.")
    is_quick: bool = Field(True, description="Whether it hurries.")
    folder: Path | None = Field(None, description="Where it keeps things.")


class Others(Settings):
    """Explains."""

    count: int = Field(3, description="How many.")


def test_help_is_grouped_and_says_what_holds_without_a_flag() -> None:
    text = format_help(Settings)

    titles = [line for line in text.splitlines() if line in {"Files", "Network", "Times"}]
    assert titles == ["Files", "Network", "Times"]
    assert "  --host TEXT\n      Where it listens. [here]\n" in text
    assert "  --wait-s SECONDS\n      How long it waits. [2]\n" in text
    assert "  --most NUMBER\n      How many there are at most. [not set]\n" in text
    assert "  --style plain|rich\n" in text
    assert "  --is-quick, --quick, --no-is-quick\n      Whether it hurries. [yes]\n" in text
    assert "  --names A,B,…\n" in text
    assert "  --folder PATH\n" in text


@pytest.mark.parametrize(
    ("words", "is_asked"), [(["--help"], True), (["--host", "a", "-h"], True), (["--host"], False)]
)
def test_help_is_asked_for_anywhere(words: list[str], is_asked: bool) -> None:
    assert wants_help(words) == is_asked


def test_example_is_a_file_with_every_setting_at_its_default(tmp_path: Path) -> None:
    text = format_example(Settings, Others)
    names = re.findall(r"^# (\w+) = ", text, re.MULTILINE)
    assert names == [name for name in Others.model_fields if name != "config"]
    assert tomllib.loads(text) == {}

    file = tmp_path / "demo.toml"
    file.write_text(re.sub(r"^# (\w+ = [^ ])", r"\1", text, flags=re.MULTILINE))
    read = read_settings(Others, ["--config", str(file)])

    assert read == Others(config=file)
    assert len(tomllib.loads(file.read_text())) == len(names) - 2  # two have no default
