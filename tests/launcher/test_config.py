"""One declaration a setting: variable, flag, help and table agree."""

from __future__ import annotations

import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from common.errors import SettingsError
from launcher.config import COMMANDS, LauncherSettings, TuneSettings, list_settings, load_settings


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    import os  # noqa: PLC0415

    for name in [name for name in os.environ if name.startswith("LAUNCHER_")]:
        monkeypatch.delenv(name)


def test_rows_every_setting_is_described_once() -> None:
    for kind in COMMANDS.values():
        rows = list_settings(kind)
        assert len({row[0] for row in rows}) == len(rows) == len(kind.model_fields)
        for variable, flag, _default, description in rows:
            assert variable == "LAUNCHER_" + flag[2:].replace("-", "_").upper()
            assert description.endswith(".")


def test_flag_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCHER_PORT", "1")
    assert load_settings(LauncherSettings).port == 1
    assert load_settings(LauncherSettings, ["--port", "2"]).port == 2


def test_empty_variable_is_not_set(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LAUNCHER_PORT", "")
    assert load_settings(LauncherSettings).port == 8000


def test_status_port_stands_beside_the_engine() -> None:
    assert load_settings(LauncherSettings, ["--engine-port", "9001"]).status_port_used == 9002
    assert load_settings(LauncherSettings, ["--status-port", "0"]).status_port_used == 0
    beside = ["--engine-port", "9001", "--port", "9002"]
    assert load_settings(LauncherSettings, beside).status_port_used == 9003
    assert load_settings(LauncherSettings, ["--engine-port", "65535"]).status_port_used == 65534


def test_set_repeated_and_with_json_keeps_every_pair(monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ["--set", 'compilation-config={"mode": 3, "a": [1, 2]}', "--set=dtype=bfloat16"]
    expected = ('compilation-config={"mode": 3, "a": [1, 2]}', "dtype=bfloat16")
    assert load_settings(LauncherSettings, arguments).set == expected
    monkeypatch.setenv("LAUNCHER_SET", " ".join(expected))
    assert load_settings(LauncherSettings).set == expected


def test_settings_of_another_command_may_stand_in_the_environment(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LAUNCHER_TUNE_MINUTES", "3")
    assert load_settings(LauncherSettings).port == 8000
    assert load_settings(TuneSettings).tune_minutes == 3


def test_settings_file_serves_every_command_below_environment_and_flags(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "launcher.toml"
    path.write_text(
        'port = 1111\nengine_port = 9001\ntune_minutes = 3\nhost = "::1"\n'
        """set = ["dtype=bfloat16", 'compilation-config={"mode": 3}']\n"""
    )
    monkeypatch.setenv("LAUNCHER_CONFIG", str(path))
    monkeypatch.setenv("LAUNCHER_PORT", "2222")

    settings = load_settings(LauncherSettings, ["--engine-port", "9002"])

    assert (settings.port, settings.engine_port, settings.host) == (2222, 9002, "::1")
    assert settings.set == ("dtype=bfloat16", 'compilation-config={"mode": 3}')
    assert load_settings(TuneSettings).tune_minutes == 3


def test_settings_file_with_an_unknown_name_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "launcher.toml"
    path.write_text("prot = 1")
    with pytest.raises(SettingsError, match=f"unknown setting prot in {path}; did you mean port"):
        load_settings(LauncherSettings, ["--config", str(path)])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prot", "1"], "did you mean --port"),
        (["--port", "70000"], "LAUNCHER_PORT"),
        (["--set", "nonsense"], "not key=value"),
        (["--set"], "--set: expected one argument"),
        (["--port"], "--port: expected one argument; `python -m launcher up --help`"),
        (["engine"], "unrecognized arguments: engine"),
        (["-v"], "unrecognized arguments: -v"),
        (["--log-format", "xml"], "LAUNCHER_LOG_FORMAT"),
    ],
)
def test_bad_argument_is_one_clear_line(arguments: list[str], message: str) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        load_settings(LauncherSettings, arguments)
    assert "\n" not in str(caught.value)


def call(*words: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "launcher", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.programs
def test_version_is_the_projects() -> None:
    version = tomllib.loads(Path("pyproject.toml").read_text())["project"]["version"]
    said = call("--version")
    assert (said.returncode, said.stdout) == (0, f"vllm-launcher {version}\n")


@pytest.mark.programs
def test_schema_knows_the_settings_of_every_command() -> None:
    schema = json.loads(call("schema").stdout)
    assert set(schema["properties"]) == {n for kind in COMMANDS.values() for n in kind.model_fields}
    assert schema["additionalProperties"] is False


@pytest.mark.programs
def test_unknown_command_is_refused_with_the_nearest() -> None:
    said = call("completions")
    assert said.returncode == 2
    assert said.stderr == "launcher: unknown command completions; did you mean completion?\n"
