"""Reading settings: where they come from, what is refused, what is told of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Literal

import pytest
from pydantic import Field
from pydantic_settings import SettingsConfigDict

from common.errors import SettingsError
from common.project import DEMO_QUESTIONS
from common.settings import (
    CommaList,
    OptionalAddress,
    ProgramSettings,
    build_schema,
    describe_settings,
    list_flags,
    read_settings,
)


class Settings(ProgramSettings):
    """A program."""

    model_config = SettingsConfigDict(
        env_prefix="DEMO_", cli_prog_name="demo", cli_shortcuts={"as-json": "json"}
    )

    port: int = Field(1, ge=0, le=9, description="A port.")
    names: CommaList = Field(("a", "b"), description="Names.")
    secret: CommaList = Field((), repr=False, description="Secrets.")
    wait_s: float = Field(1.0, description="A time.")
    style: Literal["plain", "rich"] = Field("plain", description="A style.")
    collector: OptionalAddress = Field("", description="An address.")
    as_json: bool = Field(False, description="A switch.")
    file: Path = Field(DEMO_QUESTIONS, description="A file of the project.")

    @classmethod
    def list_names(cls) -> set[str]:
        return {*cls.model_fields, "of_another_command"}


def write(folder: Path, text: str) -> Path:
    path = folder / "demo.toml"
    path.write_text(text)
    return path


def test_flag_wins_over_variable_over_file_over_default(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write(tmp_path, 'port = 3\nwait_s = 3\nstyle = "rich"\nnames = ["c"]\n')
    monkeypatch.setenv("DEMO_CONFIG", str(path))
    monkeypatch.setenv("DEMO_WAIT_S", "2")
    monkeypatch.setenv("DEMO_PORT", "2")

    settings = read_settings(Settings, ["--port", "1", "--json"])

    assert (settings.port, settings.wait_s, settings.style) == (1, 2, "rich")
    assert (settings.names, settings.as_json, settings.collector) == (("c",), True, "")
    assert settings.config == path


def test_file_of_the_flag_wins_over_the_variables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEMO_CONFIG", "/nowhere")
    settings = read_settings(Settings, [f"--config={write(tmp_path, 'port = 4')}"])
    assert settings.port == 4


def test_what_another_command_knows_may_stand_in_file_and_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DEMO_OF_ANOTHER_COMMAND", "1")
    path = write(tmp_path, "of_another_command = 1\nport = 5")
    assert read_settings(Settings, ["--config", str(path)]).port == 5


@pytest.mark.parametrize(
    ("variable", "value", "message"),
    [
        ("DEMO_PROT", "1", "unknown setting DEMO_PROT; did you mean DEMO_PORT?"),
        ("DEMO_PORT", "x", "DEMO_PORT: Input should be a valid integer.*got 'x'"),
        ("DEMO_WAIT_S", "1000001", "DEMO_WAIT_S: the longest time is 1000000 seconds"),
        ("DEMO_WAIT_S", "inf", "DEMO_WAIT_S: "),
        ("DEMO_COLLECTOR", "ftp://a", "DEMO_COLLECTOR: 'ftp://a' is not an http://"),
        ("DEMO_COLLECTOR", "http://", "DEMO_COLLECTOR: 'http://' is not an http://"),
        ("DEMO_CONFIG", "/nowhere", "cannot read the settings file /nowhere: "),
    ],
)
def test_bad_variable_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str, message: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(SettingsError, match=message) as caught:
        read_settings(Settings)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prot", "1"], "unknown setting --prot; did you mean --port\\?"),
        (["--port"], "--port: expected one argument; `demo --help` lists every flag"),
        (["--config"], "--config: expected one argument"),
        (["-v"], "unrecognized arguments: -v"),
        (["--style", "odd"], "DEMO_STYLE: "),
    ],
)
def test_bad_argument_is_one_clear_line(arguments: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        read_settings(Settings, arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "unknown setting prot in .*demo.toml; did you mean port\\?"),
        ("port = [", "cannot read the settings file .*demo.toml"),
        ('port = "x"', "DEMO_PORT: "),
    ],
)
def test_bad_file_is_one_clear_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        read_settings(Settings, ["--config", str(write(tmp_path, text))])
    assert "\n" not in str(caught.value)


def test_file_for_all_programs_has_a_table_for_each(tmp_path: Path) -> None:
    text = '[demo]\nport = 3\n[launcher]\nprofile = "x"\n[tuned]\nsummary = "y"\n'
    path = write(tmp_path, text)
    assert read_settings(Settings, ["--config", str(path)]).port == 3
    others = write(tmp_path, "[gateway]\nmax_tokens = 7\n")
    assert read_settings(Settings, ["--config", str(others)]).port == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[demo]\nprot = 3\n[gateway]", "unknown setting prot in [demo] of"),
        ("port = 3\n[gateway]", "unknown setting port in"),
        ("[lancher]\n[gateway]", "unknown setting lancher in"),
        ("demo = 3\n[gateway]", "demo in"),
        ("[demo]\nport = 99\n[gateway]", "DEMO_PORT: "),
    ],
)
def test_bad_file_for_all_programs_is_one_clear_line(
    tmp_path: Path, text: str, message: str
) -> None:
    with pytest.raises(SettingsError) as raised:
        read_settings(Settings, ["--config", str(write(tmp_path, text))])
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_secrets_and_passwords_are_not_told_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DEMO_SECRET", "hunter2")
    with pytest.raises(SettingsError, match="longest time"):
        read_settings(Settings, ["--wait-s", "1e9"])
    assert "hunter2" not in repr(read_settings(Settings))
    with pytest.raises(SettingsError, match="is not an http") as caught:
        read_settings(Settings, ["--collector", "ftp://me:hunter3@a"])
    assert "hunter3" not in str(caught.value)


def test_table_shows_defaults_as_one_would_write_them() -> None:
    rows = {row.variable: row for row in describe_settings(Settings)}

    assert rows["DEMO_NAMES"] == ("DEMO_NAMES", "--names", "a,b", "Names.")
    assert rows["DEMO_AS_JSON"].default == "false"
    assert rows["DEMO_CONFIG"].default == ""
    assert rows["DEMO_FILE"].default == "demo/questions.jsonl"


def test_flags_are_those_of_the_command_line() -> None:
    flags = list_flags(Settings)
    assert {"--help", "--json", "--as-json", "--no-as-json", "--wait-s"} <= set(flags)
    for flag in ("--json", "--as-json", "--no-as-json"):
        assert read_settings(Settings, [flag]).as_json is not flag.startswith("--no")


def test_schema_judges_a_settings_file_as_the_program_does(tmp_path: Path) -> None:
    schema = tmp_path / "schema.json"
    schema.write_text(json.dumps(build_schema(Settings)))

    def is_valid(text: str) -> bool:
        tool = Path(sys.executable).parent / "check-jsonschema"
        command: list[Path | str] = [tool, "--schemafile", schema, write(tmp_path, text)]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    assert is_valid('port = 3\nnames = ["c"]\nstyle = "rich"')
    assert not is_valid("prot = 3")
    assert not is_valid("port = 30")
