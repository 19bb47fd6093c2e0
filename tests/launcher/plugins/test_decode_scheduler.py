"""Ours against vLLM's own scheduler, over a made-up model and random histories.

`DECODE_HISTORIES=10000 pytest tests/launcher/plugins` plays as many as a release should see.
"""

from __future__ import annotations

import importlib
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lab.scheduler.engine_setup import EngineSetup
from tests.launcher.plugins.histories import Arrival, Event, histories, is_served, setups

pytestmark = pytest.mark.engine
HISTORIES = int(os.environ.get("DECODE_HISTORIES", "60"))


@pytest.fixture(scope="module")
def twins() -> Any:
    """Imported late: vLLM takes ten seconds, which nobody should wait for to deselect this."""
    return importlib.import_module("tests.launcher.plugins.twins")


@pytest.fixture(autouse=True)
def no_slow_steps(twins: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A busy machine's slow steps would hand every token over at once."""
    monkeypatch.setattr(twins.decode_scheduler, "SLOW_STEP_S", 1e9)


@settings(
    max_examples=HISTORIES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(setups, histories, st.integers(0, 3))
def test_scheduler_over_random_histories_does_as_vllms_own(
    twins: Any, setup: EngineSetup, history: list[Event], seed: int
) -> None:
    twins.Twins(setup, seed).play([event for event in history if is_served(setup, event)])


def test_scheduler_over_a_plain_batch_decodes_the_short_way(twins: Any) -> None:
    pair = twins.Twins(EngineSetup(blocks=400))
    pair.play([Arrival(own_tokens=20 + n, most_tokens=50, ignores_eos=True) for n in range(12)])
    steps = pair.ours.scheduler.steps
    assert steps["short"] > 0.8 * (steps["short"] + steps["long"]), steps
    ours, theirs = (sum(map(len, engine.messages)) for engine in (pair.ours, pair.theirs))
    assert ours <= 12 * (50 / 16 + 3) < theirs == 12 * 50
