"""Settings: declared once, checked at start, one clear line when bad."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gateway.app import build_app
from gateway.config import Settings, SettingsError, list_settings, load_settings
from tests.gateway.conftest import Serve, make_settings


def test_settings_come_from_flags_then_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_PORT", "9001")
    monkeypatch.setenv("GATEWAY_ENGINES", "http://a:1/, http://b:2")
    monkeypatch.setenv("GATEWAY_PROMPT_STYLE", "raw")

    settings = load_settings(["--port", "9002", "--single-line"])

    assert (settings.port, settings.single_line) == (9002, True)
    assert settings.engines == ("http://a:1", "http://b:2")


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("GATEWAY_PROT", "1", "unknown setting GATEWAY_PROT; did you mean GATEWAY_PORT?"),
        ("GATEWAY_PORT", "x", "GATEWAY_PORT: "),
        ("GATEWAY_ENGINES", "localhost:1", "is not an http"),
        ("GATEWAY_TOKENIZER", "/nowhere", "there is no folder '/nowhere'"),
        ("GATEWAY_PROMPT_STYLE", "chat", "prompt_style chat needs the model's template"),
        ("GATEWAY_SYSTEM_PROMPT_FILE", "nope", "shipped: one-line"),
        ("GATEWAY_WARMUP_FILE", "/nope", "there is no file '/nope'"),
        ("GATEWAY_TEMPERATURE", "3", "GATEWAY_TEMPERATURE: "),
        ("GATEWAY_CLIENT_WRITE_TIMEOUT_S", "2592000", "the longest time is 1000000 seconds"),
        ("GATEWAY_CLIENT_WRITE_TIMEOUT_S", "inf", "GATEWAY_CLIENT_WRITE_TIMEOUT_S: "),
        ("GATEWAY_PROBE_INTERVAL_S", "1e300", "the longest time is 1000000 seconds"),
        ("GATEWAY_BATCH_WEIGHT", "inf", "GATEWAY_BATCH_WEIGHT: "),
        ("GATEWAY_ENGINES", "http://a:1,http://me:pw@A:1/", "http://a:1 is there twice"),
        ("GATEWAY_ENGINES", "https://a,https://a:443", "https://a:443 is there twice"),
        ("GATEWAY_SERVICE_HOST", "10.0.0.1", "`enableServiceLinks: false` in the pod's spec"),
    ],
)
def test_settings_bad_value_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str, message: str
) -> None:
    if name != "GATEWAY_PROMPT_STYLE":
        monkeypatch.setenv("GATEWAY_PROMPT_STYLE", "raw")
    monkeypatch.setenv(name, value)

    with pytest.raises(SettingsError) as caught:
        load_settings()

    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["GATEWAY_ENGINES", "GATEWAY_LAUNCHERS"])
def test_settings_refused_address_is_told_without_its_password(
    monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv("GATEWAY_PROMPT_STYLE", "raw")
    monkeypatch.setenv(name, "http://me:hunter2@a:1,http://me:hunter2@a:x")

    with pytest.raises(SettingsError, match="'http://a:x' is not an http") as caught:
        load_settings()

    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"stop": tuple("abcde")}, "GATEWAY_STOP: stop takes at most"),
        ({"stop": tuple("abcd"), "prompt_style": "qa"}, "GATEWAY_STOP: stop takes at most"),
        ({"stop": ("a" * 10_000,)}, "GATEWAY_STOP: stop takes at most"),
        ({"max_tokens": 2**40}, "GATEWAY_MAX_TOKENS: "),
        ({"seed": 2**80}, "GATEWAY_SEED: "),
    ],
)
def test_settings_that_every_request_would_fail_with_stop_the_start(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(SettingsError, match=message) as caught:
        build_app(make_settings(**fields))

    assert "\n" not in str(caught.value)


async def test_settings_longest_times_are_served(serve: Serve) -> None:
    times = {name: 1e6 for name in Settings.model_fields if name.endswith("_timeout_s")}
    async with serve(**times) as served:
        assert (await served.predict("a")).status_code == 200


def test_settings_file_stands_below_the_environment(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text('prompt_style = "raw"\nport = 1111\nmax_tokens = 5\nengines = ["http://a:1"]\n')
    monkeypatch.setenv("GATEWAY_CONFIG", str(path))
    monkeypatch.setenv("GATEWAY_PORT", "2222")
    monkeypatch.setenv("GATEWAY_HOST", "")

    settings = load_settings(["--top-k", "3"])

    assert (settings.port, settings.max_tokens, settings.top_k) == (2222, 5, 3)
    assert (settings.engines, settings.host) == (("http://a:1",), "127.0.0.1")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prot = 1", "unknown setting prot in .*; did you mean port?"),
        ("port = [", "cannot read the settings file"),
        ("port = 'x'\nprompt_style = 'raw'", "GATEWAY_PORT: "),
    ],
)
def test_settings_file_that_is_bad_stops_the_start(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "gateway.toml"
    path.write_text(text)

    with pytest.raises(SettingsError, match=message):
        load_settings(["--config", str(path)])


def test_settings_shipped_system_prompt_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GATEWAY_PROMPT_STYLE", "raw")
    monkeypatch.setenv("GATEWAY_SYSTEM_PROMPT_FILE", "one-line")

    assert "1)" in load_settings().read_system_prompt()


def test_settings_each_has_a_description() -> None:
    assert all(description.endswith(".") for *_, description in list_settings())


@pytest.mark.programs
def test_program_help_names_every_flag_and_bad_settings_exit_2() -> None:
    helped = _run("--help")
    refused = _run("--tokenizer", "/nowhere")
    unknown = _run("--nonsense", "1")

    assert helped.returncode == 0
    assert all(flag in helped.stdout for _, flag, _, _ in list_settings())
    assert all(verb in helped.stdout for verb in ("`check`", "`new-key NAME`"))
    assert refused.returncode == unknown.returncode == 2
    assert refused.stderr.startswith("gateway: ")
    assert len(refused.stderr.splitlines()) == len(unknown.stderr.splitlines()) == 1


@pytest.mark.programs
@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--port",), "--port: expected one argument"),
        (("--config",), "--config: expected one argument"),
        (("-v",), "unrecognized arguments: -v"),
        (("serve",), "unrecognized arguments: serve"),
    ],
)
def test_program_misused_is_one_line_that_says_where_to_look(
    arguments: tuple[str, ...], words: str
) -> None:
    result = _run(*arguments)

    assert result.returncode == 2
    assert result.stderr == f"gateway: {words}; `python -m gateway --help` lists every flag\n"


@pytest.mark.programs
def test_program_unknown_flag_is_refused_with_the_nearest_one() -> None:
    result = _run("--prot", "1")

    assert result.returncode == 2
    assert result.stderr == "gateway: unknown setting --prot; did you mean --port?\n"


@pytest.mark.programs
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--prompt-style", "raw"), ""),
        (("--prompt-style", "poem"), "GATEWAY_PROMPT_STYLE"),
        (("--prompt-style", "raw", "--host", "0.0.0.0"), "without API keys"),
        (("--prompt-style", "raw", "--warmup-file", "README.md"), "README.md: no question in it"),
    ],
)
def test_program_check_judges_without_listening(arguments: tuple[str, ...], message: str) -> None:
    result = _run("check", *arguments)

    assert result.returncode == (2 if message else 0)
    assert len(result.stderr.splitlines()) == (1 if message else 0)
    assert message in result.stderr


def _run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "gateway", *arguments], capture_output=True, text=True, check=False
    )


def test_workers_of_earlier_versions_are_refused_with_what_took_their_place(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("GATEWAY_WORKERS", "4")

    with pytest.raises(
        SettingsError, match=r"one process\. Several gateways .* GATEWAY_REUSE_PORT"
    ):
        load_settings(["--prompt-style", "raw"])
