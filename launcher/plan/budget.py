"""What fits: memory of the device against weights, KV cache and working space of the model.

Estimates for planning, shown by `launcher explain`; vLLM measures for itself when it starts.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from common.errors import SettingsError
from launcher.models.model import Model
from launcher.plan.hardware import GIB, Device

_CUDA_CONTEXT_BYTES = 3 * GIB // 4
_GRAPH_BYTES = GIB
_WORTH_FP8_PARAMETERS = 3_000_000_000
_HOST_KV_SHARE = 0.25
_WORKER_CORES = 4  # gateway, server, scheduler, worker
_UNIPROC = "vllm.v1.executor.uniproc_executor.UniProcExecutor"
WORKER_SHARED_BYTES = GIB // 4  # two message queues of 160 MiB, hardly ever full
_HOST_BLOCK_TOKENS = 128  # a sequence takes whole blocks: vLLM 0.32 platforms/cpu.py
_FP8_KV = ("fp8", "fp8_e4m3", "fp8_e5m2")
# The pool sizes a batch down through; the course's own batch has its exact graph.
_COURSE_BATCH = 358
_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "K": 2**10, "M": 2**20, "G": 2**30}


@dataclass(frozen=True)
class Workload:
    """What a profile is sized for."""

    sequences: int
    prompt_tokens: int
    new_tokens: int
    usual_new_tokens: int = 0  # of an answer that ends by itself; 0: not known
    batch: int = 1  # that is sent at once

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.new_tokens

    @property
    def usual_tokens(self) -> int:
        return self.prompt_tokens + (self.usual_new_tokens or self.new_tokens)


@dataclass(frozen=True)
class Budget:
    """Bytes of one device; with tensor parallelism each device holds its share."""

    usable_bytes: int
    weight_bytes: int
    working_bytes: int
    kv_bytes: int
    kv_bytes_per_token: int
    context_tokens: int
    workload: Workload

    @property
    def kv_tokens(self) -> int:
        return self.kv_bytes // max(1, self.kv_bytes_per_token)

    @property
    def workload_sequences(self) -> int:
        return self.kv_tokens // self.workload.tokens

    @property
    def full_sequences(self) -> float:
        return self.kv_tokens / self.context_tokens


@dataclass(frozen=True)
class Sizing:
    """What a rule may look at: `options` are those with plain values, overrides included."""

    device: Device
    model: Model
    workload: Workload
    options: Mapping[str, Any]

    def number(self, name: str, default: float) -> float:
        """An option as a number, in the ways vLLM lets people write one (`16k`, `4G`, `auto`)."""
        value = self.options.get(name, default)
        if value in ("auto", -1, None):
            return default
        match = re.fullmatch(r"(\d+(?:\.\d+)?)([kKmMgG]?)", str(value))
        if not match:
            raise SettingsError(f"--set {name}: {value!r} is no number")
        return float(match[1]) * _UNITS[match[2]]

    def text(self, name: str) -> str:
        return str(self.options.get(name) or "")


def compute_budget(sizing: Sizing) -> Budget:
    shape = sizing.model.shape
    parallel = int(
        sizing.number("tensor-parallel-size", 1) * sizing.number("pipeline-parallel-size", 1)
    )
    element = 1.0 if sizing.text("kv-cache-dtype") in _FP8_KV else 2.0
    per_token = max(1, shape.kv_bytes_per_token(element) // parallel)
    weights = sizing.model.weight_bytes(sizing.text("quantization")) // parallel
    working = _working_bytes(sizing)
    usable = sizing.device.memory_bytes
    if "kv-cache-memory-bytes" in sizing.options:
        kv = int(sizing.number("kv-cache-memory-bytes", 0))
    else:
        usable = int(usable * sizing.number("gpu-memory-utilization", 0.9))
        kv = max(0, usable - weights - working)
    context = int(sizing.number("max-model-len", shape.max_positions))
    return Budget(usable, weights, working, kv, per_token, context, sizing.workload)


def _working_bytes(sizing: Sizing) -> int:
    """Activations of one step, fp32 logits of every sequence, CUDA's own and the graphs' memory."""
    shape = sizing.model.shape
    step = int(sizing.number("max-num-batched-tokens", 8192))
    sequences = int(sizing.number("max-num-seqs", sizing.workload.sequences))
    activations = step * (4 * shape.hidden + 2 * shape.intermediate) * 2
    logits = 2 * sequences * shape.vocabulary * 4
    if not sizing.device.is_gpu:
        return activations + logits
    graphs = 0 if sizing.options.get("enforce-eager") else _GRAPH_BYTES
    return activations + logits + _CUDA_CONTEXT_BYTES + graphs


# --- the rules a profile's `fit` names: value (None: leave the option out) and what decided it ---


def fit_tensor_parallel(sizing: Sizing, _most: int | None) -> tuple[int | None, str]:
    device = sizing.device
    share = sizing.number("gpu-memory-utilization", 0.9)
    weights = sizing.model.weight_bytes(sizing.text("quantization"))
    spare = int(device.memory_bytes * share) - _working_bytes(sizing)
    needed = 1
    while weights / needed > spare * 0.9:
        needed *= 2
        if needed > 1024:
            break
    if needed > device.count:
        raise SettingsError(
            f"{sizing.model.name} does not fit: its weights take {weights / GIB:.1f} GiB and "
            f"{device.title} leaves {max(0, spare) * device.count / GIB:.1f} GiB for them; use "
            "more GPUs, a smaller model or one with quantised weights"
        )
    return (needed, f"{weights / GIB:.1f} GiB of weights") if needed > 1 else (None, "")


def fit_fp8_weights(sizing: Sizing, _most: int | None) -> tuple[str | None, str]:
    shape = sizing.model.shape
    if shape.quantization or shape.linear_parameters < _WORTH_FP8_PARAMETERS:
        # Measured on an H200 with 0.6 billion: 11 % slower than bf16.
        return None, ""
    return "fp8", f"{shape.linear_parameters / 1e9:.1f} billion parameters"


def fit_small_share(sizing: Sizing, _most: int | None) -> tuple[float, str]:
    """Half of the device, or what the weights and a few contexts need."""
    weights = sizing.model.weight_bytes(sizing.text("quantization"))
    kv = 4 * 4096 * sizing.model.shape.kv_bytes_per_token(2.0)
    needed = (weights + _working_bytes(sizing) + kv) / sizing.device.memory_bytes
    share = min(0.9, max(0.5, math.ceil(needed * 20) / 20))
    return share, "half of it" if share == 0.5 else f"{weights / GIB:.1f} GiB of weights"


def fit_context(sizing: Sizing, most: int | None) -> tuple[int, str]:
    own = sizing.model.shape.max_positions
    budget = compute_budget(sizing)
    # vLLM refuses to start when one full context does not fit, and this is an estimate.
    room = max(256, int(budget.kv_tokens * 0.8) // 256 * 256) if sizing.device.is_gpu else own
    value = min(own, most or own, room)
    decided = {own: "the model's own limit", most: "the profile's limit"}
    return value, decided.get(value, "what the KV cache holds")


def fit_sequences(sizing: Sizing, _most: int | None) -> tuple[int, str]:
    """As many of the longest as fit. A batch that fits at its usual length shares the cache all the
    same: in waves it would run at half the speed, and vLLM preempts a few where many are long.
    """
    workload = sizing.workload
    wanted, batch = workload.sequences, workload.batch
    if not sizing.device.is_gpu:
        return wanted, "the KV cache is sized for them"
    tokens = compute_budget(sizing).kv_tokens
    longest, usual = tokens // workload.tokens, tokens // workload.usual_tokens
    decided = f"wanted {wanted}, the KV cache holds {longest:,} of {workload.tokens} tokens"
    value = min(wanted, longest)
    if value < wanted and usual >= batch:
        value = min(wanted, usual)
        decided += f", {usual:,} of the usual {workload.usual_tokens}"
    if 16 <= value < wanted:
        value = max(value // 8 * 8, batch if value >= batch else 0)
    return max(1, value), decided


def fit_graph_sizes(sizing: Sizing, _most: int | None) -> tuple[list[int], str]:
    top = int(sizing.number("max-num-seqs", sizing.workload.sequences))
    sizes = {1, 2, 4, *range(8, 257, 8), *range(272, 513, 16), _COURSE_BATCH, top}
    return sorted(size for size in sizes if size <= min(top, 1024)), f"up to {top}"


def fit_executor(sizing: Sizing, _most: int | None) -> tuple[str | None, str]:
    """A worker process of its own needs a core to run on and room for its message queues."""
    device = sizing.device
    if device.cores and device.cores < _WORKER_CORES:
        return None, ""
    if device.shared_bytes and device.shared_bytes < WORKER_SHARED_BYTES:
        return None, ""
    return "mp", f"{device.cores} cores" if device.cores else "4 cores or more"


def fit_host_executor(sizing: Sizing, _most: int | None) -> tuple[str | None, str]:
    """By its path, because vLLM reads the word `uni` as `mp` on a CPU: it sets up its threads in a
    worker process. Here variables say how many they are, and that nothing binds them to cores.
    """
    kinds = ("tensor", "pipeline", "prefill-context")
    processes = math.prod(sizing.number(f"{kind}-parallel-size", 1) for kind in kinds)
    return (None if processes > 1 else _UNIPROC), ""


def fit_host_kv(sizing: Sizing, _most: int | None) -> tuple[int, str]:
    """Room for the workload, never more than a quarter of the host, at least one full context."""
    per_token = sizing.model.shape.kv_bytes_per_token(2.0)
    context = int(sizing.number("max-model-len", sizing.model.shape.max_positions))
    tokens = -(-sizing.workload.tokens // _HOST_BLOCK_TOKENS) * _HOST_BLOCK_TOKENS
    wanted = sizing.workload.sequences * tokens * per_token
    ceiling = int(sizing.device.memory_bytes * _HOST_KV_SHARE)
    value = max(min(wanted, ceiling), (context + 256) * per_token)
    decided = f"{sizing.workload.sequences} sequences of {tokens} tokens wanted"
    return -(-value // 2**20) * 2**20, decided  # whole MiB read better


def fit_host_threads(sizing: Sizing, _most: int | None) -> tuple[int | None, str]:
    cores = sizing.device.cores
    return (max(1, cores - 1), f"{cores} cores") if cores else (None, "")


# In the order they are computed: later ones look at what earlier ones chose.
RULES: dict[str, Callable[[Sizing, int | None], tuple[Any, str]]] = {
    "fp8-weights": fit_fp8_weights,
    "small-share": fit_small_share,
    "tensor-parallel": fit_tensor_parallel,
    "context": fit_context,
    "host-kv": fit_host_kv,
    "sequences": fit_sequences,
    "graph-sizes": fit_graph_sizes,
    "executor": fit_executor,
    "host-executor": fit_host_executor,
    "host-threads": fit_host_threads,
}
