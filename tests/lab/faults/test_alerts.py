"""Alerts that a fault fires should it last, by promtool."""

from __future__ import annotations

import shutil

import pytest

from lab.faults.alerts import find_fired, find_names

pytestmark = pytest.mark.skipif(
    shutil.which("promtool") is None, reason="no promtool here; `scripts/system.sh prometheus`"
)

UP = 'up{instance="gateway",job="gateway"}'
AWAY = 'gateway_redis_away{instance="gateway",job="gateway"}'
FAILURES = 'gateway_batch_storage_failures_total{instance="gateway",job="gateway"}'


def scrape(
    before: dict[str, float], during: list[dict[str, float]]
) -> list[tuple[float, dict[str, float]]]:
    """At seconds 0 to 4, and from 5 on."""
    return [(float(at), before) for at in range(5)] + [
        (5.0 + at, one) for at, one in enumerate(during)
    ]


async def test_target_that_is_gone_fires_should_it_last() -> None:
    scrapes = scrape({UP: 1.0}, [{UP: 0.0}] * 3)
    assert await find_fired(scrapes, 5, 8) == ["TargetDown"]


async def test_gauge_fires_by_what_it_mostly_was() -> None:
    well, away = {UP: 1.0, AWAY: 0.0}, {UP: 1.0, AWAY: 1.0}
    assert await find_fired(scrape(well, [away, away, well]), 5, 8) == ["RedisAway"]
    assert await find_fired(scrape(well, [well, well, away]), 5, 8) == []


async def test_counter_fires_by_its_pace() -> None:
    before = {UP: 1.0, FAILURES: 0.0}
    during = [{UP: 1.0, FAILURES: float(number)} for number in range(4)]
    assert await find_fired(scrape(before, during), 5, 9) == ["BatchStorageAway"]
    assert await find_fired(scrape(before, [before] * 4), 5, 9) == []


async def test_fault_that_nobody_saw_fires_nothing_that_is_known() -> None:
    assert await find_fired([(0.0, {UP: 1.0})], 5, 9) is None


def test_names_are_those_of_the_rules() -> None:
    assert {"up", "gateway_redis_away", "launcher_engine_state", "vllm:kv_cache_usage_perc"} <= (
        find_names()
    )
