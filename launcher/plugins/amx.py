"""Asks the kernel for AMX, Intel's instructions for matrices, for the process that it is called in.

vLLM 0.32 computes bfloat16 on a CPU with AMX wherever the CPU has it. The kernel kills whoever uses
AMX and has not asked for it (SIGILL), and vLLM does not ask: that is left to oneDNN, which asks
when it first multiplies matrices, if it does. The permission belongs to a process and all of its
threads. A fork inherits it and an exec drops it, so each process of the engine that computes has to
ask for itself (`cpu_worker.py`); there is nothing that the launcher could ask on its behalf.

As a program it prints the answer, for `doctor`. It needs torch, and neither vLLM nor this project.
"""

from __future__ import annotations

import torch

NONE, ALLOWED, REFUSED = "none", "allowed", "refused"


def ask_for_amx() -> str:
    """By what vLLM goes by: the CPU's own word, which an old kernel or a sandbox may not follow."""
    if not torch.cpu._is_amx_tile_supported():
        return NONE
    return ALLOWED if torch.cpu._init_amx() else REFUSED


if __name__ == "__main__":
    print(ask_for_amx())  # noqa: T201
