"""The gate never lets more in than it has room for, forgets nobody and counts to zero again."""

from __future__ import annotations

import asyncio
import random

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.admission import Gate, Visit
from gateway.errors import Overloaded
from gateway.metrics import Metrics
from tests.gateway.conftest import make_settings


def _gauge(metrics: Metrics, name: str) -> float:
    value = metrics.registry.get_sample_value(name, {"lane": "interactive"})
    assert value is not None
    return value


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=40),
    capacity=st.integers(1, 20),
    seed=st.integers(0, 10**6),
)
def test_gate_under_cancellations_and_timeouts_stays_exact(
    sizes: list[int], capacity: int, seed: int
) -> None:
    asyncio.run(_crowd(sizes, capacity, random.Random(seed)))


async def _crowd(sizes: list[int], capacity: int, chance: random.Random) -> None:
    metrics = Metrics()
    options = make_settings(max_running=capacity, max_waiting=60, queue_timeout_s=0.01)
    gate = Gate(options, metrics)
    inside = 0

    async def visit(size: int) -> None:
        nonlocal inside
        async with gate.enter(Visit(size)):
            inside += min(size, capacity)
            try:
                assert inside <= capacity
                await asyncio.sleep(chance.random() * 0.004)
            finally:
                inside -= min(size, capacity)

    tasks = [asyncio.create_task(visit(size)) for size in sizes]
    await asyncio.sleep(0.002)
    for task in tasks:
        if chance.random() < 0.3:
            task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)

    allowed = (type(None), Overloaded, asyncio.CancelledError)
    assert all(isinstance(result, allowed) for result in results)
    assert _gauge(metrics, "gateway_running_sequences") == inside == 0
    assert _gauge(metrics, "gateway_waiting_sequences") == 0


async def test_gate_admits_in_the_order_of_arrival() -> None:
    gate = Gate(make_settings(max_running=2), Metrics())
    entered: list[str] = []

    async def visit(name: str, size: int) -> None:
        async with gate.enter(Visit(size)):
            entered.append(name)
            await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as group:
        for name, size in (("first", 1), ("large", 2), ("small", 1)):
            group.create_task(visit(name, size))
            await asyncio.sleep(0)

    assert entered == ["first", "large", "small"]
