"""EngineCore's loop around a real scheduler and its real KV-cache manager, with a made-up worker.

The worker keeps what vLLM's workers keep of a request, and objects to a step that they could not
run. Its tokens depend on the request and the position alone, so that schedulers can be compared.
Whoever imports this imports vLLM.
"""

from __future__ import annotations

import random
import zlib
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from vllm.config import CacheConfig, DeviceConfig, SchedulerConfig, VllmConfig
from vllm.sampling_params import RequestOutputKind, SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_utils import get_request_block_hasher, init_none_hash
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine import EngineCoreOutputs
from vllm.v1.kv_cache_interface import (
    FullAttentionSpec,
    KVCacheConfig,
    KVCacheGroupSpec,
    SlidingWindowSpec,
)
from vllm.v1.outputs import LogprobsLists, ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from lab.scheduler.engine_setup import EngineSetup


def build_config(setup: EngineSetup) -> VllmConfig:
    config = VllmConfig(
        device_config=DeviceConfig("cpu"),
        cache_config=CacheConfig(
            block_size=setup.block_size, enable_prefix_caching=setup.has_prefix_cache
        ),
        scheduler_config=SchedulerConfig(
            max_num_seqs=setup.sequences,
            max_num_batched_tokens=setup.step_tokens,
            max_model_len=setup.context,
            long_prefill_token_threshold=setup.chunk_tokens,
            policy=setup.policy,
            is_encoder_decoder=False,
        ),
    )
    config.scheduler_config.async_scheduling = setup.is_async  # a CPU's config turns it off
    config.cache_config.num_gpu_blocks = setup.blocks
    # Inspecting a real model takes vLLM ten seconds and another process.
    config.model_config = SimpleNamespace(
        max_model_len=setup.context,
        uses_mrope=False,
        is_encoder_decoder=False,
        is_diffusion=False,
        runner_type="generate",
        multimodal_config=None,
        supports_multimodal_inputs=False,
        return_sampling_mask=False,
        skip_tokenizer_init=True,
    )
    return config


def build_scheduler(
    setup: EngineSetup, config: VllmConfig, build: Callable[..., Scheduler]
) -> Scheduler:
    """`build` is a scheduler's class, or whatever else `--scheduler-cls` may name."""
    shape = {"num_kv_heads": 1, "head_size": 1, "dtype": torch.float32}
    spec = (
        SlidingWindowSpec(block_size=setup.block_size, sliding_window=setup.window, **shape)
        if setup.window
        else FullAttentionSpec(block_size=setup.block_size, **shape)
    )
    scheduler = build(
        vllm_config=config,
        kv_cache_config=KVCacheConfig(
            num_blocks=setup.blocks,
            kv_cache_tensors=[],
            kv_cache_groups=[KVCacheGroupSpec(["layer"], spec)],
        ),
        structured_output_manager=AnyGrammar(),
        block_size=setup.block_size,
        hash_block_size=setup.block_size,
        log_stats=True,
        include_finished_set=setup.has_clients,
    )
    scheduler.use_v2_model_runner = setup.is_v2_runner  # a CPU's config has none
    return scheduler


def build_hasher(setup: EngineSetup) -> Callable[[Request], list[Any]] | None:
    if not setup.has_prefix_cache:
        return None
    init_none_hash(sha256)
    hasher: Callable[[Request], list[Any]] = get_request_block_hasher(setup.block_size, sha256)
    return hasher


def build_request(
    name: str, prompt: list[int], most_tokens: int, is_stream: bool, hasher: Any
) -> Request:
    """Greedy, and ended by its length alone."""
    params = SamplingParams(
        temperature=0.0,
        max_tokens=most_tokens,
        ignore_eos=True,
        output_kind=RequestOutputKind.DELTA if is_stream else RequestOutputKind.FINAL_ONLY,
    )
    return Request(name, prompt, params, None, block_hasher=hasher)


class AnyGrammar:
    """A structured-output manager whose grammars take every token."""

    def accept_tokens(self, _request: Request, _tokens: list[int]) -> bool:
        return True

    def grammar_bitmask(self, *_: Any) -> None:
        return None


class BadStep(Exception):
    """No worker could run it."""


def check(is_so: bool, what: str) -> None:
    if not is_so:
        raise BadStep(what)


@dataclass
class WorkerRequest:
    blocks: list[int]
    length: int  # tokens known here: the prompt's and the sampled ones
    wants_logprobs: bool


class MadeUpWorker:
    """What a model runner does with a step, but for the model."""

    def __init__(self, setup: EngineSetup, vocabulary: int, seed: int = 0) -> None:
        self._setup = setup
        self._vocabulary = vocabulary
        self._seed = seed
        self._requests: dict[str, WorkerRequest] = {}
        self._last: set[str] = set()
        self._steps = 0

    def run(self, step: SchedulerOutput) -> ModelRunnerOutput:
        for name in step.finished_req_ids:
            self._requests.pop(name, None)
        starts = self._note_new(step) | self._note_known(step)
        names = list(step.num_scheduled_tokens)
        self._last = set(names)
        self._steps += 1
        if self._steps % 3 == 0:  # a persistent batch has an order of its own
            random.Random(self._steps).shuffle(names)
        rows = [
            self._compute(name, starts[name], step.num_scheduled_tokens[name]) for name in names
        ]
        return ModelRunnerOutput(
            req_ids=names,
            req_id_to_index={name: place for place, name in enumerate(names)},
            sampled_token_ids=rows,
            logprobs=self._make_logprobs(names),
        )

    def _note_new(self, step: SchedulerOutput) -> dict[str, int]:
        starts = {}
        for new in step.scheduled_new_reqs:
            tokens = new.prefill_token_ids if self._setup.is_v2_runner else new.prompt_token_ids
            wants = new.sampling_params.num_logprobs is not None
            self._requests[new.req_id] = WorkerRequest(list(new.block_ids[0]), len(tokens), wants)
            starts[new.req_id] = new.num_computed_tokens
        return starts

    def _note_known(self, step: SchedulerOutput) -> dict[str, int]:
        known, starts = step.scheduled_cached_reqs, {}
        for name, computed, blocks, outputs in zip(
            known.req_ids,
            known.num_computed_tokens,
            known.new_block_ids,
            known.num_output_tokens,
            strict=True,
        ):
            request = self._requests[name]
            if name in known.resumed_req_ids:
                request.blocks = list(blocks[0])
            elif blocks is not None:
                request.blocks += blocks[0]
            is_fresh = name in known.resumed_req_ids or name not in self._last
            if is_fresh and not self._setup.is_v2_runner:
                check(outputs == 0 or name in known.all_token_ids, f"{name} is forgotten")
                if name in known.all_token_ids:
                    request.length = len(known.all_token_ids[name])
            starts[name] = computed
        return starts

    def _compute(self, name: str, start: int, count: int) -> list[int]:
        request = self._requests[name]
        end = start + count
        room = len(request.blocks) * self._setup.block_size
        check(end <= room, f"{name} has room for {room} tokens, not for {end}")
        check(end <= request.length, f"{name}: position {end} of {request.length} tokens")
        if end < request.length:
            return []
        request.length += 1
        return [zlib.crc32(f"{self._seed} {name} {end}".encode()) % self._vocabulary]

    def _make_logprobs(self, names: list[str]) -> LogprobsLists | None:
        if not any(self._requests[name].wants_logprobs for name in names):
            return None
        shape = (len(names), 2)
        return LogprobsLists(np.zeros(shape, int), np.zeros(shape), np.zeros(len(names), int))


@dataclass
class MadeUpEngine:
    """`EngineCore.step_with_batch_queue`, which with one place is `EngineCore.step`."""

    scheduler: Scheduler
    worker: MadeUpWorker
    places: int
    under_way: deque[tuple[SchedulerOutput, ModelRunnerOutput]] = field(default_factory=deque)
    aborts: list[str] = field(default_factory=list)  # those that come while a step runs

    def step(self) -> tuple[SchedulerOutput | None, dict[int, EngineCoreOutputs]]:
        scheduled = None
        if self.scheduler.has_requests():
            scheduled = self.scheduler.schedule()
            self.under_way.append((scheduled, self.worker.run(scheduled)))
            is_busy = scheduled.total_num_scheduled_tokens > 0 or self.scheduler.has_requests()
            if len(self.under_way) < self.places and is_busy:
                return scheduled, {}
        if not self.under_way:
            return scheduled, {}
        done, tokens = self.under_way.popleft()
        if self.aborts:
            self.scheduler.finish_requests(self.aborts, RequestStatus.FINISHED_ABORTED)
            self.aborts = []
        return scheduled, self.scheduler.update_from_output(done, tokens)
