"""Every setting of the launcher, declared once; the only reader of environment and command line.

From the one declaration come the variable (`LAUNCHER_MODEL`), the flag (`--model`), `--help`, the
check at start and the table in the README. What the engine is told is no setting but an option of
a profile (`profiles.py`); `set` overrides those.
"""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field, ValidationError, field_validator
from pydantic_settings import BaseSettings, CliApp, NoDecode, SettingsConfigDict
from pydantic_settings.exceptions import SettingsError as UsageError

from launcher.errors import SettingsError

PREFIX = "LAUNCHER_"
_LAST_PORT = 65535
DEMO_MODEL = Path(__file__).parent.parent / "demo" / "model"
_NEXT_PAIR = re.compile(r"\s+(?=[A-Za-z][\w.-]*=)")


class Settings(BaseSettings):
    """Starts vLLM with the flags its work needs, watches it and brings it back."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        frozen=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_exit_on_error=False,  # argparse would print its whole usage before the one line
        env_ignore_empty=True,  # compose passes unset variables as empty ones
        cli_prog_name="python -m launcher up",
        protected_namespaces=(),
    )

    model: str = Field(
        str(DEMO_MODEL),
        description="Model: a local folder, or a name on the hub (`Qwen/Qwen3-0.6B`).",
    )
    served_model_name: str = Field(
        "", description="Name that clients use; empty: the hub name, or the folder's name."
    )
    hub: Literal["huggingface", "modelscope"] = Field(
        "huggingface", description="Where a model that is no local folder comes from."
    )
    profile: str = Field(
        "auto",
        description="course, throughput, balanced, latency, quality, development or cpu; "
        "auto: course where there is a GPU, cpu elsewhere.",
    )
    gpu: str = Field(
        "", description="Plan for this GPU instead of the one found (`H200`, `2x RTX 4090`, `cpu`)."
    )
    set: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Engine options that override the profile's: `key=value`, separated by spaces; "
        "the flag may be repeated. `key=` leaves an option out.",
    )

    host: str = Field("127.0.0.1", description="Address of the gateway.")
    port: int = Field(8000, ge=1, le=_LAST_PORT, description="Port of the gateway.")
    engine_host: str = Field("127.0.0.1", description="Address of the engine.")
    engine_port: int = Field(8001, ge=1, le=_LAST_PORT, description="Port of the engine.")
    status_port: int | None = Field(
        None,
        ge=0,
        le=_LAST_PORT,
        description="Port of the launcher's own status and metrics; 0: none. "
        "By default the one after the engine's.",
    )
    status_host: str = Field(
        "127.0.0.1",
        description="Its address. It takes no orders, but shows command lines and environments: "
        "elsewhere than on the loopback only where nobody but your own programs can reach it.",
    )

    state_dir: Path | None = Field(
        None,
        description="Logs, crash cards and the record of what runs; by default "
        "$XDG_STATE_HOME/vllm-gateway/<engine port>.",
    )
    cache_dir: Path | None = Field(
        None,
        description="Compiled kernels and graphs, kept across restarts; mount it in a container. "
        "By default $XDG_CACHE_HOME/vllm-gateway.",
    )

    start_timeout_s: float = Field(
        600.0, gt=0, description="Time from an engine's start to its first token."
    )
    drain_timeout_s: int = Field(
        30, ge=0, description="Told to stop: time for running requests to finish."
    )
    kill_timeout_s: float = Field(
        15.0, gt=0, description="Time between SIGTERM and SIGKILL, once drained."
    )
    hang_timeout_s: float = Field(
        120.0,
        ge=0,
        description="Work in flight and no token for this long is a hang: restart. 0: never.",
    )
    canary_interval_s: float = Field(
        30.0, gt=0, description="An idle engine is asked for one token this often."
    )
    restart_limit: int = Field(
        5, ge=0, description="Crashes within the window after which the launcher gives up."
    )
    restart_window_s: float = Field(
        600.0, gt=0, description="The window in which crashes are counted."
    )
    restart_delay_s: float = Field(
        1.0, ge=0, description="Pause before the first restart; it doubles with every crash."
    )
    restart_delay_max_s: float = Field(60.0, ge=0, description="Longest pause before a restart.")

    engine_log: Literal["short", "requests", "all", "none"] = Field(
        "short",
        description="Which of the engine's lines are shown; all of them are in the log file. "
        "short leaves out what nobody can act on; requests has the engine log every request too.",
    )
    log_format: Literal["auto", "console", "json"] = Field(
        "auto", description="auto: readable on a terminal, JSON elsewhere."
    )

    otlp_endpoint: str = Field(
        "",
        description="Engine and gateway send spans to this OpenTelemetry collector (OTLP over "
        "HTTP, such as `http://localhost:4318`).",
    )

    @field_validator("otlp_endpoint")
    @classmethod
    def _check_endpoint(cls, value: str) -> str:
        if value and not value.startswith(("http://", "https://")):
            raise ValueError(f"{value!r} is not an http:// or https:// address")
        return value

    @field_validator("set", mode="before")
    @classmethod
    def _split_pairs(cls, value: Any) -> Any:
        # Only before the next `key=`: a value may be JSON with spaces in it.
        return tuple(_NEXT_PAIR.split(value.strip())) if isinstance(value, str) else value

    @field_validator("set")
    @classmethod
    def _check_pairs(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        pairs = tuple(pair for pair in value if pair)
        for pair in pairs:
            if "=" not in pair:
                raise ValueError(f"{pair!r} is not key=value")
        return pairs

    @property
    def engine_url(self) -> str:
        return f"http://{_dial(self.engine_host)}:{self.engine_port}"

    @property
    def gateway_url(self) -> str:
        return f"http://{_dial(self.host)}:{self.port}"

    @property
    def status_url(self) -> str:
        return f"http://{_dial(self.status_host)}:{self.status_port_used}"

    @property
    def status_port_used(self) -> int:
        if self.status_port is not None:
            return self.status_port
        near = (self.engine_port + step for step in (1, 2, -1, -2))
        return next(port for port in near if port != self.port and 0 < port <= _LAST_PORT)

    @property
    def state_path(self) -> Path:
        base = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state")
        return self.state_dir or base / "vllm-gateway" / str(self.engine_port)

    @property
    def tuned_path(self) -> Path:
        return self.cache_path / "tuned.toml"

    @property
    def cache_path(self) -> Path:
        base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
        return (self.cache_dir or base / "vllm-gateway").absolute()


class ServeSettings(Settings):
    """Starts the engine alone, watches it and brings it back."""

    model_config = SettingsConfigDict(cli_prog_name="python -m launcher serve")


class DoctorSettings(Settings):
    """Checks this host, the model and every flag before anything is started."""

    model_config = SettingsConfigDict(cli_prog_name="python -m launcher doctor")


class ExplainSettings(Settings):
    """Shows what the engine would be told, why, and what fits into its memory."""

    model_config = SettingsConfigDict(cli_prog_name="python -m launcher explain")

    json_output: bool = Field(False, description="Print JSON; `--json` for short.")


class TuneSettings(Settings):
    """Measures the candidates worth trying on this host and keeps the fastest honest one."""

    model_config = SettingsConfigDict(cli_prog_name="python -m launcher tune")

    tune_questions: Path = Field(
        DEMO_MODEL.parent / "questions.jsonl",
        description="Questions to measure with, one JSON object with `question` a line.",
    )
    tune_prompts: int = Field(358, ge=1, description="Questions in a batch.")
    tune_max_tokens: int = Field(128, ge=1, description="New tokens of an answer.")
    tune_rounds: int = Field(2, ge=1, description="Times that every candidate is started.")
    tune_repeats: int = Field(3, ge=1, description="Measured batches of one start.")
    tune_minutes: float = Field(30.0, gt=0, description="Time for everything.")
    tune_only: str = Field(
        "",
        description="Candidates to measure, by the names that `--dry-run` lists, separated by "
        "spaces; empty: all that apply here.",
    )
    tune_max_loss: float = Field(
        0.02, ge=0, le=1, description="ROUGE-L that a candidate may lose against quality's answers."
    )
    dry_run: bool = Field(False, description="List the candidates and stop.")


COMMANDS: dict[str, type[Settings]] = {
    "up": Settings,
    "serve": ServeSettings,
    "doctor": DoctorSettings,
    "explain": ExplainSettings,
    "tune": TuneSettings,
}
S = TypeVar("S", bound=Settings)


def load_settings(kind: type[S], arguments: list[str] | None = None) -> S:
    """Flags, then the environment, then defaults; `SettingsError` says what is wrong."""
    arguments = _spell_out(arguments or [])
    _refuse_unknown(_variables(), (name for name in os.environ if name.startswith(PREFIX)))
    _refuse_unknown(_flags(kind), (word.split("=")[0] for word in arguments if word[:2] == "--"))
    try:
        return CliApp.run(kind, cli_args=_join_pairs(arguments))
    except ValidationError as error:
        raise SettingsError(_describe(error)) from None
    except UsageError as error:
        raise SettingsError(_describe_usage(error, kind)) from None


def list_settings(kind: type[Settings] = Settings) -> list[tuple[str, str, str, str]]:
    """Variable, flag, default and description of every setting, in order: the README's table."""
    return [
        (_variable(name), _flag(name), _show_default(field.default), field.description or "")
        for name, field in kind.model_fields.items()
    ]


def _variable(name: str) -> str:
    return PREFIX + name.upper()


def _flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def _variables() -> set[str]:
    return {_variable(name) for kind in COMMANDS.values() for name in kind.model_fields}


def _flags(kind: type[Settings]) -> set[str]:
    flags = {_flag(name) for name in kind.model_fields}
    switches = {name for name, field in kind.model_fields.items() if field.annotation is bool}
    return flags | {"--no-" + _flag(name)[2:] for name in switches} | {"--help"}


def _show_default(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return " ".join(value)
    if value == str(DEMO_MODEL):
        return "demo/model"
    return "" if value is None else str(value)


def _refuse_unknown(known: set[str], names: Iterable[str]) -> None:
    for name in sorted(names):
        if name not in known:
            raise SettingsError(f"unknown setting {name}{suggest(name, known)}")


def suggest(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?`, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _join_pairs(arguments: list[str]) -> list[str]:
    """All `--set` as one: pydantic joins repeated flags with commas, which JSON values contain."""
    pairs, others = [], []
    words = iter(arguments)
    for word in words:
        if word == "--set":
            pairs.append(next(words, "--set"))  # nothing follows: no key=value, and refused as such
        elif word.startswith("--set="):
            pairs.append(word.removeprefix("--set="))
        else:
            others.append(word)
    return [*others, "--set", " ".join(pairs)] if pairs else others


def _spell_out(arguments: list[str]) -> list[str]:
    """`--json` for people: a field of that name would hide one of pydantic's own."""
    return ["--json-output" if word == "--json" else word for word in arguments]


def _dial(host: str) -> str:
    """Where to call a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104


def _describe(error: ValidationError) -> str:
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"]).split(".", maxsplit=1)[0]
    message = problem["msg"].removeprefix("Value error, ")
    return f"{_variable(field)}: {message} (got {problem['input']!r})" if field else message


def _describe_usage(error: UsageError, kind: type[Settings]) -> str:
    """argparse's words (`argument --port: expected one argument`) and where to look."""
    words = str(error).removeprefix("error parsing CLI: ").removeprefix("argument ")
    return f"{words}; `{kind.model_config['cli_prog_name']} --help` lists every flag"
