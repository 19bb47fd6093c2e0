"""Whose scheduler runs in the engine: the launcher's own, for decoding large batches, or vLLM's.

A profile asks for ours; here is decided whether this vLLM, model and set of options can have it,
and the line that says so in `explain`, `doctor` and the status. The engine looks once more, at what
only it knows (`launcher/plugins/decode_scheduler.py`), and its log says what it found.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from launcher.models.model import Model
from launcher.plan.command import InstalledVllm
from launcher.plan.engine_plan import EnginePlan
from launcher.plugins.known_vllm import find_difference

OPTION = "scheduler-cls"
OURS = "launcher.plugins.decode_scheduler.build_scheduler"
# Options whose work the short way does not know.
_FOREIGN_OPTIONS = {
    "speculative-config": "speculation",
    "enable-lora": "LoRA adapters",
    "kv-transfer-config": "a KV connector",
    "ec-transfer-config": "an encoder connector",
    "kv-events-config": "the events of the KV cache",
    "enable-mfu-metrics": "the count of every step's operations",
}
_SPLITS = (
    "pipeline-parallel-size",
    "decode-context-parallel-size",
    "prefill-context-parallel-size",
)
_SEVERAL_CACHES = ("vision_config", "audio_config", "encoder_layers", "linear_num_key_heads")


def choose_scheduler(plan: EnginePlan, vllm: InstalledVllm) -> EnginePlan:
    """The plan with the scheduler that fits, and with the line that says which."""
    asked = plan.value(OPTION)
    if asked != OURS:
        line = f"{asked}, as asked for" if asked else "vLLM's own: no other is asked for"
        return replace(plan, scheduler=line)
    obstacle = next(_find_obstacles(plan, vllm), "")
    if not obstacle:
        line = f"the launcher's, a short way where all requests decode; {OPTION}= turns it off"
        return replace(plan, scheduler=line)
    kept = tuple(option for option in plan.options if option.name != OPTION)
    return replace(plan, options=kept, scheduler=f"vLLM's own: {obstacle}")


def _find_obstacles(plan: EnginePlan, vllm: InstalledVllm) -> Iterator[str]:
    if difference := find_difference(vllm.version):
        yield difference
    for name, what in _FOREIGN_OPTIONS.items():
        if any(_is_on(o.value) for o in plan.options if o.name.partition(".")[0] == name):
            yield f"the launcher's does not know {what} ({name})"
    for name in _SPLITS:
        if plan.value(name, 1) != 1:
            yield f"the launcher's does not know steps that are cut into parts ({name})"
    if kind := find_model_kind(plan.model):
        yield f"the launcher's knows models of full attention to text alone, this one {kind}"


def _is_on(value: Any) -> bool:
    return value not in (None, False, "", {})


def find_model_kind(model: Model) -> str:
    """What its config.json shows to be unlike a plain text model; empty: nothing."""
    try:
        config = json.loads((model.path / "config.json").read_text(encoding="utf-8"))
    except OSError:  # planned for a folder that is elsewhere
        return ""
    if config.get("is_encoder_decoder"):
        return "has an encoder"
    if found := [name for name in _SEVERAL_CACHES if config.get(name)]:
        return f"has more to it ({found[0]})"
    layers = set(config.get("layer_types") or ()) - {"full_attention"}
    if layers:
        return f"has layers of {', '.join(sorted(layers))}"
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        return "has a sliding window"
    return ""
