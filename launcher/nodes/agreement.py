"""What the hosts of one engine must have in common, what each has of its own, and the command that
follows for one that joins.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from launcher.config import PREFIX, LauncherSettings
from launcher.models.model import Model, find_model
from launcher.nodes.messages import Answer, Option, Part
from launcher.plan.command import (
    EngineCommand,
    InstalledVllm,
    adapt,
    build_arguments,
    find_vllm,
    own_environment,
)
from launcher.plan.engine_plan import EngineOption, parse_overrides
from launcher.plan.fingerprint import describe_model
from launcher.plan.flags.known_flags import Flags, read_flags
from launcher.plan.hardware import Device, find_device
from launcher.plan.prepare import Prepared

_HEADLESS = "launcher.plugins.headless"
# Of the HTTP server, which only the head has, and of the head's own place.
_HEADS_OWN = frozenset(("host", "port", "api-server-count", "node-rank"))
# What each host knows for itself.
_HOSTS_OWN = frozenset(
    (
        "VLLM_API_KEY",
        "VLLM_CACHE_ROOT",
        "VLLM_CONFIG_ROOT",
        "VLLM_HOST_IP",
        "VLLM_LOGGING_CONFIG_PATH",
        "VLLM_LOGGING_LEVEL",
        "GLOO_SOCKET_IFNAME",
        "CUDA_VISIBLE_DEVICES",
        "OMP_NUM_THREADS",
    )
)


@dataclass(frozen=True)
class Host:
    """One that joins, as far as the engine is concerned."""

    settings: LauncherSettings
    vllm: InstalledVllm
    flags: Flags
    device: Device
    model: Model
    digest: str
    address: str


def build_part(prepared: Prepared, environment: Mapping[str, str] = os.environ) -> Part:
    """What the head tells the others of its plan."""
    options, variables = adapt(prepared.plan, prepared.settings, prepared.flags)
    exported = {
        name: value
        for name, value in environment.items()
        if name.startswith("VLLM_") and name not in _HOSTS_OWN
    }
    own = {one.name: str(one.value) for one in variables if one.name not in _HOSTS_OWN}
    return Part(
        vllm=prepared.vllm.version,
        model=_name_model(prepared.settings.model),
        model_digest=describe_model(prepared.plan.model),
        options=[
            Option(name=one.name, value=one.value) for one in options if one.name not in _HEADS_OWN
        ],
        environment={**own, **exported},
    )


def _name_model(model: str) -> str:
    """A folder by its whole path: others have no part in where this launcher was started."""
    path = Path(model).expanduser()
    return str(path.absolute()) if path.is_dir() else model


def look_at_host(settings: LauncherSettings, part: Part, address: str) -> Host:
    """The model is the head's by its name, unless this host's settings say where it is here."""
    if "model" not in settings.model_fields_set:
        settings = settings.model_copy(update={"model": part.model})
    vllm = find_vllm()
    flags = read_flags(vllm.version, settings.cache_path)
    device = find_device(settings.gpu, engine_build=vllm.build, gpus=settings.gpus)
    model = find_model(settings)
    return Host(settings, vllm, flags, device, model, describe_model(model), address)


def find_differences(
    host: Host, answer: Answer, environment: Mapping[str, str] = os.environ
) -> Iterator[str]:
    """Each with what to do about it; none: it can join."""
    part = answer.part
    if host.vllm.version != part.vllm:
        yield (
            f"vLLM {host.vllm.version} is installed here, {part.vllm} at the head: install the "
            "same version on all hosts"
        )
    if host.digest != part.model_digest:
        yield (
            f"the model in {host.model.path} is not the head's ({part.model}): its config.json, or "
            f"names or sizes of its weights, differ; copy it, or set {PREFIX}MODEL to where it is"
        )
    for option in parse_overrides(host.settings.set, host.flags):
        theirs = part.find(option.name)
        if theirs != (None if option.omit else option.value) and option.name not in _HEADS_OWN:
            yield (
                f"{option.name} is {option.value!r} here by {PREFIX}SET, and {theirs!r} at the "
                "head, which decides: leave it out here, or set it there"
            )
    names = {n for n in environment if n.startswith("VLLM_")} | set(part.environment)
    for name in sorted(names - _HOSTS_OWN):
        own = environment.get(name)
        theirs = part.environment.get(name)
        if own is not None and own != theirs:
            yield f"{name} is exported as {own!r} here, and {theirs!r} at the head: unset it here"
    needed = count_processes(answer)
    if host.device.is_gpu and needed > host.device.count:
        yield f"{needed} processes are to run here, and this host has {host.device.title}"


def count_processes(answer: Answer) -> int:
    """Of each host."""
    kinds = ("data", "pipeline", "prefill-context", "tensor")
    sizes = [int(answer.part.find(f"{kind}-parallel-size") or 1) for kind in kinds]
    return math.prod(sizes) // answer.nodes


def build_command(host: Host, answer: Answer) -> EngineCommand:
    """The head's options, with this host's rank, paths and addresses."""
    part, settings = answer.part, host.settings
    options = [EngineOption(one.name, one.value) for one in part.options]
    options += [EngineOption("node-rank", answer.rank), EngineOption("headless", True)]
    model = str(host.model.path)
    head = ["serve", model] if host.vllm.takes_serve else ["--model", model]
    here = settings.model_copy(update={"nodes": answer.nodes, "node_address": host.address})
    own = {
        one.name: str(one.value)
        for one in own_environment(host.model, here)
        if one.name in _HOSTS_OWN
    }
    return EngineCommand(
        host.vllm.module if host.vllm.takes_serve else _HEADLESS,
        (*head, *build_arguments(options, host.flags)),
        {**part.environment, **own},
    )
