"""`launcher explain`: what the engine would be told, why, and what fits into its memory."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from common.errors import SettingsError
from launcher.config import LauncherSettings
from launcher.models.model import find_model
from launcher.plan.command import (
    InstalledVllm,
    adapt,
    engine_environment,
    find_vllm,
)
from launcher.plan.compile_cache import describe_cache
from launcher.plan.engine_plan import EngineOption
from launcher.plan.flags.known_flags import Flags, read_flags, read_shipped_flags
from launcher.plan.hardware import GIB, parse_device
from launcher.plan.prepare import Prepared, prepare_with
from launcher.plan.spreading import find_layout
from launcher.sections import find_places


def explain(
    engines: Sequence[LauncherSettings], *, as_json: bool, is_long: bool = False
) -> Iterator[str]:
    """Works without a GPU, without vLLM and without the model's weights. As JSON several engines
    are one list.
    """
    every = map(_prepare, engines)
    if not as_json:
        yield from (_tell(_gather(one), one, is_long=is_long) for one in every)
        return
    facts = [_gather(one) for one in every]
    yield json.dumps(facts if len(facts) > 1 else facts[0], indent=2, ensure_ascii=False)


def _prepare(settings: LauncherSettings) -> Prepared:
    vllm, flags = _find_vllm_or_shipped(settings)
    model = find_model(settings, config_only=True)
    prepared = prepare_with(settings, vllm, flags, model)
    if not settings.gpu_locks:
        return prepared
    kind, numbers, needed = find_places(prepared)  # the first is as good as another
    placed = settings.put_at(kind, list(itertools.islice(numbers, needed)))
    return prepare_with(placed, vllm, flags, model)


def _tell(facts: dict[str, Any], prepared: Prepared, *, is_long: bool) -> str:
    conclusion = _conclude(facts, prepared)
    if is_long:
        return "\n".join((*conclusion, "", _render(facts, prepared)))
    rest = (
        f"`--all` shows the {len(facts['options'])} options, each with its reason, and the command"
    )
    return "\n".join((*conclusion, "", f"{rest}; `--json` is for programs"))


def _find_vllm_or_shipped(settings: LauncherSettings) -> tuple[InstalledVllm, Flags]:
    try:
        vllm = find_vllm()
        flags = read_flags(vllm.version, settings.cache_path)
    except SettingsError:
        vllm, flags = None, read_shipped_flags()
    is_other = bool(settings.gpu) and parse_device(settings.gpu).is_gpu
    if vllm and not (vllm.build == "cpu" and is_other):
        return vllm, flags
    # A GPU that is only planned for is served by the GPU build of the same version.
    module = "vllm.entrypoints.cli.main"
    return InstalledVllm("vllm (not installed here)", flags.version, "gpu", module, True), flags


def _gather(prepared: Prepared) -> dict[str, Any]:
    plan, command, settings = prepared.plan, prepared.command, prepared.settings
    options, environment = adapt(plan, settings, prepared.flags)
    budget = plan.budget
    return {
        "profile": plan.profile,
        "title": plan.title,
        "device": plan.device.title,
        "model": plan.model.name,
        "vllm": prepared.vllm.title,
        "scheduler": plan.scheduler,
        "hosts": describe_hosts(prepared),
        "argv": command.argv,
        "environment": engine_environment(command, {}),
        "options": [_row(option) for option in options],
        "variables": [_row(option) for option in environment],
        "memory": {
            "device_bytes": plan.device.memory_bytes,
            "usable_bytes": budget.usable_bytes,
            "weight_bytes": budget.weight_bytes,
            "working_bytes": budget.working_bytes,
            "kv_bytes": budget.kv_bytes,
            "kv_bytes_per_token": budget.kv_bytes_per_token,
            "kv_tokens": budget.kv_tokens,
            "sequences_of_the_workload": budget.workload_sequences,
            "workload_tokens": budget.workload.tokens,
            "sequences_of_full_context": round(budget.full_sequences, 1),
            "context_tokens": budget.context_tokens,
        },
        "cache": describe_cache(settings.compiled_path, prepared.fingerprint.name),
        "notes": list(plan.notes),
        "warnings": list(plan.warnings),
        "fingerprint": prepared.fingerprint.describe(),
    }


def _conclude(facts: dict[str, Any], prepared: Prepared) -> list[str]:
    """What most people ask for: does it fit, how much at once, and is anything amiss."""
    plan, memory = prepared.plan, facts["memory"]
    sizes = [memory[f"{name}_bytes"] / GIB for name in ("weight", "working", "kv", "usable")]
    at_once = f"{plan.sequences:,}" if plan.sequences else "as many as vLLM takes"
    return [
        f"{plan.model.name} on {facts['device']}, profile {facts['profile']}, {facts['vllm']}",
        "",
        f"runs     {at_once} sequences at once, of up to {memory['context_tokens']:,} tokens each",
        "memory   {:.1f} GiB of weights, {:.1f} to work in, {:.1f} of KV cache, of {:.1f}".format(
            *sizes
        ),
        f"         enough for {_count_sequences(memory)}",
        f"cache    {facts['cache']['line']}",
        *(f"{'hosts' if not rank else '':<8} {row}" for rank, row in enumerate(facts["hosts"])),
        *(f"note     {note}" for note in facts["notes"]),
        *(f"warning  {warning}" for warning in facts["warnings"]),
    ]


def describe_hosts(prepared: Prepared) -> list[str]:
    """What runs where, one line a host; none where the engine runs on one alone."""
    settings = prepared.settings
    layout = find_layout(settings, prepared.plan)
    if layout is None:
        return []
    if settings.nodes_backend == "ray":
        return [f"{layout.processes} processes, on the {layout.nodes} hosts that Ray chooses"]
    names = [f"this one ({settings.node_address_used}:{settings.node_port})"]
    names += [f"{rank + 1} of {layout.nodes}, who joins" for rank in range(1, layout.nodes)]
    return [f"{name}: {layout.describe(rank)}" for rank, name in enumerate(names)]


def _count_sequences(memory: dict[str, Any]) -> str:
    holds = f"{memory['sequences_of_the_workload']:,} sequences of {memory['workload_tokens']:,}"
    full = f"{memory['sequences_of_full_context']:,} of the full {memory['context_tokens']:,}"
    return f"{holds} tokens, or {full}"


def _row(option: EngineOption) -> dict[str, Any]:
    return {
        "name": option.name,
        "value": option.value,
        "reason": option.reason,
        "source": option.source,
        "from": option.origin,
    }


def _render(facts: dict[str, Any], prepared: Prepared) -> str:
    memory = facts["memory"]
    lines = [
        f"profile  {facts['profile']}: {facts['title']}",
        f"model    {facts['model']} ({prepared.plan.model.shape.architecture})",
        f"schedule {facts['scheduler']}",
        "",
        "options",
        *_table(facts["options"]),
        "",
        "environment (what is exported already wins)",
        *_table(facts["variables"]),
        "",
        "memory of one device, estimated",
        *_render_memory(memory),
        "",
        "command",
        "  " + " ".join(f"{k}={shlex.quote(v)}" for k, v in facts["environment"].items()),
        "  " + shlex.join(facts["argv"]),
    ]
    return "\n".join(lines)


def _table(rows: Iterable[dict[str, Any]]) -> list[str]:
    lines = []
    for row in rows:
        lines.append(f"  {row['name']} = {_show(row['value'])}")
        lines.append(f"      {row['reason']}")
        lines.append(f"      [{row['from']}] {row['source']}")
    return lines


def _show(value: Any) -> str:
    if isinstance(value, list) and len(value) > 12:
        return f"{len(value)} values, {value[0]} to {value[-1]}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _render_memory(memory: dict[str, Any]) -> list[str]:
    def gib(key: str) -> str:
        return f"{memory[key] / GIB:7.2f} GiB"

    per_token = f"{memory['kv_bytes_per_token'] / 1024:,.1f} KiB a token"
    return [
        f"  usable   {gib('usable_bytes')} of {memory['device_bytes'] / GIB:.1f}",
        f"  weights  {gib('weight_bytes')}",
        f"  working  {gib('working_bytes')}  activations, logits, graphs",
        f"  KV cache {gib('kv_bytes')}  {per_token}: {memory['kv_tokens']:,} tokens",
        f"  holds    {_count_sequences(memory)}",
    ]
