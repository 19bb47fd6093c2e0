"""How a program's settings are read: flags, then the environment, then a TOML file, then defaults.

A program declares a subclass of `ProgramSettings`; from the one declaration come the variable, the
flag, `--help`, the check at start, the table in the docs and the JSON schema of the file. A file
may be one program's, or, in tables by the programs' names, all programs'. Which settings there are,
and what they mean, is in the programs' `config.py`.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import tomllib
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, NamedTuple, TypeVar
from urllib.parse import urlsplit

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)
from pydantic_settings import (
    BaseSettings,
    CliApp,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)
from pydantic_settings.exceptions import SettingsError as UsageError

from common.errors import SettingsError
from common.files import read_text

_ROOT = f"{Path(__file__).parent.parent}{os.sep}"
_LONGEST_S = 1_000_000  # twelve days; the kernel's limit for one of its timers is 24
# Of a file for all programs; `tuned` is what the launcher has measured (launcher/plan/tuned.py).
TUNED_TABLE = "tuned"
_TABLES = frozenset(("gateway", "launcher", TUNED_TABLE))
_PASSWORD = re.compile(r"(?<=://)[^/\s'\"]*@")


def is_address(url: str) -> bool:
    try:
        parts = urlsplit(url)
        return parts.scheme in {"http", "https"} and bool(parts.hostname) and parts.port != 0
    except ValueError:
        return False


def check_address(url: str) -> str:
    if url and not is_address(url):
        raise ValueError(f"{url!r} is not an http:// or https:// address")
    return url


def _split_commas(value: Any) -> Any:
    if isinstance(value, str):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


CommaList = Annotated[tuple[str, ...], NoDecode, BeforeValidator(_split_commas)]
OptionalAddress = Annotated[str, AfterValidator(check_address)]


class ProgramSettings(BaseSettings):
    """The base of a program's settings; `env_prefix` and `cli_prog_name` are the program's."""

    model_config = SettingsConfigDict(
        frozen=True,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_exit_on_error=False,  # argparse would print its whole usage before the one line
        env_ignore_empty=True,  # compose passes an unset variable as an empty one
        allow_inf_nan=False,
        protected_namespaces=(),
    )

    # What stands over a setting, and over those that follow it, where they are listed.
    groups: ClassVar[Mapping[str, str]] = {}

    config: Path | None = Field(None, description="TOML file with any of these settings.")

    @field_validator("*")
    @classmethod
    def _check_times(cls, value: Any, info: ValidationInfo) -> Any:
        """Timers of the kernel and of the event loop count milliseconds in few bits."""
        if (info.field_name or "").endswith("_s") and value > _LONGEST_S:
            raise ValueError(f"the longest time is {_LONGEST_S} seconds")
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        file = _SettingsFile(cls, init_settings().get("config"))
        return init_settings, env_settings, file

    @classmethod
    def list_names(cls) -> set[str]:
        """What may stand in the environment and in the file; other commands' too, if there are."""
        return set(cls.model_fields)


class _SettingsFile(TomlConfigSettingsSource):
    """The library passes over a file that is not there, and over whose setting a name is."""

    def __init__(self, kind: type[ProgramSettings], path: Path | None) -> None:
        self._kind = kind
        super().__init__(kind, path)

    def _read_files(self, files: Any, deep_merge: bool = False) -> dict[str, Any]:
        if files is None:
            return {}
        path = Path(files)
        values, where = read_settings_file(path), f" in {path}"
        if _TABLES & values.keys():
            own = _prefix(self._kind).strip("_").lower()
            _refuse_unknown(values, {own, *_TABLES}, where)
            values, where = values.get(own, {}), f" in [{own}] of {path}"
            if not isinstance(values, dict):
                raise SettingsError(f"{own} in {path} is no table")
        _refuse_unknown(values, self._kind.list_names(), where)
        return {name: value for name, value in values.items() if name in self._kind.model_fields}


def read_settings_file(path: Path) -> dict[str, Any]:
    try:
        return tomllib.loads(read_text(path))
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise SettingsError(f"cannot read the settings file {path}: {error}") from None


S = TypeVar("S", bound=ProgramSettings)


def read_settings(kind: type[S], arguments: Sequence[str] = ()) -> S:
    """`SettingsError` says what is wrong, in one line."""
    given = sorted(name for name in os.environ if name.startswith(_prefix(kind)))
    _refuse_unknown(given, {name_variable(kind, name) for name in kind.list_names()})
    words = [word.split("=")[0] for word in arguments if word.startswith("--")]
    _refuse_unknown(words, list_flags(kind))
    try:
        return CliApp.run(kind, cli_args=list(arguments), config=_find_file(kind, arguments))
    except ValidationError as error:
        raise SettingsError(_describe(kind, error)) from None
    except UsageError as error:
        # argparse's words (`argument --port: expected one argument`) and where to look.
        told = str(error).removeprefix("error parsing CLI: ").removeprefix("argument ")
        program = kind.model_config["cli_prog_name"]
        raise SettingsError(f"{told}; `{program} --help` lists every flag") from None


class SettingRow(NamedTuple):
    """A row of the table in the docs."""

    variable: str
    flag: str
    default: str
    description: str


def describe_settings(kind: type[ProgramSettings]) -> list[SettingRow]:
    return [
        SettingRow(
            name_variable(kind, name),
            name_flag(name),
            show_default(field.default),
            field.description or "",
        )
        for name, field in kind.model_fields.items()
    ]


def build_schema(*kinds: type[ProgramSettings]) -> dict[str, Any]:
    """The JSON schema of a file for all of these commands: for editors, and for who writes one."""
    schemas = [kind.model_json_schema() for kind in kinds]
    properties = {name: row for one in schemas for name, row in one["properties"].items()}
    return {**schemas[0], "properties": properties, "additionalProperties": False}


def name_variable(kind: type[ProgramSettings], name: str) -> str:
    return _prefix(kind) + name.upper()


def name_flag(name: str) -> str:
    return "--" + name.replace("_", "-")


def list_flags(kind: type[ProgramSettings]) -> list[str]:
    """All that the command line takes, negations and short forms included."""
    switches = [name for name, field in kind.model_fields.items() if field.annotation is bool]
    short = [f"--{word}" for word in (kind.model_config.get("cli_shortcuts") or {}).values()]
    negations = [name_flag(f"no_{name}") for name in switches]
    return [*map(name_flag, kind.model_fields), *negations, *short, "--help"]


def suggest(name: str, known: Iterable[str]) -> str:
    """`; did you mean …?`, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {near[0]}?" if near else ""


def _prefix(kind: type[ProgramSettings]) -> str:
    return kind.model_config["env_prefix"]


def _refuse_unknown(names: Iterable[str], known: Collection[str], where: str = "") -> None:
    for name in names:
        if name not in known:
            raise SettingsError(f"unknown setting {name}{where}{suggest(name, known)}")


def _find_file(kind: type[ProgramSettings], arguments: Sequence[str]) -> Path | None:
    """The file must be known before the rest can be read."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    # Without a value it is refused with all the others, later.
    parser.add_argument("--config", nargs="?")
    flag = parser.parse_known_args(list(arguments))[0].config
    path = flag or os.environ.get(name_variable(kind, "config"))
    return Path(path).expanduser() if path else None


def show_default(value: Any) -> str:
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, tuple):
        return ",".join(value)
    return "" if value is None else str(value).removeprefix(_ROOT)


def _describe(kind: type[ProgramSettings], error: ValidationError) -> str:
    problem = error.errors()[0]
    message = problem["msg"].removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    name = str(problem["loc"][0])
    is_secret = name in kind.model_fields and not kind.model_fields[name].repr
    given = "" if is_secret else f" (got {problem['input']!r})"
    return _PASSWORD.sub("", f"{name_variable(kind, name)}: {message}{given}")
