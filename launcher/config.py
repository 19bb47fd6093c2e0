"""Every setting of the launcher, declared once: the variable (`LAUNCHER_MODEL`), the flag
(`--model`), `--help` and the table in the docs come from here. How they are read is in
`common/settings.py`. What the engine is told is no setting but an option of a profile (`plan/`);
`set` overrides those.
"""

from __future__ import annotations

import builtins
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self, TypeVar

from pydantic import Field, PrivateAttr, field_validator
from pydantic_settings import NoDecode, SettingsConfigDict

from common.project import DEMO_MODEL, DEMO_QUESTIONS
from common.settings import (
    CommaList,
    OptionalAddress,
    ProgramSettings,
    SettingRow,
    describe_settings,
    read_settings,
)
from common.web.foreign_pages import check_hosts

PREFIX = "LAUNCHER_"
NODE_PORT = 8700
_LAST_PORT = 65535
_NEXT_PAIR = re.compile(r"(?<!\s)\s++(?=[A-Za-z][\w.-]*+=)")
_JOIN = re.compile(r"(?P<host>\[[0-9A-Fa-f:.]+\]|[^\s:/@\[\]]+)(:(?P<port>\d{1,5}))?")


class LauncherSettings(ProgramSettings):
    """Starts vLLM with the flags its work needs, watches it and brings it back."""

    model_config = SettingsConfigDict(env_prefix=PREFIX, cli_prog_name="python -m launcher up")
    groups: ClassVar[Mapping[str, str]] = {
        "config": "Where settings come from",
        "model": "What is served, and on what",
        "media_domains": "Media by URL",
        "nodes": "Several hosts for one engine",
        "host": "Where its programs listen",
        "state_dir": "Where things are kept",
        "start_timeout_s": "Starting, stopping, restarting",
        "engine_log": "What is shown and told",
        "json_output": "Of `explain` alone",
        "tune_questions": "Of `tune` alone",
    }

    _place: str = PrivateAttr("")  # what gpu_locks gave it

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
        "",
        description="Plan for this GPU instead of the one found: `H200`, `2x RTX 4090`, a name as "
        "nvidia-smi prints it, any other card as `24GiB sm_89`, or `cpu`.",
    )
    gpus: CommaList = Field(
        (),
        description="GPUs that the engine may use, as CUDA_VISIBLE_DEVICES names them, separated "
        "by commas; empty: all, or, of several engines, those that `up` gives it.",
    )
    gpu_locks: Path | None = Field(
        None,
        description="Folder in which the launchers of one host, each with one engine, agree on "
        "whose a GPU is: each takes the first that are free, as many as its plan needs, and has "
        "them while it lives. Its state, and what is compiled for it, are then in folders of its "
        "own below state_dir and cache_dir. Empty: nobody is asked.",
    )
    copies: int = Field(
        1,
        ge=1,
        description="Engines of it, each on GPUs of its own where there are enough, all behind one "
        "gateway.",
    )
    share: float = Field(
        1.0,
        gt=0,
        le=1,
        description="Share of each device's memory, and of a CPU's cores, that the engine may use; "
        "several engines that do not say share evenly.",
    )
    takes_turns: bool = Field(
        False,
        description="Of several engines: stop it, or have it sleep, while another of its device "
        "that takes turns is wanted, and bring it back when it is. Each is planned with all that "
        "is left to them.",
    )
    sleep_level: int = Field(
        0,
        ge=0,
        le=2,
        description="What an engine on a GPU does when its turn is over, by vLLM's sleep mode: 0, "
        "it stops; 1, it keeps its weights in the host's memory; 2, it reads them again when it "
        "wakes. Asleep it keeps one to two GiB of the GPU. On a CPU it stops.",
    )
    shortest_turn_s: float = Field(
        30.0,
        ge=0,
        description="How long an engine that takes turns serves at least before another's turn.",
    )
    engine: tuple[dict[str, Any], ...] = Field(
        (),
        description="Several engines for `up`: an `[[engine]]` section of the settings file for "
        "each, with any of the settings of its own; what it does not say stands above them.",
    )
    set: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        description="Engine options that override the profile's: `key=value`, separated by spaces; "
        "the flag may be repeated. `key=` leaves an option out.",
    )

    media_domains: CommaList = Field(
        (),
        description="Hosts from which a multimodal model's engine may fetch what callers name by "
        "URL (images, audio, video), separated by commas; empty: none, media come inside the "
        "request as data: URLs; `*`: any, those of its own network too.",
    )

    nodes: int = Field(
        1,
        ge=1,
        description="Hosts that the engine runs on: this one, the head, and those that join it. "
        "`set` says how it is cut: tensor-, pipeline- or data-parallel-size, over all of them.",
    )
    nodes_backend: Literal["mp", "ray"] = Field(
        "mp",
        description="What starts the engine's parts on other hosts: mp, launchers that join this "
        "one; ray, a Ray cluster that runs already and has its hosts itself.",
    )
    join: str = Field(
        "",
        description="Make this host a part of the engine whose launcher runs there, and start no "
        "gateway: `HEAD` or `HEAD:PORT`, the other's node_address and node_port.",
    )
    node_address: str = Field(
        "",
        description="Address by which the engine's other hosts reach this one; the head listens "
        "there for those that join. Empty: the loopback, or, of a host that joins, the address "
        "that its way to the head begins with.",
    )
    node_port: int = Field(
        NODE_PORT,
        ge=1,
        le=_LAST_PORT - 2,
        description="Port that hosts join the head at. vLLM takes the two after it: for the "
        "processes of one model to meet, and for those of its copies.",
    )
    nodes_token: str = Field(
        "",
        repr=False,
        description="Word that head and joining hosts share; needed where node_address is not the "
        "loopback. Give it by its variable: a flag can be read by everybody on the host.",
    )
    node_timeout_s: float = Field(
        15.0,
        gt=0,
        description="A host of the engine that is not heard of for this long is lost, and the "
        "engine is started again on all of them; a head that does not answer for this long is "
        "given up, and waited for.",
    )

    host: str = Field("127.0.0.1", description="Address that the gateway listens on.")
    port: int = Field(8000, ge=1, le=_LAST_PORT, description="Port that the gateway listens on.")
    engine_host: str = Field("127.0.0.1", description="Address that the engine listens on.")
    engine_port: int = Field(
        8001, ge=1, le=_LAST_PORT, description="Port that the engine listens on."
    )
    status_port: int | None = Field(
        None,
        ge=0,
        le=_LAST_PORT,
        description="Port of the launcher's own status and metrics; 0: none. "
        "By default the one after the engine's.",
    )
    status_host: str = Field(
        "127.0.0.1",
        description="Address of the launcher's own status and metrics. They take no orders, but "
        "show command lines and environments: elsewhere than on the loopback only where nobody but "
        "your own programs can reach them.",
    )
    status_allowed_hosts: CommaList = Field(
        (),
        description="Further names by which the status port may be called, separated by commas; "
        "`.example.com` is all names below it, `*` any. Addresses, names of one word and names "
        "that no public DNS has (`x.internal`, `x.local`) always may.",
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
        30,
        ge=0,
        description="Time for running requests to finish when the launcher is told to stop, or an "
        "engine's turn is over.",
    )
    kill_timeout_s: float = Field(
        15.0, gt=0, description="Time that a program has to end after SIGTERM; then it is killed."
    )
    hang_timeout_s: float = Field(
        120.0,
        ge=0,
        description="An engine that has work and makes no token for this long hangs, and is "
        "restarted; 0: never.",
    )
    gateway_hang_timeout_s: float = Field(
        30.0,
        ge=0,
        description="A gateway that answers nothing for this long, though it is stopped or asleep "
        "or has had as much of a core, hangs and is restarted; one that waits for a core does not. "
        "0: never.",
    )
    canary_interval_s: float = Field(
        30.0, gt=0, description="An idle engine is asked for one token this often."
    )
    restart_limit: int = Field(
        5, ge=0, description="Crashes within restart_window_s after which the launcher gives up."
    )
    restart_window_s: float = Field(
        600.0, gt=0, description="How far back crashes count against restart_limit."
    )
    restart_delay_s: float = Field(
        1.0,
        ge=0,
        description="Pause before the restart after a first crash; it doubles with every crash.",
    )
    restart_delay_max_s: float = Field(
        60.0, ge=0, description="Longest pause before a restart, after however many crashes."
    )

    engine_log: Literal["short", "requests", "all", "none"] = Field(
        "short",
        description="Which of the engine's lines are shown; all of them are in the log file. "
        "short leaves out what nobody can act on; requests has the engine log every request too.",
    )
    log_format: Literal["auto", "console", "json"] = Field(
        "auto",
        description="Form of the log: console for people, json for programs; auto: console on a "
        "terminal, json elsewhere.",
    )

    otlp_endpoint: OptionalAddress = Field(
        "",
        description="Engine and gateway send spans to this OpenTelemetry collector (OTLP over "
        "HTTP, such as `http://localhost:4318`).",
    )

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

    @field_validator("nodes_token")
    @classmethod
    def _check_token(cls, value: str) -> str:
        if not value.isascii() or not value.isprintable() or " " in value:
            raise ValueError("a token has letters, digits and signs of ASCII, and no spaces")
        return value

    @field_validator("join")
    @classmethod
    def _check_join(cls, value: str) -> str:
        if value and not _JOIN.fullmatch(value):
            raise ValueError(f"{value!r} is no HEAD or HEAD:PORT")
        return value

    @field_validator("media_domains")
    @classmethod
    def _check_media_domains(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        # vLLM compares whole names, in lower case.
        if dotted := [name for name in value if name.startswith(".")]:
            raise ValueError(f"{dotted[0]!r}: list whole names; vLLM knows no names below one")
        return tuple(name.lower() for name in check_hosts(value))

    @field_validator("status_allowed_hosts")
    @classmethod
    def _check_allowed_hosts(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        return check_hosts(value)

    @property
    def node_address_used(self) -> str:
        """Of the head; a host that joins asks its way to the head (nodes/addresses.py)."""
        return self.node_address or "127.0.0.1"

    @property
    def head_address(self) -> tuple[str, int]:
        """Where to join; the port is not bracketed as an IPv6 address is."""
        match = _JOIN.fullmatch(self.join)
        return (match["host"].strip("[]"), int(match["port"] or NODE_PORT)) if match else ("", 0)

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

    @property
    def compiled_path(self) -> Path:
        """vLLM does not expect another that writes there."""
        return self.cache_path / self._place

    def put_at(self, kind: str, numbers: Sequence[str]) -> Self:
        """On these GPUs, or on the CPU; with folders of its own among the launchers of a host."""
        place, gpus = f"{kind}-{numbers[0]}", tuple(numbers) if kind == "gpu" else ()
        placed = self.model_copy(update={"gpus": gpus, "state_dir": self.state_path / place})
        placed._place = place  # noqa: SLF001 — a copy of its own
        return placed

    @classmethod
    def list_names(cls) -> builtins.set[str]:  # `set` is a setting here
        """One environment and one file serve all commands."""
        return {name for kind in COMMANDS.values() for name in kind.model_fields}


class ServeSettings(LauncherSettings):
    """Starts the engine alone, watches it and brings it back."""

    model_config = SettingsConfigDict(cli_prog_name="python -m launcher serve")


class DoctorSettings(LauncherSettings):
    """Checks this host, the model and every flag before anything is started."""

    model_config = SettingsConfigDict(cli_prog_name="python -m launcher doctor")


class ExplainSettings(LauncherSettings):
    """Shows what the engine would be told, why, and what fits into its memory."""

    # A field named `json` would hide one of pydantic's own.
    model_config = SettingsConfigDict(
        cli_prog_name="python -m launcher explain",
        cli_shortcuts={"json-output": "json", "all-options": "all"},
    )

    json_output: bool = Field(False, description="Print JSON instead of text; `--json` for short.")
    all_options: bool = Field(
        False,
        description="Print every option with its reason, and the command; `--all` for short.",
    )


class TuneSettings(LauncherSettings):
    """Measures the candidates worth trying on this host and keeps the fastest honest one."""

    model_config = SettingsConfigDict(cli_prog_name="python -m launcher tune")

    tune_questions: Path = Field(
        DEMO_QUESTIONS,
        description="Questions that tune measures with, one JSON object with `question` a line.",
    )
    tune_prompts: int = Field(358, ge=1, description="Questions in a batch that tune measures.")
    tune_max_tokens: int = Field(
        128, ge=1, description="Most new tokens of an answer that tune measures."
    )
    tune_rounds: int = Field(2, ge=1, description="Times that tune starts every candidate.")
    tune_repeats: int = Field(
        3, ge=1, description="Batches that tune measures at each start of a candidate."
    )
    tune_minutes: float = Field(
        30.0, gt=0, description="Minutes that tune may take for everything."
    )
    tune_only: str = Field(
        "",
        description="Candidates that tune measures, by the names that `--dry-run` lists, separated "
        "by spaces; empty: all that apply here.",
    )
    tune_max_loss: float = Field(
        0.02, ge=0, le=1, description="ROUGE-L that a candidate may lose against quality's answers."
    )
    tune_into: Path | None = Field(
        None,
        description="Settings file (course.toml) into whose table `[tuned]` tune's result goes "
        "too; read with that file, it holds on every host with the same GPU, model and vLLM.",
    )
    dry_run: bool = Field(False, description="List the candidates of tune and stop.")


COMMANDS: dict[str, type[LauncherSettings]] = {
    "up": LauncherSettings,
    "serve": ServeSettings,
    "doctor": DoctorSettings,
    "explain": ExplainSettings,
    "tune": TuneSettings,
}
S = TypeVar("S", bound=LauncherSettings)


def load_settings(kind: type[S], arguments: Sequence[str] = ()) -> S:
    """Flags, then the environment, then the file; `SettingsError` says what is wrong."""
    return read_settings(kind, _join_pairs(arguments))


def list_settings(kind: type[LauncherSettings] = LauncherSettings) -> list[SettingRow]:
    return describe_settings(kind)


def _join_pairs(arguments: Sequence[str]) -> list[str]:
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
    return [*others, *(["--set", " ".join(pairs)] if pairs else [])]


def _dial(host: str) -> str:
    """Where to call a server that listens on `host`."""
    return {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
