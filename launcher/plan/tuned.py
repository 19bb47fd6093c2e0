"""`tuned.toml`: what `launcher tune` found on this host, and whether it may be used."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import SettingsError
from common.files import read_text, write_file
from launcher.models.model import Model
from launcher.plan.command import InstalledVllm
from launcher.plan.engine_plan import EngineOption
from launcher.plan.fingerprint import take_host_key
from launcher.plan.hardware import Device

# What is tuned is the course's batch; on a CPU the profile `cpu` serves it.
_USED_BY = ("course", "cpu")


def read_tuned(
    path: Path, profile: str, vllm: InstalledVllm, model: Model, device: Device
) -> tuple[list[EngineOption], list[str]]:
    """The measured options, or none; and the line that says which and why."""
    if profile not in _USED_BY or not path.is_file():
        return [], []
    try:
        data = tomllib.loads(read_text(path))
        key, wanted = data["host_key"], data["profile"]
        changes, summary = {**data["options"], **data["environment"]}, data["summary"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{path} cannot be read ({error}); run `tune` or delete it") from None
    if wanted != profile:
        return [], []
    if key != take_host_key(vllm, model, device):
        return [], [f"{path} was measured for another host, model or vLLM: not used"]
    source = f"measured here: {summary}"
    options = [
        EngineOption(name, value, "fastest of those measured on this host", source, "tuned")
        for name, value in changes.items()
    ]
    return options, [f"{path}: {summary}"]


def write_tuned(
    path: Path,
    *,
    host_key: str,
    profile: str,
    options: Mapping[str, Any],
    environment: Mapping[str, str],
    summary: str,
    measurements: str,
) -> None:
    lines = [
        "# Written by `launcher tune`; used by this profile while vLLM, the model and the GPU stay",
        "# as they were. Delete it to go back to the profile as shipped.",
        f'host_key = "{host_key}"',
        f'profile = "{profile}"',
        f"summary = {json.dumps(summary, ensure_ascii=False)}",
        f"measurements = {json.dumps(measurements)}",
        "",
        "[options]",
        *(f'"{name}" = {_toml(value)}' for name, value in options.items()),
        "",
        "[environment]",
        *(f"{name} = {_toml(value)}" for name, value in environment.items()),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "\n".join(lines) + "\n")


def _toml(value: Any) -> str:
    """JSON's words are TOML's too, but for tables."""
    if isinstance(value, dict):
        return "{ " + ", ".join(f'"{k}" = {_toml(v)}' for k, v in value.items()) + " }"
    return json.dumps(value, ensure_ascii=False)
