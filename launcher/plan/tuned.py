"""What `launcher tune` found, and whether it may be used: `tuned.toml` on the host it was measured
on; and, where somebody asked for that, the table `[tuned]` of a settings file, which travels.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from common.errors import SettingsError
from common.files import read_text, write_file
from common.settings import TUNED_TABLE, read_settings_file
from common.toml_edit import render_value, replace_table
from launcher.models.model import Model
from launcher.plan.command import InstalledVllm
from launcher.plan.engine_plan import EngineOption
from launcher.plan.fingerprint import describe_model, take_host_key
from launcher.plan.hardware import Device

# What is tuned is the course's batch; on a CPU the profile `cpu` serves it.
_USED_BY = ("course", "cpu")


def read_tuned(
    path: Path, profile: str, vllm: InstalledVllm, model: Model, device: Device
) -> tuple[list[EngineOption] | None, list[str]]:
    """The measured options, which may be none at all, or None where nothing was measured that fits;
    and the line that says which and why.
    """
    if profile not in _USED_BY or not path.is_file():
        return None, []
    try:
        data = tomllib.loads(read_text(path))
        key, wanted = data["host_key"], data["profile"]
        changes, summary = {**data["options"], **data["environment"]}, data["summary"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{path} cannot be read ({error}); run `tune` or delete it") from None
    if wanted != profile:
        return None, []
    if key != take_host_key(vllm, model, device):
        return None, [f"{path} was measured for another host, model or vLLM: not used"]
    return _build_options(changes, f"measured here: {summary}"), [f"{path}: {summary}"]


def _build_options(changes: Mapping[str, Any], source: str) -> list[EngineOption]:
    reason = "fastest of those measured"
    return [EngineOption(name, value, reason, source, "tuned") for name, value in changes.items()]


def read_carried(
    path: Path | None, profile: str, vllm: InstalledVllm, model: Model, device: Device
) -> tuple[list[EngineOption], list[str]]:
    """Of a settings file, whatever host it was measured on: its owner put it there for this one."""
    table = read_settings_file(path).get(TUNED_TABLE) if path else None
    if table is None or profile not in _USED_BY:
        return [], []
    try:
        wanted, place = table["profile"], f"[{TUNED_TABLE}] of {path}"
        changes, summary = {**table["options"], **table["environment"]}, table["summary"]
        measured = {name: table[name] for name in _describe_place(vllm, model, device)}
    except (KeyError, TypeError) as error:
        raise SettingsError(
            f"[{TUNED_TABLE}] of {path} cannot be read ({error!r}); run `tune --tune-into` or "
            "take it out"
        ) from None
    here = _describe_place(vllm, model, device)
    other = [
        f"{name} {measured[name]}, not {here[name]}"
        for name in here
        if measured[name] != here[name]
    ]
    if wanted != profile:
        other.insert(0, f"profile {wanted}, not {profile}")
    if other:
        return [], [f"{place} was measured for {', '.join(other)}: not used"]
    return _build_options(changes, f"measured elsewhere: {summary}"), [f"{place}: {summary}"]


def _describe_place(vllm: InstalledVllm, model: Model, device: Device) -> dict[str, str]:
    """What must be the same for a result to travel: neither the driver nor the host's cores."""
    card = f"{device.count}x {device.name}" if device.is_gpu else "CPU"
    return {"device": card, "model": describe_model(model), "vllm": vllm.version.partition("+")[0]}


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
        *(f'"{name}" = {render_value(value)}' for name, value in options.items()),
        "",
        "[environment]",
        *(f"{name} = {render_value(value)}" for name, value in environment.items()),
    ]
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, "\n".join(lines) + "\n")


def carry_tuned(
    path: Path,
    vllm: InstalledVllm,
    model: Model,
    device: Device,
    *,
    profile: str,
    options: Mapping[str, Any],
    environment: Mapping[str, str],
    summary: str,
) -> None:
    """Into a settings file, for every host of this kind."""
    table = {
        "profile": profile,
        "summary": summary,
        **_describe_place(vllm, model, device),
        "options": dict(options),
        "environment": dict(environment),
    }
    replace_table(path, TUNED_TABLE, table)
