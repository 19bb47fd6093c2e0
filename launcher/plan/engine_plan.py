"""Profile + device + model -> engine options, each with its reason and its source.

The profiles themselves are data (`profiles/*.toml`), sizes come from `budget.py`, and how options
become an argv is `command.py`'s matter.
"""

from __future__ import annotations

import json
import math
import tomllib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common.errors import SettingsError
from common.files import read_text
from common.settings import suggest
from launcher.models.families import find_parser_rules
from launcher.models.model import Model
from launcher.plan.budget import RULES, Budget, Sizing, Workload, compute_budget
from launcher.plan.checks import check_sizing
from launcher.plan.flags.known_flags import Flags, find_change
from launcher.plan.hardware import Device, read_cpu

_FOLDER = Path(__file__).parent / "profiles"
# Named in the order they are offered.
NAMES = ("course", "throughput", "balanced", "latency", "quality", "development", "cpu")
_NO_COMPILER = "TORCHDYNAMO_DISABLE"
_OWNED = {
    "model": "LAUNCHER_MODEL",
    "host": "LAUNCHER_ENGINE_HOST",
    "port": "LAUNCHER_ENGINE_PORT",
    "served-model-name": "LAUNCHER_SERVED_MODEL_NAME",
    "shutdown-timeout": "LAUNCHER_DRAIN_TIMEOUT_S",
    "allowed-media-domains": "LAUNCHER_MEDIA_DOMAINS",
    # Secrets in an argv are there for everybody to read, in `ps` and in crash cards.
    "api-key": "the gateway's keys instead: the engine is for the gateway alone",
    "hf-token": "the variable HF_TOKEN",
}


@dataclass(frozen=True)
class EngineOption:
    """One option or environment variable of the engine, and why it is there."""

    name: str
    value: Any = None
    reason: str = ""
    source: str = ""
    origin: str = ""  # which layer said so: "course", "course sm_90", "--set", …
    fit: str = ""
    most: int | None = None
    omit: bool = False


@dataclass(frozen=True)
class EnginePlan:
    """Everything about the engine that is decided before it starts."""

    profile: str
    title: str
    device: Device
    model: Model
    options: tuple[EngineOption, ...]
    environment: tuple[EngineOption, ...]
    budget: Budget
    warmup_prompts: int
    notes: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    scheduler: str = ""  # whose it is, and why (scheduler.py)

    def value(self, name: str, default: Any = None) -> Any:
        return next((option.value for option in self.options if option.name == name), default)

    @property
    def served_name(self) -> str:
        return self.model.served_name

    @property
    def n_gpus(self) -> int:
        """That it runs on, over all its hosts."""
        kinds = ("tensor", "pipeline", "data")
        return math.prod(int(self.value(f"{kind}-parallel-size", 1)) for kind in kinds)

    @property
    def sequences(self) -> int | None:
        """That it runs at once; `None` where that is left to vLLM."""
        each = self.value("max-num-seqs")
        copies = self.value("data-parallel-size") or 1
        return int(each) * int(copies) if str(each).isdigit() else None


def _is_own(option: EngineOption | None) -> bool:
    """A profile's, not the user's."""
    return option is not None and option.origin != "--set"


def choose_profile(wanted: str, device: Device) -> str:
    """`auto` is the course's with a GPU, because that is what the gateway serves first of all."""
    if wanted == "auto":
        return "course" if device.is_gpu else "cpu"
    if wanted not in NAMES:
        near = suggest(wanted, NAMES)
        raise SettingsError(
            f"LAUNCHER_PROFILE: there is no profile {wanted!r}{near} (there are {', '.join(NAMES)})"
        )
    return wanted


def build_plan(
    profile: str,
    device: Device,
    model: Model,
    flags: Flags,
    *,
    overrides: Iterable[EngineOption] = (),
    notes: Iterable[str] = (),
) -> EnginePlan:
    """Layers from the general to the particular; `overrides` (tuned, then --set) come last."""
    data, base = _read(profile), _read("base")
    if data.get("device") == "cpu" and device.is_gpu:
        device = read_cpu()
    sections = ("", "gpu" if device.is_gpu else "cpu", device.generation if device.is_gpu else "")
    layers = [
        (tables.get(section, {}) if section else tables, name, section)
        for section in dict.fromkeys(sections)
        for tables, name in ((base, "base"), (data, profile))
    ]
    options: dict[str, EngineOption] = {}
    environment: dict[str, EngineOption] = {}
    for tables, name, section in layers:
        origin = f"{name} {section}".strip()
        options |= _read_options(tables.get("options", {}), origin)
        environment |= _read_options(tables.get("env", {}), origin)
    overrides = tuple(overrides)
    options |= choose_parsers(model, flags, overrides)
    for option in overrides:
        # Variables are upper case, flags never are. An empty value leaves an option out.
        kind = environment if option.name.isupper() else options
        kind[option.name] = replace(option, omit=option.omit or option.value == "")
    workload = Workload(**data["workload"], batch=data["warmup_prompts"])
    check_sizing(Sizing(device, model, workload, _plain(options)))
    options, budget = _fit(options, device, model, workload)
    check_sizing(Sizing(device, model, workload, _plain(options)))  # rules have chosen, too
    environment, _ = _fit(environment, device, model, workload)
    if not _plain(options).get("enforce-eager") and _is_own(environment.get(_NO_COMPILER)):
        del environment[_NO_COMPILER]  # the model itself is to be compiled
    kept = tuple(option for option in options.values() if not option.omit)
    for option in kept:
        head = option.name.partition(".")[0]
        # What this version has no word for is written in its words or left out (command.py).
        if head in flags.kinds or find_change(head) is None:
            flags.check(option.name, origin=option.origin)
    return EnginePlan(
        profile, data["title"], device, model, kept,
        tuple(option for option in environment.values() if not option.omit),
        budget, data["warmup_prompts"], tuple(notes), tuple(_list_warnings(kept, workload)),
    )  # fmt: skip


def _list_warnings(options: Iterable[EngineOption], workload: Workload) -> Iterator[str]:
    """What a rule had to decide, and its user would want to know."""
    most = next((option for option in options if option.name == "max-num-seqs"), None)
    is_own = most is not None and most.origin not in ("--set", "tuned", "tune")
    if most is not None and is_own and most.value < workload.batch:
        yield (
            f"max-num-seqs is {most.value}, as many as the KV cache holds: a batch of "
            f"{workload.batch} runs in waves, at about half the speed. Give it more memory "
            "(gpu-memory-utilization, kv-cache-dtype=fp8, a larger GPU), or, if answers are "
            f"short, --set max-num-seqs={workload.batch}"
        )


def choose_parsers(
    model: Model, flags: Flags, overrides: Iterable[EngineOption]
) -> dict[str, EngineOption]:
    """What reads the model's calls of tools and its thinking; `overrides` may say otherwise."""
    asked = {option.name: option for option in overrides}
    chosen = {
        one.flag: EngineOption(one.flag, one.parser, one.reason, one.source, f"model {one.family}")
        for one in find_parser_rules(model, _read_template(model, asked.get("chat-template")))
        if one.parser in flags.choices.get(one.flag, ())
    }
    reader = {**chosen, **asked}.get("tool-call-parser")
    if reader and not reader.omit:
        name = "enable-auto-tool-choice"
        reason = "without it vLLM ignores the parser and refuses every request with tools"
        source = "vLLM 0.32 renderers/online_renderer.py:254"
        chosen[name] = EngineOption(name, True, reason, source, reader.origin)
    return chosen


def _read_template(model: Model, asked: EngineOption | None) -> str:
    if asked is None or asked.omit:
        return model.chat_template
    try:
        return read_text(Path(str(asked.value)))
    except OSError:  # it may be the template itself
        return str(asked.value)


def parse_overrides(pairs: Iterable[str], flags: Flags) -> list[EngineOption]:
    """`key=value` as the setting `set` has them; a key may be spelt with underscores."""
    options: list[EngineOption] = []
    for pair in pairs:
        key, _, text = pair.partition("=")
        name = flags.resolve(key)
        if name in _OWNED:
            raise SettingsError(f"--set {key}: not here; set {_OWNED[name]}")
        value = parse_value(text, flags.kind(name))
        options.append(EngineOption(name, value, "asked for", "--set", "--set", omit=text == ""))
    names = {option.name for option in options}
    for option in options:
        # A plugin brings parsers that only it knows.
        if not option.omit and f"{option.name.replace('-call', '')}-plugin" not in names:
            flags.check_value(option.name, option.value, origin="--set")
    return options


def parse_value(text: str, kind: str) -> Any:
    if kind in ("switch", "mark") or text.lower() in ("true", "false"):
        if text.lower() not in ("true", "false", "1", "0", "yes", "no", ""):
            raise SettingsError(f"--set: {text!r} is neither true nor false")
        return text.lower() in ("true", "1", "yes")
    if text[:1] in ("{", "["):
        try:
            return json.loads(text)
        except ValueError as error:
            raise SettingsError(f"--set: {text!r} is no JSON: {error}") from None
    if kind == "list":
        return [part for part in text.split(",") if part]
    for number in (int, float):
        try:
            return number(text)
        except ValueError:
            continue
    return text


def _read(profile: str) -> dict[str, Any]:
    return tomllib.loads((_FOLDER / f"{profile}.toml").read_text(encoding="utf-8"))


def _read_options(table: dict[str, dict[str, Any]], origin: str) -> dict[str, EngineOption]:
    return {name: EngineOption(name, origin=origin, **row) for name, row in table.items()}


def _fit(
    options: dict[str, EngineOption], device: Device, model: Model, workload: Workload
) -> tuple[dict[str, EngineOption], Budget]:
    """Rules in their own order, because later ones look at what earlier ones chose."""
    options = dict(options)
    for rule in RULES:
        for option in [option for option in options.values() if option.fit == rule]:
            sizing = Sizing(device, model, workload, _plain(options))
            value, decided = RULES[rule](sizing, option.most)
            reason = f"{option.reason} ({decided})" if decided else option.reason
            options[option.name] = replace(
                option, value=value, reason=reason, fit="", omit=value is None
            )
    return options, compute_budget(Sizing(device, model, workload, _plain(options)))


def _plain(options: dict[str, EngineOption]) -> dict[str, Any]:
    return {c.name: c.value for c in options.values() if not c.omit and not c.fit}
