"""What cannot work, said before anything starts: options against the device and the model.

vLLM would say the same of most of these, a minute later and inside a traceback.
"""

from __future__ import annotations

import os
from collections.abc import Callable

from common.errors import SettingsError
from launcher.plan.budget import Sizing

_LONGER = "VLLM_ALLOW_LONG_MAX_MODEL_LEN"
# Options by which a model is made to take more than its config says.
_STRETCHING = ("hf-overrides", "hf-config-path", "rope-scaling")


def check_sizing(sizing: Sizing) -> None:
    """`SettingsError` names the option, what is wrong with it and what would be right."""
    for check in _CHECKS:
        check(sizing)


def _check_share(sizing: Sizing) -> None:
    for name in ("gpu-memory-utilization", "device-memory-utilization"):
        share = sizing.number(name, 0.9)
        if not 0 < share <= 1:
            raise SettingsError(
                f"{name}={share:g} is no share of a device's memory: it must be above 0 and at "
                "most 1, such as 0.9"
            )


def _check_devices(sizing: Sizing) -> None:
    device = sizing.device
    kinds = ("tensor", "pipeline", "prefill-context", "data")
    sizes = {f"{kind}-parallel-size": sizing.number(f"{kind}-parallel-size", 1) for kind in kinds}
    needed = 1
    for name, size in sizes.items():
        if size < 1 or size != int(size):
            raise SettingsError(f"{name}={size:g} is no number of devices; it must be 1 or more")
        needed *= int(size)
    # Other machines bring devices of their own.
    is_alone = sizing.number("nnodes", 1) <= 1 and "data-parallel-size-local" not in sizing.options
    is_alone = is_alone and sizing.text("distributed-executor-backend") != "ray"
    if device.is_gpu and is_alone and needed > device.count:
        asked = ", ".join(f"{name}={size:g}" for name, size in sizes.items() if size > 1)
        raise SettingsError(
            f"{asked} needs {needed} GPUs and there {_count(device.count)}: ask for fewer, or plan "
            f"for more with LAUNCHER_GPU='{needed}x {device.name}'"
        )


def _count(number: int) -> str:
    return "is 1" if number == 1 else f"are {number}"


def _check_heads(sizing: Sizing) -> None:
    parallel = int(sizing.number("tensor-parallel-size", 1))
    heads = sizing.model.shape.heads
    if heads % parallel:
        fitting = [str(number) for number in range(1, heads + 1) if heads % number == 0]
        raise SettingsError(
            f"tensor-parallel-size={parallel}: the {heads} attention heads of {sizing.model.name} "
            f"cannot be divided by it; possible are {', '.join(fitting)}"
        )


def _check_stages(sizing: Sizing) -> None:
    """Eager, and with its cache's size given, vLLM warms nothing up on a CPU; what one stage hands
    to the next is made in the warm-up (v1/worker/cpu_worker.py:190 of vLLM 0.32).
    """
    stages = sizing.number("pipeline-parallel-size", 1)
    if stages > 1 and not sizing.device.is_gpu and sizing.options.get("enforce-eager"):
        raise SettingsError(
            f"pipeline-parallel-size={stages:g} on a CPU: vLLM's second stage fails at its first "
            "request unless the model is compiled; add --set enforce-eager= (the start takes "
            "longer)"
        )


def _check_length(sizing: Sizing) -> None:
    asked, most = sizing.number("max-model-len", 0), sizing.model.shape.max_positions
    if asked and asked < 1:
        raise SettingsError(
            f"max-model-len={asked:g} is no length; leave it out or say -1 for auto"
        )
    is_stretched = any(name in sizing.options for name in _STRETCHING)
    if asked > most and not is_stretched and os.environ.get(_LONGER) != "1":
        raise SettingsError(
            f"max-model-len={asked:g} is beyond {sizing.model.name}, which was made for {most} "
            f"tokens: ask for at most that, stretch it with hf-overrides, or export {_LONGER}=1"
        )


_CHECKS: tuple[Callable[[Sizing], None], ...] = (
    _check_share,
    _check_devices,
    _check_heads,
    _check_stages,
    _check_length,
)
