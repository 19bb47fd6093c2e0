"""All decisions about the engine in one place, before anything starts: settings -> command."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from common.errors import SettingsError
from launcher.config import LauncherSettings
from launcher.models.model import Model, find_model
from launcher.plan.command import EngineCommand, InstalledVllm, build_command, find_vllm
from launcher.plan.engine_plan import (
    EngineOption,
    EnginePlan,
    build_plan,
    choose_profile,
    parse_overrides,
)
from launcher.plan.fingerprint import Fingerprint, take_fingerprint
from launcher.plan.flags.known_flags import Flags, read_flags
from launcher.plan.hardware import Device, find_device
from launcher.plan.scheduler import choose_scheduler
from launcher.plan.sharing import check_sleep
from launcher.plan.spreading import find_layout, list_node_options
from launcher.plan.tuned import read_carried, read_tuned

# Of a whole GPU, as profiles/base.toml has it: the rest is for what vLLM does not count.
_GPU_SHARE = 0.9
_CPU_WORKER = "launcher.plugins.cpu_worker.AmxWorker"


@dataclass(frozen=True)
class Prepared:
    """What is known about an engine before it starts."""

    settings: LauncherSettings
    vllm: InstalledVllm
    flags: Flags
    plan: EnginePlan
    command: EngineCommand
    fingerprint: Fingerprint


def prepare(settings: LauncherSettings) -> Prepared:
    vllm = find_vllm()
    flags = read_flags(vllm.version, settings.cache_path)
    prepared = prepare_with(settings, vllm, flags, find_model(settings))
    device = prepared.plan.device
    if device.is_gpu and vllm.build == "cpu":
        raise SettingsError(
            f"the installed {vllm.title} runs on a CPU only, not on a {device.name}; "
            "`explain` can plan for it"
        )
    return prepared


def prepare_with(
    settings: LauncherSettings, vllm: InstalledVllm, flags: Flags, model: Model
) -> Prepared:
    plan = decide(settings, vllm, flags, model)
    command = build_command(plan, settings, vllm, flags)
    fingerprint = take_fingerprint(vllm, plan.model, plan.device, command)
    return Prepared(settings, vllm, flags, plan, command, fingerprint)


def decide(
    settings: LauncherSettings, vllm: InstalledVllm, flags: Flags, model: Model
) -> EnginePlan:
    """Profile, then what was measured, on this host or for it, then what the user asked for."""
    device = find_device(settings.gpu, engine_build=vllm.build, gpus=settings.gpus)
    warnings = check_sleep(settings, device)
    device, shared = cut_share(device, settings.share)
    profile = choose_profile(settings.profile, device)
    asked = parse_overrides(settings.set, flags)
    tuned, notes = read_tuned(settings.tuned_path, profile, vllm, model, device)
    if tuned is None:
        tuned, more = read_carried(settings.config, profile, vllm, model, device)
        notes = [*notes, *more]
    spread = list_node_options(settings, [*tuned, *asked])
    overrides = [*tuned, *shared, *spread, *asked]
    plan = build_plan(profile, device, model, flags, overrides=overrides, notes=notes)
    find_layout(settings, plan)  # refuses what cannot be dealt out
    plan = replace(plan, warnings=(*plan.warnings, *warnings))
    if settings.nodes == 1 and not settings.gpu_locks:
        plan = replace(plan, notes=(*plan.notes, *_note_idle_gpus(plan)))
    return drop_cpu_worker(choose_scheduler(plan, vllm), vllm)


def drop_cpu_worker(plan: EnginePlan, vllm: InstalledVllm) -> EnginePlan:
    """The launcher's own from a plan whose vLLM has no workers for a CPU: a build for GPUs may be
    started with the profile for a CPU.
    """
    if vllm.build == "cpu" or plan.value("worker-cls") != _CPU_WORKER:
        return plan
    return replace(plan, options=tuple(one for one in plan.options if one.name != "worker-cls"))


def _note_idle_gpus(plan: EnginePlan) -> Iterator[str]:
    used, count = plan.n_gpus, plan.device.count
    if not plan.device.is_gpu or used >= count:
        return
    advice = f"--copies {count // used} starts an engine on each, behind one gateway"
    if plan.model.shape.heads % count == 0:
        advice += f"; --set tensor-parallel-size={count} one over all, for a large model"
    yield f"{count - used} of {count} GPUs stay idle: {advice}"


def cut_share(device: Device, share: float) -> tuple[Device, list[EngineOption]]:
    """What is planned for is the engine's part of the device; vLLM counts a GPU's by itself."""
    if share >= 1:
        return device, []
    if not device.is_gpu:
        memory, cores = int(device.memory_bytes * share), max(1, round(device.cores * share))
        return replace(device, memory_bytes=memory, cores=cores), []
    value = round(share * _GPU_SHARE, 3)
    reason = f"its share of the device is {share:.0%}"
    name = "gpu-memory-utilization"
    return device, [EngineOption(name, value, reason, "launcher settings", "launcher")]
