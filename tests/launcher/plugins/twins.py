"""Two engines with one history: vLLM's own scheduler and ours, compared after every step.

What counts as equal is here: the steps they plan, the blocks held and freed in their order, what
the prefix cache knows, the requests' counters, and what reaches the clients, but for bundles.
"""

from __future__ import annotations

import warnings
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field, fields
from typing import Any

with warnings.catch_warnings():  # vLLM's imports, which are not ours to mend
    warnings.simplefilter("ignore")
    from vllm.sampling_params import RequestOutputKind, SamplingParams, StructuredOutputsParams
    from vllm.v1.core.sched.async_scheduler import AsyncScheduler
    from vllm.v1.core.sched.interface import PauseState
    from vllm.v1.core.sched.scheduler import Scheduler
    from vllm.v1.engine import EngineCoreOutput, EngineCoreOutputs
    from vllm.v1.request import Request, RequestStatus

    from lab.scheduler import made_up_engine
    from lab.scheduler.made_up_engine import MadeUpEngine, MadeUpWorker
    from launcher.plugins import decode_scheduler
    from launcher.plugins.decode_scheduler import build_scheduler

from lab.scheduler.engine_setup import EngineSetup
from tests.launcher.plugins.histories import (
    Abort,
    AbortAll,
    Arrival,
    Event,
    Pause,
    ResetCache,
    Steps,
)

VOCABULARY = 40
EOS = 1
MOST_STEPS = 3000
KINDS = {
    "stream": RequestOutputKind.DELTA,
    "whole": RequestOutputKind.FINAL_ONLY,
    "so far": RequestOutputKind.CUMULATIVE,
}


def build_request(arrival: Arrival, number: int, hasher: Any) -> Request:
    prompt = [2 + (arrival.prefix * 7 + place) % 30 for place in range(arrival.prefix_tokens)]
    prompt += [2 + (number * 11 + place) % 30 for place in range(arrival.own_tokens)]
    params = SamplingParams(
        temperature=0.0,
        max_tokens=arrival.most_tokens,
        min_tokens=min(arrival.least_tokens, arrival.most_tokens),
        stop_token_ids=list(arrival.stops),
        ignore_eos=arrival.ignores_eos,
        output_kind=KINDS[arrival.kind],
        logprobs=1 if arrival.extra == "logprobs" else None,
        prompt_logprobs=1 if arrival.extra == "prompt logprobs" else None,
        stop=["never"] if arrival.extra == "stop string" else None,
        structured_outputs=(
            StructuredOutputsParams(regex="x*") if arrival.extra == "grammar" else None
        ),
    )
    params.update_from_generation_config({}, EOS)
    request = Request(
        request_id=f"r{number}",
        prompt_token_ids=prompt,
        sampling_params=params,
        pooling_params=None,
        client_index=arrival.client,
        arrival_time=float(number),
        priority=arrival.priority,
        block_hasher=hasher,
    )
    if request.structured_output_request is not None:
        request.structured_output_request.grammar = object()
    return request


@dataclass
class Received:
    """What one request's client has got."""

    tokens: list[int] = field(default_factory=list)
    reasons: list[Any] = field(default_factory=list)
    events: list[Any] = field(default_factory=list)
    prefill: list[Any] = field(default_factory=list)
    logprobs: int = 0

    def add(self, output: EngineCoreOutput) -> None:
        self.tokens += output.new_token_ids
        if output.finish_reason is not None:
            self.reasons.append((output.finish_reason, output.stop_reason))
        self.events += [event.type for event in output.events or ()]
        if output.prefill_stats is not None:
            self.prefill.append(vars_of(output.prefill_stats))
        if output.new_logprobs is not None:
            self.logprobs += len(output.new_logprobs.logprobs)


class Engine:
    """One of the twins, with everything that its clients received."""

    def __init__(self, setup: EngineSetup, scheduler: Scheduler, seed: int) -> None:
        self.scheduler = scheduler
        self.loop = MadeUpEngine(
            scheduler, MadeUpWorker(setup, VOCABULARY, seed), 2 if setup.is_async else 1
        )
        self.received: defaultdict[str, Received] = defaultdict(Received)
        self.counts: Counter[str] = Counter()
        self.ended: Counter[tuple[int, str]] = Counter()
        self.gauges: tuple[Any, ...] = ()  # what was last told of the engine's state
        self.messages: list[list[str]] = []

    def step(self) -> tuple[Any, list[EngineCoreOutput]]:
        scheduled, outputs = self.loop.step()
        self._take(outputs)
        return scheduled, [output for group in outputs.values() for output in group.outputs]

    def _take(self, outputs: dict[int, EngineCoreOutputs]) -> None:
        for client, group in outputs.items():
            for output in group.outputs:
                self.received[output.request_id].add(output)
                assert self.scheduler.requests.get(output.request_id) is None or (
                    self.scheduler.requests[output.request_id].client_index == client
                )
            self.messages.append([output.request_id for output in group.outputs])
            self.ended.update((client, name) for name in group.finished_requests or ())
            if (stats := group.scheduler_stats) is not None:
                self.gauges = (stats.num_running_reqs, stats.num_waiting_reqs, stats.kv_cache_usage)
                cache = stats.prefix_cache_stats
                self.counts.update({k: v for k, v in vars_of(cache).items() if isinstance(v, int)})

    def is_idle(self) -> bool:
        return not self.scheduler.has_requests() and not self.loop.under_way


class Twins:
    def __init__(self, setup: EngineSetup, seed: int = 0) -> None:
        self.setup = setup
        hasher = made_up_engine.build_hasher(setup)
        self._hasher = hasher
        stock = AsyncScheduler if setup.is_async else Scheduler
        config = made_up_engine.build_config(setup)
        self.theirs, self.ours = (
            Engine(setup, made_up_engine.build_scheduler(setup, config, build), seed)
            for build in (stock, build_scheduler)
        )
        self.both = (self.theirs, self.ours)
        self.arrivals: dict[str, Arrival] = {}
        self.steps = 0
        self.kinds: Counter[tuple[str, str]] = Counter()

    def play(self, events: list[Event]) -> None:
        for event in events:
            self.apply(event)
            if not isinstance(event, Steps):
                continue
            for _ in range(event.count):
                self.step()
        self.finish()

    def finish(self) -> None:
        for engine in self.both:
            engine.scheduler.set_pause_state(PauseState.UNPAUSED)
        while not (self.theirs.is_idle() and self.ours.is_idle()):
            assert self.steps < MOST_STEPS
            self.step()
        self.compare_ends()

    def apply(self, event: Event) -> None:
        if isinstance(event, Arrival):
            number = len(self.arrivals)
            self.arrivals[f"r{number}"] = event
            for engine in self.both:
                engine.scheduler.add_request(build_request(event, number, self._hasher))
        elif isinstance(event, Abort):
            self._abort(event)
        elif isinstance(event, AbortAll):
            for engine in self.both:
                engine.scheduler.finish_requests(None, RequestStatus.FINISHED_ABORTED)
        elif isinstance(event, Pause):
            for engine in self.both:
                engine.scheduler.set_pause_state(PauseState[event.state])
        elif isinstance(event, ResetCache):
            done = [e.scheduler.reset_prefix_cache(event.preempts) for e in self.both]
            assert done[0] == done[1]

    def _abort(self, event: Abort) -> None:
        names = sorted(self.theirs.scheduler.requests)
        if not names:
            return
        name = names[event.which % len(names)]
        for engine in self.both:
            if event.is_late:
                engine.loop.aborts.append(name)
            else:
                engine.scheduler.finish_requests([name], RequestStatus.FINISHED_ABORTED)

    def step(self) -> None:
        self.steps += 1
        before = dict(self.ours.scheduler.steps)
        (theirs, outputs), (ours, told) = (engine.step() for engine in self.both)
        if told:  # what the front end hears of the engine's state comes with the tokens
            assert self.ours.gauges == self.theirs.gauges
        assert (theirs is None) == (ours is None)
        if theirs is not None:
            compare_steps(theirs, ours)
        after = self.ours.scheduler.steps
        for way in ("short", "long"):
            if after[way] > before[way]:
                self.kinds.update((kind, way) for kind in find_step_kinds(theirs))
                if self.theirs.scheduler.waiting:
                    self.kinds["somebody waits", way] += 1
            if after[f"{way}_updates"] > before[f"{way}_updates"]:
                self.kinds.update((kind, way) for kind in self._find_output_kinds(outputs))
        compare_books(self.theirs.scheduler, self.ours.scheduler)
        self.compare_received()

    def step_each(self) -> None:
        """Where the two may go on differently, as long as the answers are the same."""
        self.steps += 1
        assert self.steps < MOST_STEPS
        for engine in self.both:
            engine.step()

    def _find_output_kinds(self, outputs: list[EngineCoreOutput]) -> set[str]:
        """What is remarkable about the tokens of a step."""
        kinds = set()
        for output in outputs:
            arrival = self.arrivals[output.request_id]
            kinds.add(f"{arrival.kind} answer")
            if output.finish_reason is not None:
                kinds.add(f"end by {output.finish_reason.name.lower()}")
            if output.prefill_stats is not None:
                kinds.add("first token")
            if arrival.extra:
                kinds.add(arrival.extra)
        if len(self.theirs.scheduler.running) < len(outputs):
            kinds.add("fewer go on")
        return kinds

    def compare_received(self) -> None:
        for name, theirs in self.theirs.received.items():
            ours, arrival = self.ours.received[name], self.arrivals[name]
            assert ours.tokens == theirs.tokens[: len(ours.tokens)], name
            late = len(theirs.tokens) - len(ours.tokens)
            is_ended = name not in self.theirs.scheduler.requests
            waits = arrival.kind == "whole" and arrival.extra != "stop string"
            if not waits or theirs.reasons:
                assert late == 0, f"{name}: {late} tokens late"
            assert late < decode_scheduler.HELD_TOKENS or is_ended
            assert bool(ours.tokens) == bool(theirs.tokens), f"{name}: the first token is late"
            assert ours.reasons == theirs.reasons
            assert ours.events == theirs.events
            assert ours.prefill == theirs.prefill
            assert ours.logprobs == theirs.logprobs

    def compare_ends(self) -> None:
        assert set(self.ours.received) == set(self.theirs.received)
        assert self.ours.ended == self.theirs.ended
        assert self.ours.counts == self.theirs.counts
        assert self.ours.gauges == self.theirs.gauges
        for name in ("running", "waiting", "requests", "finished_req_ids"):
            assert not getattr(self.ours.scheduler, name), name
        assert not self.ours.scheduler._held
        assert self.ours.scheduler._is_on, "it gave up"


def find_step_kinds(step: Any) -> Iterator[str]:
    """What is remarkable about a step that was planned."""
    known = step.scheduled_cached_reqs
    if not step.num_scheduled_tokens:
        yield "nothing"
        return
    if step.scheduled_new_reqs:
        yield "prefill"
    if any(count > 1 for count in step.num_scheduled_tokens.values()):
        yield "chunk"
    else:
        yield "decode"
    if any(blocks is not None for blocks in known.new_block_ids):
        yield "growing"
    if step.finished_req_ids:
        yield "after an end"
    if step.preempted_req_ids:
        yield "after a preemption"


def compare_steps(theirs: Any, ours: Any) -> None:
    for one in fields(theirs):
        a, b = getattr(theirs, one.name), getattr(ours, one.name)
        assert a == b, f"{one.name}: {a!r} is {b!r}"
    assert list(theirs.num_scheduled_tokens) == list(ours.num_scheduled_tokens)


def compare_books(theirs: Scheduler, ours: Scheduler) -> None:
    assert [r.request_id for r in theirs.running] == [r.request_id for r in ours.running]
    assert [r.request_id for r in theirs.waiting] == [r.request_id for r in ours.waiting]
    assert list(theirs.requests) == list(ours.requests)
    assert theirs.finished_req_ids == ours.finished_req_ids
    assert theirs.current_step == ours.current_step
    if hasattr(theirs, "num_executed_steps"):  # from 0.33 on
        assert theirs.num_executed_steps == ours.num_executed_steps
    assert theirs.prefill_capacity_bound == ours.prefill_capacity_bound
    assert theirs.prev_step_scheduled_req_ids == ours.prev_step_scheduled_req_ids
    assert read_blocks(theirs) == read_blocks(ours)
    batch = ours._batch
    columns = {} if batch is None else dict(zip(batch.ids, range(len(batch.ids)), strict=True))
    for name, theirs_one in theirs.requests.items():
        ours_one = ours.requests[name]
        assert ours_one.status == theirs_one.status
        assert list(ours_one.all_token_ids) == list(theirs_one.all_token_ids)
        assert ours_one.block_hashes == theirs_one.block_hashes
        if name in columns:
            assert batch.position[columns[name]] == theirs_one.num_computed_tokens
            assert batch.known[columns[name]] == theirs_one.num_tokens
        else:
            assert counters(ours_one) == counters(theirs_one)


def counters(request: Request) -> tuple[int, ...]:
    return (
        request.num_computed_tokens,
        request.num_in_flight_tokens,
        request.num_output_placeholders,
        request.num_stale_output_tokens,
        request.next_decode_eligible_step,
        request.num_preemptions,
    )


def read_blocks(scheduler: Scheduler) -> tuple[Any, ...]:
    """Who holds which, which are free in which order, and what the prefix cache knows."""
    manager = scheduler.kv_cache_manager
    (kind,) = manager.coordinator.single_type_managers
    free = manager.block_pool.free_block_queue.get_all_free_blocks()
    return (
        {name: [block.block_id for block in held] for name, held in kind.req_to_blocks.items()},
        dict(kind.num_cached_block),
        [block.block_id for block in free],
        {block.block_id: (block.block_hash, block.ref_cnt) for block in manager.block_pool.blocks},
    )


def vars_of(stats: Any) -> dict[str, Any]:
    return {one.name: getattr(stats, one.name) for one in fields(stats)}
