"""vLLM's worker on a CPU, which asks the kernel for AMX before the model is there.

`vllm serve --worker-cls launcher.plugins.cpu_worker.AmxWorker` (an option of profiles/base.toml).
Whatever starts the workers, they are what computes: the engine's core itself, a process a part, or
one on another host. So this is the one place that is in all of them.
"""

from __future__ import annotations

import torch
from vllm.logger import init_logger
from vllm.v1.worker.cpu_worker import CPUWorker

from launcher.plugins.amx import REFUSED, ask_for_amx

# Below this name vLLM's own handlers write.
logger = init_logger("vllm.cpu_worker")


class AmxWorker(CPUWorker):  # type: ignore[misc]
    def init_device(self) -> None:
        prepare_amx()
        super().init_device()


def prepare_amx() -> None:
    """Refused, this process has no AMX, whatever its CPU says; all of vLLM asks that function."""
    answer = ask_for_amx()
    if answer == REFUSED:
        torch.cpu._is_amx_tile_supported = lambda: False
        logger.warning("AMX: refused by the kernel; bfloat16 is computed without it, and slower")
    else:
        logger.info("AMX: %s", answer)
