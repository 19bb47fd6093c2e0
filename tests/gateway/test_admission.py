"""The gate never lets more in than it has room for, forgets nobody and counts to zero again."""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.admission.ledger import Ledger, make_ledger_file
from gateway.admission.queue import LANES, Gate, Visit
from gateway.config import Worker
from gateway.errors import Overloaded
from gateway.observability.metrics import Metrics
from tests.gateway.conftest import make_settings, until

StartGate = Callable[[int, int], Gate]


@pytest.fixture
def start_gate(tmp_path: Path) -> Iterator[StartGate]:
    """The gate of one of several workers, with eight places for all of them."""
    path = make_ledger_file(tmp_path)
    ledgers: list[Ledger] = []

    def start(index: int, count: int) -> Gate:
        ledgers.append(Ledger(path))
        settings = make_settings(max_running=8, queue_timeout_s=2.0)
        return Gate(settings, Metrics(), ledgers[-1], Worker(index, count, tmp_path))

    yield start
    for ledger in ledgers:
        ledger.close()


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
    largest = max(1, capacity // 2)  # what the largest visit counts for

    async def visit(size: int) -> None:
        nonlocal inside
        async with gate.enter(Visit(size, chance.choice(LANES))):
            inside += min(size, largest)
            try:
                assert inside <= capacity
                await asyncio.sleep(chance.random() * 0.004)
            finally:
                inside -= min(size, largest)

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
    async with asyncio.timeout(1), gate.enter(Visit(capacity)):
        pass  # no place is kept for who has left


async def test_gate_admits_in_the_order_of_arrival() -> None:
    gate = Gate(make_settings(max_running=4), Metrics())
    entered: list[str] = []

    async def visit(name: str, size: int) -> None:
        async with gate.enter(Visit(size)):
            entered.append(name)
            await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as group:
        for name, size in (("first", 2), ("second", 2), ("large", 2), ("small", 1)):
            group.create_task(visit(name, size))
            await asyncio.sleep(0)

    assert entered == ["first", "second", "large", "small"]


async def test_gate_a_batch_of_all_places_enters_beside_a_long_stream() -> None:
    gate = Gate(make_settings(max_running=8), Metrics())
    stream, batch, chat = Visit(1), Visit(10_000, "batch"), Visit(1)
    async with asyncio.timeout(1), gate.enter(stream), gate.enter(batch), gate.enter(chat):
        # And it leaves places for chats while it runs.
        assert (gate.count("batch"), gate.count("interactive")) == ((4, 0), (2, 0))


async def test_gate_batch_kept_out_by_long_streams_lets_chats_pass() -> None:
    gate = Gate(make_settings(max_running=8), Metrics())
    async with contextlib.AsyncExitStack() as long_streams:
        for _ in range(5):
            await long_streams.enter_async_context(gate.enter(Visit(1)))
        batch = asyncio.create_task(_stay(gate, Visit(8, "batch"), 0.0))
        await until(lambda: gate.count("batch") == (0, 4))

        for lane in (*LANES, *LANES):
            async with asyncio.timeout(1):  # also one who has no time to wait
                await _stay(gate, Visit(1, lane, deadline=time.monotonic() + 0.5), 0.001)
        async with asyncio.timeout(1):  # more than there is room for, and two large among them
            visits = [Visit(1 + index % 2, LANES[index % 3 // 2]) for index in range(20)]
            await asyncio.gather(*(_stay(gate, visit, 0.001) for visit in visits))

        assert gate.count("batch") == (0, 4)
    await asyncio.wait_for(batch, 1)
    assert gate.count("batch") == gate.count("interactive") == (0, 0)


@pytest.mark.parametrize("workers", [1, 2, 4])
async def test_gate_batch_gets_in_under_a_steady_flow_of_chats(
    start_gate: StartGate, workers: int
) -> None:
    gates = [start_gate(index, workers) for index in range(workers)]

    async def chat(number: int) -> None:
        while True:
            # Of different lengths, so that they do not all leave at once.
            await _stay(gates[number % workers], Visit(1), 0.005 + 0.0007 * number)

    chats = [asyncio.create_task(chat(number)) for number in range(24)]
    try:
        await until(lambda: gates[0].count("interactive")[1] > 8)
        for _ in range(3):
            await _stay(gates[0], Visit(8, "batch"), 0.001)
    finally:
        for one in chats:
            one.cancel()
        await asyncio.gather(*chats, return_exceptions=True)
    assert gates[0].count("batch") == gates[0].count("interactive") == (0, 0)


async def test_gate_what_a_dead_worker_held_of_a_keys_limit_is_free_again(
    start_gate: StartGate,
) -> None:
    visit = Visit(1, account="bob", account_limit=1)
    other, killed = start_gate(0, 2), start_gate(1, 2)
    await killed.take(visit, 1)
    with pytest.raises(Overloaded, match="its limit is 1"):
        await other.take(visit, 1)

    successor = start_gate(1, 2)

    async with other.enter(visit):
        with pytest.raises(Overloaded, match="its limit is 1"):
            await successor.take(visit, 1)
    async with successor.enter(visit):
        pass


async def _stay(gate: Gate, visit: Visit, seconds: float) -> None:
    async with gate.enter(visit):
        await asyncio.sleep(seconds)
