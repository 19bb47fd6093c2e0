"""What a batch may cost callers who wait, in virtual time."""

from __future__ import annotations

import pytest

from lab.intervals import quantile
from lab.scale.lanes_simulation import CPU_TIMES, LaneScenario, simulate_lanes
from lab.scale.service_times import H200_TIMES, ServiceTimes


def _find_ratio(scenario: LaneScenario, times: ServiceTimes) -> float:
    """Of the time to the first token, p99, once it is known what they bear."""
    alone, _, beside = simulate_lanes(scenario, times).first_s
    return quantile(beside, 0.99) / quantile(alone, 0.99)


@pytest.mark.parametrize("times", [CPU_TIMES, H200_TIMES], ids=["CPU", "H200"])
def test_first_token_beside_a_batch_is_at_most_a_fifth_later(times: ServiceTimes) -> None:
    assert _find_ratio(LaneScenario(), times) <= 1.2


def test_a_quarter_of_the_window_alone_would_make_it_later() -> None:
    assert _find_ratio(LaneScenario(follows_first_tokens=False), CPU_TIMES) > 1.2
