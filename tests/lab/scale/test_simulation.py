"""A small one of the large: the gateway's own parts, in virtual time, always the same."""

from __future__ import annotations

import dataclasses
import time

import pytest

from lab.scale.service_times import ServiceTimes
from lab.scale.simulation import Outcome, Scenario, simulate

_TIMES = ServiceTimes(intake_s=0.001, first_s=0.01, step_s=0.002, step_more_s=0.00001)


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GATEWAY_ENGINE_SEQUENCES", raising=False)


@pytest.fixture(scope="module")
def busy() -> Outcome:
    return simulate(Scenario(10, 400, sequences=16, think_s=0.2, seconds=12), _TIMES)


def test_simulation_is_the_same_each_time_and_leaves_the_clocks_alone(busy: Outcome) -> None:
    clock = time.monotonic
    again = simulate(busy.scenario, _TIMES)

    assert dataclasses.replace(again, cpu_s=0.0) == dataclasses.replace(busy, cpu_s=0.0)
    assert time.monotonic is clock


def test_full_engines_are_learnt_and_callers_wait_in_the_queue(busy: Outcome) -> None:
    assert busy.known_after_s is not None
    assert busy.known_after_s < 6
    assert max(busy.queue_s["interactive"]) > 0.1
    most_per_s = 10 * _TIMES.count_requests(16, 128)
    assert 0.6 * most_per_s < busy.answered / 12 < 1.05 * most_per_s


def test_only_what_ran_on_the_failed_tenth_is_lost(busy: Outcome) -> None:
    assert 0 < busy.lost.total() < busy.lost_at_once
    assert busy.lost.total() + busy.sent_again >= busy.lost_at_once
    assert not busy.refused.keys() - {"requests_per_minute"}
    assert busy.out_after_s < 1.5  # a call or a look finds it out
    assert busy.back_after_s < 4


def test_limited_key_gets_its_minute_and_no_more(busy: Outcome) -> None:
    assert busy.limited <= 60 + 12 + 1


def test_sessions_stay_where_there_is_room() -> None:
    calm = simulate(Scenario(50, 50, seconds=12), _TIMES)

    moved = calm.sessions_moved / (calm.sessions_kept + calm.sessions_moved)
    assert moved < 0.1  # those of the tenth that was away, there and back
    assert max(calm.first_token_s) < 0.05
