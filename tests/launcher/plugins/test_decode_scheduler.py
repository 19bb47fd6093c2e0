"""Ours against vLLM's own scheduler, over a made-up model and random histories.

`DECODE_HISTORIES=10000 pytest tests/launcher/plugins` plays as many as a release should see.
"""

from __future__ import annotations

import importlib
import logging
import os
from collections import Counter
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab.scheduler.engine_setup import EngineSetup
from launcher.engine.vllm_log import read_scheduler
from tests.launcher.plugins.histories import Arrival, Event, histories, is_served, setups

pytestmark = pytest.mark.engine
FEW = 150
HISTORIES = int(os.environ.get("DECODE_HISTORIES", FEW))
# What `twins.py` finds remarkable about steps and their tokens: what may go both ways …
BOTH_WAYS = {
    "decode",
    "growing",
    "after an end",
    "fewer go on",
    "somebody waits",
    "end by length",
    "end by stop",
    "whole answer",
    "stream answer",
    "so far answer",
    "stop string",
}
# … and what vLLM's way alone may do. A preemption is there too, and told in a later step.
LONG_WAY = {"first token", "prefill", "chunk", "nothing", "grammar", "logprobs", "prompt logprobs"}


@pytest.fixture(scope="module")
def twins() -> Any:
    """Imported late: vLLM takes ten seconds, which nobody should wait for to deselect this."""
    logging.getLogger("vllm").setLevel(logging.ERROR)  # two lines for every scheduler
    # torch imports setuptools, which refuses to where another test has imported distutils before.
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SETUPTOOLS_USE_DISTUTILS", "stdlib")
        return importlib.import_module("tests.launcher.plugins.twins")


@pytest.fixture(autouse=True)
def no_slow_steps(twins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine's slow steps would hand every token over at once."""
    monkeypatch.setattr(twins.decode_scheduler, "SLOW_STEP_S", 1e9)


def test_scheduler_over_random_histories_does_as_vllms_own(twins: Any) -> None:
    seen: Counter[tuple[str, str]] = Counter()

    @settings(
        max_examples=HISTORIES,
        derandomize=HISTORIES == FEW,  # no surprises in the suite; those are for the long run
        database=None,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(setups, histories, st.integers(0, 3))
    def play(setup: EngineSetup, history: list[Event], seed: int) -> None:
        pair = twins.Twins(setup, seed)
        pair.play([event for event in history if is_served(setup, event)])
        seen.update(pair.kinds)

    play()
    short, long = ({kind for kind, way in seen if way == name} for name in ("short", "long"))
    assert short >= BOTH_WAYS
    assert long >= BOTH_WAYS | LONG_WAY | {"after a preemption"}
    assert not short & LONG_WAY


@pytest.mark.parametrize("is_v2_runner", [True, False], ids=["v2", "v1"])
@pytest.mark.parametrize("is_async", [True, False], ids=["async", "sync"])
def test_scheduler_over_a_plain_batch_decodes_the_short_way(
    twins: Any, is_async: bool, is_v2_runner: bool
) -> None:
    pair = twins.Twins(EngineSetup(blocks=400, is_async=is_async, is_v2_runner=is_v2_runner))
    pair.play([Arrival(own_tokens=20 + n, most_tokens=50, ignores_eos=True) for n in range(12)])
    steps = pair.ours.scheduler.steps
    assert steps["short"] > 0.8 * (steps["short"] + steps["long"]), steps
    ours, theirs = (sum(map(len, engine.messages)) for engine in (pair.ours, pair.theirs))
    assert ours <= 12 * (50 / 16 + 3) < theirs == 12 * 50


def play_with_damage(twins: Any, caplog: pytest.LogCaptureFixture, damage: Any) -> Any:
    """A batch in the middle of which ours is damaged, to its end."""
    pair = twins.Twins(EngineSetup(blocks=400))
    for number in range(12):
        pair.apply(Arrival(own_tokens=20 + number, most_tokens=50, ignores_eos=True))
    for _ in range(20):
        pair.step()
    scheduler = pair.ours.scheduler
    assert scheduler.steps["short"] > 10
    damage(scheduler)
    long = scheduler.steps["long"]
    with caplog.at_level(logging.WARNING, logger="vllm.decode_scheduler"):
        while not pair.theirs.is_idle():
            pair.step_each()
    assert scheduler.steps["long"] > long
    return pair


def count_a_block_too_many(scheduler: Any) -> None:
    true = scheduler._manager
    seen = {name: [*blocks, blocks[0]] for name, blocks in true.req_to_blocks.items()}
    scheduler._manager = SimpleNamespace(req_to_blocks=seen, block_size=true.block_size)


def count_a_token_too_many(scheduler: Any) -> None:
    scheduler._batch.known[3] += 1


def reorder_requests(scheduler: Any) -> None:
    scheduler.running.reverse()


def break_a_column(scheduler: Any) -> None:
    scheduler._batch.end = None


@pytest.mark.parametrize(
    "damage",
    [count_a_block_too_many, count_a_token_too_many, reorder_requests, break_a_column],
)
def test_books_that_contradict_vllms_end_the_short_way_and_no_answer(
    twins: Any, caplog: pytest.LogCaptureFixture, damage: Any
) -> None:
    pair = play_with_damage(twins, caplog, damage)
    answers = [
        {name: (got.tokens, got.reasons) for name, got in engine.received.items()}
        for engine in pair.both
    ]
    assert answers[0] == answers[1]
    said = [line.getMessage() for line in caplog.records if "gave up" in line.getMessage()]
    assert len(said) == 1, caplog.text
    state = read_scheduler(said[0])
    assert state is not None
    assert state.state == "gave up"
    assert state.reason


def test_step_with_somebody_who_is_alive_elsewhere_goes_vllms_way(twins: Any) -> None:
    pair = twins.Twins(EngineSetup(blocks=400))
    for number in range(3):
        pair.apply(Arrival(own_tokens=20 + number, most_tokens=50, ignores_eos=True))
    for _ in range(10):
        pair.step()
    scheduler, (planned, tokens) = pair.ours.scheduler, pair.ours.loop.under_way[0]
    assert scheduler._plan_update(scheduler._batch, planned, tokens) is not None
    planned.num_scheduled_tokens["r9"] = 1
    assert scheduler._plan_update(scheduler._batch, planned, tokens) is not None  # it has ended
    scheduler.requests["r9"] = scheduler.requests["r1"]
    assert scheduler._plan_update(scheduler._batch, planned, tokens) is None


def test_aborted_request_leaves_nothing_for_a_later_one_of_its_name(twins: Any) -> None:
    pair = twins.Twins(EngineSetup(blocks=400))
    for number in range(3):
        pair.apply(Arrival(own_tokens=20 + number, most_tokens=50, ignores_eos=True))
    for _ in range(12):
        pair.step()
    ours = pair.ours.scheduler
    finished = ours.finish_requests(["r0", "r7"], twins.RequestStatus.FINISHED_ABORTED)
    assert [request.request_id for request in finished] == ["r0"]
    assert "r0" not in ours._held
    assert "r2" in ours._held  # for its next output


def test_answers_of_a_slow_engine_are_handed_over_each_step(
    twins: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(twins.decode_scheduler, "SLOW_STEP_S", -1.0)
    pair = twins.Twins(EngineSetup(blocks=400))
    pair.play([Arrival(own_tokens=20 + n, most_tokens=50, ignores_eos=True) for n in range(12)])
    assert pair.ours.messages == pair.theirs.messages


@pytest.mark.parametrize(
    ("name", "value", "word"),
    [
        ("is_encoder_decoder", True, "encoder"),
        ("num_spec_tokens", 3, "speculates"),
        ("num_lookahead_tokens", 1, "speculates"),
        ("num_sampled_tokens_per_step", 0, "pools"),
        ("lora_config", object(), "LoRA"),
        ("connector", object(), "connector"),
        ("ec_connector", object(), "connector"),
        ("aux_output_connector", object(), "connector"),
        ("use_pp", True, "pipeline"),
        ("enable_kv_cache_events", True, "events"),
        ("return_sampling_mask", True, "sampling masks"),
        ("perf_metrics", object(), "operations"),
        ("spec_decode_metrics_level", "all", "speculation"),
        ("hash_block_size", 8, "sizes"),
    ],
)
def test_engine_that_the_short_way_does_not_know_is_named(
    twins: Any, name: str, value: Any, word: str
) -> None:
    scheduler = twins.Twins(EngineSetup()).ours.scheduler
    assert twins.decode_scheduler.find_obstacle(scheduler) == ""
    setattr(scheduler, name, value)
    assert word in twins.decode_scheduler.find_obstacle(scheduler)


def test_model_with_a_sliding_window_is_scheduled_by_vllm(twins: Any) -> None:
    setup = EngineSetup(window=32)
    pair = twins.Twins(setup)
    scheduler = pair.ours.scheduler
    assert "full attention" in twins.decode_scheduler.find_obstacle(scheduler)
    for number in range(4):
        pair.apply(Arrival(own_tokens=9 + number, most_tokens=60, ignores_eos=True))
    while not pair.theirs.is_idle():
        pair.step()
    assert scheduler.steps["short"] == scheduler.steps["short_updates"] == 0


def test_vllm_that_is_not_known_gets_its_own_scheduler(
    twins: Any, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(twins.decode_scheduler, "find_difference", lambda _: "it is strange")
    with caplog.at_level(logging.WARNING, logger="vllm.decode_scheduler"):
        for is_async, kind in ((True, twins.AsyncScheduler), (False, twins.Scheduler)):
            pair = twins.Twins(EngineSetup(is_async=is_async))
            assert type(pair.ours.scheduler) is kind
    state = read_scheduler(caplog.records[0].getMessage())
    assert state is not None
    assert (state.state, state.reason) == ("off", "it is strange")
