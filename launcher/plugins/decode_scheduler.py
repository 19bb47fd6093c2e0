"""vLLM's scheduler with a short way through steps in which every request only decodes.

`vllm serve --scheduler-cls launcher.plugins.decode_scheduler.build_scheduler` (a profile's option,
docs/launcher.md). vLLM asks of each request, in each step and in Python, everything that could be
asked; in a large batch the GPU waits for that. Where one step is like the last one but for a token
a request, the answers are known: `DecodeBatch` holds the requests as columns, and only those that
need a block, end or have something to hand over are touched one by one.

The rules, in order of weight:
- Everything else goes vLLM's own way, `super()`: prefill, admission, preemption, structured output,
  log-probabilities, whatever `find_obstacle` and `is_plain` name. Before it, the batch is settled:
  its counters are written back, so that vLLM finds its requests as it would have left them.
- The short way takes the steps of vLLM's way and no others: blocks are taken, cached and freed by
  the same calls in the same order, so both give the same tokens the same places.
- The tokens of an answer that nobody reads before its end (`may_wait`) are handed over in bundles
  of `HELD_TOKENS`: a message a token costs the engine and its front end as much as scheduling does.
  What is handed over is cut from the request's own list, so nothing is kept twice or lost. An
  answer aborted from outside ends with its last bundle.
- Plan, then commit: until a step is known to be simple, nothing is changed. What contradicts the
  books ends the short way for good (`_give_up`), with one line in the log, and vLLM's way goes on.

Not here: which vLLM this fits (`known_vllm.py`), and when a profile asks for it (`launcher/plan`).
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from itertools import compress
from typing import Any, TypeVar

import numpy as np
import vllm
from vllm.logger import init_logger
from vllm.v1.core.kv_cache_coordinator import (
    KVCacheCoordinatorNoPrefixCache,
    UnitaryKVCacheCoordinator,
)
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.interface import PauseState
from vllm.v1.core.sched.output import CachedRequestData, SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.core.sched.utils import check_stop, remove_all
from vllm.v1.core.single_type_kv_cache_manager import FullAttentionManager
from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
from vllm.v1.outputs import ModelRunnerOutput
from vllm.v1.request import Request, RequestStatus

from launcher.plugins.decode_batch import Column, DecodeBatch, Mask
from launcher.plugins.known_vllm import find_difference

HELD_TOKENS = 16
# From the step's beginning to the next one's: a slow engine hands over each step, or its caller and
# whoever watches its counters would wait for seconds.
SLOW_STEP_S = 0.0125
# Below this name vLLM's own handlers write; `launcher/engine/vllm_log.py` reads the lines.
logger = init_logger("vllm.decode_scheduler")
T = TypeVar("T")


def build_scheduler(*, vllm_config: Any, **rest: Any) -> Scheduler:
    """What `--scheduler-cls` names: ours on a vLLM that is known, vLLM's own on any other."""
    is_async = vllm_config.scheduler_config.async_scheduling
    if difference := find_difference(vllm.__version__.partition("+")[0]):
        logger.warning("Decode scheduler: off, vLLM's own runs: %s", difference)
        kind = AsyncScheduler if is_async else Scheduler
    else:
        kind = AsyncDecodeScheduler if is_async else DecodeScheduler
    return kind(vllm_config=vllm_config, **rest)


class Contradiction(Exception):
    """The batch's books and vLLM's own disagree."""


class DecodeScheduler(Scheduler):  # type: ignore[misc]
    """Over vLLM's scheduler for engines that wait for each step's tokens before the next step."""

    has_placeholders = False
    _manager: Any  # of the one group of KV caches
    # vLLM's own, which it does not declare.
    running: list[Request]
    finished_req_ids: set[str]
    reset_preempted_req_ids: set[str]

    def __init__(self, *args: Any, **rest: Any) -> None:
        self.num_executed_steps = 0  # vLLM's own from 0.33 on
        super().__init__(*args, **rest)
        self._batch: DecodeBatch | None = None
        self._held: dict[str, list[int]] = {}  # of requests that are in no batch
        self._blocker: Request | None = None
        self._updated_at = 0.0
        self.steps = {"short": 0, "long": 0, "short_updates": 0, "long_updates": 0}
        obstacle = find_obstacle(self)
        self._is_on = not obstacle
        if obstacle:
            logger.info("Decode scheduler: off, vLLM's own runs: %s", obstacle)
            return
        (self._manager,) = self.kv_cache_manager.coordinator.single_type_managers
        size = self._manager.block_size
        # A divisor of the block, so that a full block and a full bundle come together. None where
        # weights are exchanged: tokens are labelled with those of the time they are handed over.
        is_exchanged = self.vllm_config.weight_transfer_config is not None
        most = 1 if is_exchanged else HELD_TOKENS
        self._bundle = max(n for n in range(1, most + 1) if size % n == 0)
        budgets = (self.max_num_scheduled_tokens, self.scheduler_config.max_num_batched_tokens)
        self._most_requests = min(budgets)
        logger.info("Decode scheduler: on, bundles of %d tokens", self._bundle)

    # --- a step ---

    def schedule(self, throttle_prefills: bool = False) -> SchedulerOutput:
        if self._is_on and not throttle_prefills and self._admits_nobody():
            output = self._schedule_decode()
            if output is not None:
                self.steps["short"] += 1
                return output
        self.steps["long"] += 1
        self._settle()
        return super().schedule(throttle_prefills)

    def _admits_nobody(self) -> bool:
        """Nobody waits, or every place is taken: vLLM would look at the running ones only."""
        if self._pause_state != PauseState.UNPAUSED or not self.running:
            return False
        if not self.waiting and not self.kv_holding_waiting:
            return True
        taken = len(self.running) + self.num_waiting_for_streaming_input
        return bool(taken >= self.max_num_active_reqs)

    def _schedule_decode(self) -> SchedulerOutput | None:
        batch = self._batch or self._form_batch()
        if batch is None:
            return None
        plan = self._try(lambda: self._plan_step(batch))
        if plan is None:
            return None
        goes, growing = plan
        self.current_step += 1
        self.num_executed_steps += 1
        self.kv_cache_manager.new_step_starts()
        new_blocks = self._take_blocks(batch, growing)
        if self.kv_cache_manager.enable_caching:
            # As `allocate_slots` does: blocks whose last token is known, if not yet computed.
            self._cache_blocks(batch, batch.known, goes)
        output = self._build_step(batch, goes, new_blocks)
        if not self.use_v2_model_runner:
            self.prev_step_scheduled_req_ids = set(output.num_scheduled_tokens)
        batch.position += 1 if goes is None else goes
        self.finished_req_ids, self.reset_preempted_req_ids = set(), set()
        waiting = self.get_request_counts()[1]
        self.prefill_capacity_bound = waiting > len(self.deferred_waiting)
        return output

    def _build_step(
        self, batch: DecodeBatch, goes: Mask | None, new_blocks: list[Any]
    ) -> SchedulerOutput:
        """Of copies: the last step's may still be on its way to the worker."""
        ids, positions, one_token_each = batch.ids, batch.position, batch.one_token_each
        outputs = positions + 1 - batch.prompt
        if goes is not None:
            ids, new_blocks = list(compress(ids, goes)), list(compress(new_blocks, goes))
            positions, outputs = positions[goes], outputs[goes]
            one_token_each = dict.fromkeys(ids, 1)
        cached = CachedRequestData(
            req_ids=ids.copy(),
            resumed_req_ids=set(),
            new_token_ids=[],
            all_token_ids={},
            new_block_ids=new_blocks,
            num_computed_tokens=positions.tolist(),
            num_output_tokens=outputs.tolist(),
        )
        return SchedulerOutput(
            scheduled_new_reqs=[],
            scheduled_cached_reqs=cached,
            num_scheduled_tokens=one_token_each.copy(),
            total_num_scheduled_tokens=len(ids),
            scheduled_spec_decode_tokens={},
            scheduled_encoder_inputs={},
            preempted_req_ids=self.reset_preempted_req_ids,
            finished_req_ids=self.finished_req_ids,
            free_encoder_mm_hashes=self.encoder_cache_manager.get_freed_mm_hashes(),
            new_block_ids_to_zero=self._get_new_block_ids_to_zero(),
            ec_manager_metadata=self.encoder_cache_manager.get_manager_metadata(),
        )

    def _plan_step(self, batch: DecodeBatch) -> tuple[Mask | None, list[int]] | None:
        """Who goes (None: all), and who needs a block for it; None: vLLM's way."""
        if not (len(self.running) == len(batch.ids) and self.running[-1] is batch.requests[-1]):
            raise Contradiction("requests came or went unseen")
        if not self.has_placeholders and (batch.position >= batch.known).any():
            return None  # a step is under way, and this kind of engine waits for it
        is_v1 = not self.use_v2_model_runner
        if is_v1 and not self.prev_step_scheduled_req_ids.issuperset(batch.ids):
            return None  # it forgets whom a step leaves out, and must be told their tokens again
        goes = ~batch.find_ending()
        if not goes.any():
            return None
        needs_block = (batch.position % self._manager.block_size == 0) & goes
        growing: list[int] = np.flatnonzero(needs_block).tolist()
        if len(growing) > self.kv_cache_manager.block_pool.get_num_free_blocks():
            return None  # somebody has to be preempted
        for place in growing:
            room = len(self._manager.req_to_blocks[batch.ids[place]]) * self._manager.block_size
            if room != batch.position[place]:
                raise Contradiction(f"blocks for {room} tokens, {batch.position[place]} booked")
        return None if goes.all() else goes, growing

    def _take_blocks(
        self, batch: DecodeBatch, growing: list[int]
    ) -> list[tuple[list[int], ...] | None]:
        blocks: list[tuple[list[int], ...] | None] = [None] * len(batch.ids)
        for place in growing:
            tokens = int(batch.position[place]) + 1
            taken = self.kv_cache_manager.coordinator.allocate_new_blocks(
                batch.ids[place], tokens, tokens
            )
            blocks[place] = tuple([block.block_id for block in group] for group in taken)
        return blocks

    def _cache_blocks(self, batch: DecodeBatch, tokens: Column, goes: Mask | None = None) -> None:
        full = tokens // self._manager.block_size
        is_new = full > batch.cached
        if goes is not None:
            is_new &= goes
        for place in np.flatnonzero(is_new).tolist():
            request = batch.requests[place]
            self.kv_cache_manager.coordinator.cache_blocks(request, int(tokens[place]))
        batch.cached[is_new] = full[is_new]

    # --- its tokens ---

    def update_from_output(
        self, scheduler_output: SchedulerOutput, model_runner_output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        batch = self._batch
        if batch is not None and self._is_plain_update(
            batch, scheduler_output, model_runner_output
        ):
            tokens = self._try(
                lambda: self._plan_update(batch, scheduler_output, model_runner_output)
            )
            if tokens is not None:
                self.steps["short_updates"] += 1
                return self._update_decode(batch, tokens, model_runner_output)
        self.steps["long_updates"] += 1
        self._settle()
        # Taken out of reach: an error below ends requests, and what they held goes with the error.
        held, self._held = self._held, {}
        outputs: dict[int, EngineCoreOutputs] = super().update_from_output(
            scheduler_output, model_runner_output
        )
        if held:
            for one in (one for group in outputs.values() for one in group.outputs):
                one.new_token_ids = [*held.pop(one.request_id, ()), *one.new_token_ids]
            self._held = {name: held[name] for name in held if name in self.requests}
        return outputs

    def _is_plain_update(
        self, batch: DecodeBatch, scheduled: SchedulerOutput, output: ModelRunnerOutput
    ) -> bool:
        return not (
            batch.has_news
            or scheduled.total_num_scheduled_tokens != len(scheduled.num_scheduled_tokens)
            or output.logprobs is not None
            or output.prompt_logprobs_dict
            or output.prompt_token_id_logprobs_dict
            or output.pooler_output
            or output.kv_connector_output is not None
            or output.ec_connector_output is not None
            or output.aux_output_connector_output
            or output.sampling_masks is not None
            or output.num_nans_in_logits
            or self.grammar_compile_error_reqs
            or self.encoder_cache_mismatch_reqs
        )

    def _plan_update(
        self, batch: DecodeBatch, scheduled: SchedulerOutput, output: ModelRunnerOutput
    ) -> list[int] | None:
        tokens = batch.read_tokens(output)
        if tokens is None:
            return None
        asked = scheduled.num_scheduled_tokens
        if len(asked) != len(batch.ids):
            # The others have ended since, or vLLM's way must see to them.
            others = asked.keys() - batch.one_token_each.keys()
            if not self.requests.keys().isdisjoint(others):
                return None
        for place in np.flatnonzero((batch.known + 1) % self._bundle == 0).tolist():
            if len(batch.texts[place]) != batch.known[place]:
                there = len(batch.texts[place])
                raise Contradiction(f"{there} tokens of a request, {batch.known[place]} booked")
        return tokens

    def _update_decode(
        self, batch: DecodeBatch, tokens: list[int], output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        batch.add(tokens)
        manager = self.kv_cache_manager
        if manager.enable_caching:
            for place in np.flatnonzero(batch.known % self.hash_block_size == 0).tolist():
                batch.requests[place].update_block_hashes()
        stopped = [
            place
            for place in batch.find_stopped(tokens)
            if check_stop(batch.requests[place], self.max_model_len)
        ]
        if self.has_placeholders and manager.enable_caching:
            self._cache_blocks(batch, batch.known - 1)
        outputs = self._hand_over(batch, stopped)
        if stopped:
            self.running = remove_all(self.running, {batch.requests[place] for place in stopped})
            batch.drop(stopped)
            if not batch.ids:
                self._batch = None
        return self._wrap(outputs, output)

    def _hand_over(
        self, batch: DecodeBatch, stopped: list[int]
    ) -> dict[int, list[EngineCoreOutput]]:
        now = time.monotonic()
        is_slow, self._updated_at = now - self._updated_at > SLOW_STEP_S, now
        speaks = ~batch.may_wait | (batch.known % self._bundle == 0) | is_slow
        speaks[stopped] = True
        ended = set(stopped)
        outputs: dict[int, list[EngineCoreOutput]] = defaultdict(list)
        for place in np.flatnonzero(speaks).tolist():
            request, answer = batch.requests[place], batch.answers[place]
            reason = None
            if place in ended:
                reason = request.get_finished_reason()
                self._free_request(request)
            outputs[request.client_index].append(
                EngineCoreOutput(
                    request_id=batch.ids[place],
                    new_token_ids=answer[batch.handed[place] :],
                    finish_reason=reason,
                    stop_reason=request.stop_reason,
                    trace_headers=request.trace_headers,
                    num_nans_in_logits=request.num_nans_in_logits,
                )
            )
            batch.handed[place] = len(answer)
        return outputs

    def _wrap(
        self, outputs: dict[int, list[EngineCoreOutput]], output: ModelRunnerOutput
    ) -> dict[int, EngineCoreOutputs]:
        wrapped = {client: EngineCoreOutputs(outputs=rows) for client, rows in outputs.items()}
        ended = self.finished_req_ids_dict
        for client, names in (ended or {}).items():
            wrapped.setdefault(client, EngineCoreOutputs()).finished_requests = names
        if ended:
            ended.clear()
        # Without outputs there is no message: the next one brings what was counted until then.
        if wrapped or output.cudagraph_stats is not None:
            stats = self.make_stats(cudagraph_stats=output.cudagraph_stats)
            if stats is not None:
                if not wrapped:
                    wrapped[0] = EngineCoreOutputs()
                next(iter(wrapped.values())).scheduler_stats = stats
        return wrapped

    # --- the batch ---

    def _form_batch(self) -> DecodeBatch | None:
        if self._blocker is not None and self._blocker.status == RequestStatus.RUNNING:
            return None
        running = self.running
        if len(running) > self._most_requests:
            return None
        self._blocker = next((request for request in running if not is_plain(request)), None)
        if self._blocker or not all(map(self._is_decoding, running)):
            return None
        names = [request.request_id for request in running]
        manager = self._manager
        self._batch = DecodeBatch(
            running,
            cached_counts=[manager.num_cached_block.get(name, 0) for name in names],
            held_counts=[len(self._held.pop(name, ())) for name in names],
            max_model_len=self.max_model_len,
        )
        return self._batch

    def _is_decoding(self, request: Request) -> bool:
        ahead = request.num_tokens + request.num_output_placeholders - request.num_computed_tokens
        return (
            ahead == 1
            and not request.is_prefill_chunk
            and not request.num_stale_output_tokens
            and not request.spec_token_ids
            and request.next_decode_eligible_step <= self.current_step + 1
        )

    def _settle(self) -> None:
        batch, self._batch = self._batch, None
        if batch is not None:
            is_staggered = self.use_v2_model_runner and self.has_placeholders
            # The last step of all was the batch's own, or it would have been settled before.
            next_step = self.current_step + self.decode_stagger if is_staggered else 0
            self._held |= batch.settle(has_placeholders=self.has_placeholders, next_step=next_step)

    def _try(self, plan: Callable[[], T | None]) -> T | None:
        """A plan changes nothing, so whatever goes wrong in it leaves vLLM's way open."""
        try:
            return plan()
        except Exception as error:  # noqa: BLE001  (the engine must not end for it)
            self._give_up(f"{type(error).__name__}: {error}")
            return None

    def _give_up(self, why: str) -> None:
        self._is_on = False
        self._settle()
        logger.warning("Decode scheduler: gave up, vLLM's own runs from here on: %s", why)

    # --- whoever else looks at requests finds them settled ---

    def finish_requests(
        self, request_ids: str | Iterable[str] | None, finished_status: RequestStatus
    ) -> list[Request]:
        self._settle()
        finished: list[Request] = super().finish_requests(request_ids, finished_status)
        for request in finished:
            self._held.pop(request.request_id, None)
        return finished

    def reset_prefix_cache(
        self, reset_running_requests: bool = False, reset_connector: bool = False
    ) -> bool:
        self._settle()
        return bool(super().reset_prefix_cache(reset_running_requests, reset_connector))


class AsyncDecodeScheduler(DecodeScheduler, AsyncScheduler):  # type: ignore[misc]
    """The same over vLLM's scheduler that plans a step while the one before still runs."""

    has_placeholders = True


def is_plain(request: Request) -> bool:
    """Its decoding is one token a step and nothing beside it."""
    params = request.sampling_params
    return (
        params is not None
        and request.structured_output_request is None
        and request.lora_request is None
        and request.prompt_embeds is None
        and not request.mm_features
        and not request.resumable
        and params.num_logprobs is None
        and params.prompt_logprobs is None
        and params.prompt_logprob_token_ids is None
        and params.repetition_detection is None
    )


def find_obstacle(scheduler: Scheduler) -> str:
    """What of this engine's set-up the short way does not know; empty: nothing."""
    parallel = scheduler.parallel_config
    manager = scheduler.kv_cache_manager
    managers = manager.coordinator.single_type_managers
    known = (UnitaryKVCacheCoordinator, KVCacheCoordinatorNoPrefixCache)
    obstacles = (
        (len(managers) != 1, f"the model has {len(managers)} groups of KV caches"),
        (
            any(type(one) is not FullAttentionManager for one in managers),
            "the model's attention is not full attention",
        ),
        (type(manager.coordinator) not in known, "its KV cache is coordinated in another way"),
        (
            any(one.block_size != scheduler.block_size for one in managers)
            or scheduler.block_size != scheduler.hash_block_size,
            "its blocks have several sizes",
        ),
        (scheduler.vllm_config.model_config.supports_multimodal_inputs, "the model is multimodal"),
        (scheduler.is_encoder_decoder, "the model has an encoder"),
        (scheduler.num_sampled_tokens_per_step != 1, "the model pools or diffuses"),
        (scheduler.num_spec_tokens or scheduler.num_lookahead_tokens, "it speculates"),
        (scheduler.lora_config is not None, "it has LoRA adapters"),
        (
            scheduler.connector is not None
            or scheduler.ec_connector is not None
            or scheduler.aux_output_connector is not None,
            "it has a connector",
        ),
        (scheduler.use_pp, "it is cut into pipeline stages"),
        (
            parallel.decode_context_parallel_size > 1 or parallel.prefill_context_parallel_size > 1,
            "it cuts contexts into parts",
        ),
        (
            getattr(scheduler, "local_prefill_interval", 1) > 1,
            "it holds prompts back for some steps",
        ),
        (scheduler.enable_kv_cache_events, "it publishes the events of its KV cache"),
        (scheduler.return_sampling_mask, "it returns sampling masks"),
        (scheduler.perf_metrics is not None, "it measures every step's operations"),
        (scheduler.spec_decode_metrics_level != "none", "it measures speculation by request"),
    )
    return next((why for is_there, why in obstacles if is_there), "")
