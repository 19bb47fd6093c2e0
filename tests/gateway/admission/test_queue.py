"""The queue never lets more in than it has room for, forgets nobody and counts to zero again."""

from __future__ import annotations

import asyncio
import contextlib
import math
import random
import time
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.admission.limits import LocalLimits
from gateway.admission.queue import AdmissionQueue, Places
from gateway.admission.tickets import LANES, Ticket
from gateway.errors import Overloaded
from gateway.observability.metrics import Metrics
from tests.gateway.conftest import make_settings, until


def start_queue(metrics: Metrics | None = None, **options: Any) -> AdmissionQueue:
    queue = AdmissionQueue(make_settings(**options), LocalLimits())
    if metrics is not None:
        metrics.running_sequences.read = lambda: [((name,), queue.count(name)[0]) for name in LANES]
        metrics.waiting_sequences.read = lambda: [((name,), queue.count(name)[1]) for name in LANES]
    return queue


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
def test_queue_under_cancellations_and_timeouts_stays_exact(
    sizes: list[int], capacity: int, seed: int
) -> None:
    asyncio.run(_crowd(sizes, capacity, random.Random(seed)))


async def _crowd(sizes: list[int], capacity: int, chance: random.Random) -> None:
    metrics = Metrics()
    queue = start_queue(metrics, max_running=capacity, max_waiting=60, queue_timeout_s=0.01)
    inside = 0
    largest = max(1, capacity // 2)  # what the largest ticket counts for

    async def ticket(size: int) -> None:
        nonlocal inside
        async with queue.enter(Ticket(size, chance.choice(LANES))):
            inside += min(size, largest)
            try:
                assert inside <= capacity
                await asyncio.sleep(chance.random() * 0.004)
            finally:
                inside -= min(size, largest)

    tasks = [asyncio.create_task(ticket(size)) for size in sizes]
    await asyncio.sleep(0.002)
    for task in tasks:
        if chance.random() < 0.3:
            task.cancel()
    results = await asyncio.gather(*tasks, return_exceptions=True)

    allowed = (type(None), Overloaded, asyncio.CancelledError)
    assert all(isinstance(result, allowed) for result in results)
    assert _gauge(metrics, "gateway_running_sequences") == inside == 0
    assert _gauge(metrics, "gateway_waiting_sequences") == 0
    async with asyncio.timeout(30), queue.enter(Ticket(capacity)):
        pass  # no place is kept for who has left


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=30),
    runs=st.integers(1, 40),
    seed=st.integers(0, 10**6),
)
def test_queue_that_feeds_batches_never_gives_them_more_than_their_share(
    sizes: list[int], runs: int, seed: int
) -> None:
    asyncio.run(_feed_crowd(sizes, runs, random.Random(seed)))


async def _feed_crowd(sizes: list[int], runs: int, chance: random.Random) -> None:
    metrics = Metrics()
    queue = start_queue(metrics, max_waiting=10**6)
    queue.change_capacity(runs)
    share = max(1, runs - max(1, round(runs / 16)))
    places = math.ceil(runs * 1.125)

    def check() -> None:
        batch, chats = queue.count("batch")[0], queue.count("interactive")[0]
        assert 0 <= batch <= share
        assert 0 <= batch + chats <= places

    async def run(room: Places, count: int) -> None:
        for _ in range(count):
            await asyncio.sleep(chance.random() * 0.002)
            room.give_back(1)
            check()

    async def feed(size: int) -> None:
        step = chance.choice((1, 1, 3))
        size *= step
        ticket = Ticket(size, chance.choice(LANES), is_divisible=True, step=step)
        async with queue.enter(ticket) as admission, asyncio.TaskGroup() as group:
            left = size
            while left:
                room = await admission.take(left)
                check()
                count = min(left, room.count)
                assert count > 0
                assert count % step == 0 or step > share
                group.create_task(run(room, count))
                left -= count

    async def stay(size: int) -> None:
        async with queue.enter(Ticket(size, chance.choice(LANES))):
            check()
            await asyncio.sleep(chance.random() * 0.004)

    tasks = [asyncio.create_task(chance.choice((feed, stay))(size)) for size in sizes]
    await asyncio.sleep(0.002)
    for task in tasks:
        if chance.random() < 0.2:
            task.cancel()
    results = await asyncio.wait_for(asyncio.gather(*tasks, return_exceptions=True), 20)

    assert all(isinstance(one, type(None) | asyncio.CancelledError) for one in results)
    assert [queue.count(lane) for lane in LANES] == [(0, 0), (0, 0)]
    async with asyncio.timeout(30), queue.enter(Ticket(places)):
        pass  # no place is kept for who has left


async def test_queue_chat_enters_while_batches_have_all_of_their_share() -> None:
    queue = start_queue()
    queue.change_capacity(16)
    async with asyncio.timeout(30), queue.enter(Ticket(20, "batch")):
        waiting = [asyncio.create_task(_stay(queue, Ticket(1, "batch"), 0.0)) for _ in range(3)]
        await until(lambda: queue.count("batch") == (15, 3))
        async with queue.enter(Ticket(1)), queue.enter(Ticket(1)), queue.enter(Ticket(1)):
            assert queue.count("interactive") == (3, 0)
            late = asyncio.create_task(_stay(queue, Ticket(1), 0.0))
            await until(lambda: queue.count("interactive") == (3, 1))
        await late
    await asyncio.gather(*waiting)


async def test_queue_after_an_engine_has_gone_still_lets_large_ones_in() -> None:
    queue = start_queue()
    queue.change_capacity(32)
    async with queue.enter(Ticket(30, "batch")):
        large = asyncio.create_task(_stay(queue, Ticket(30, "batch"), 0.0))
        await until(lambda: queue.count("batch") == (30, 30))
        queue.change_capacity(16)
    await asyncio.wait_for(large, 1)
    assert queue.count("batch") == (0, 0)


async def test_queue_admits_in_the_order_of_arrival() -> None:
    queue = start_queue(max_running=4)
    entered: list[str] = []

    async def ticket(name: str, size: int) -> None:
        async with queue.enter(Ticket(size)):
            entered.append(name)
            await asyncio.sleep(0.01)

    async with asyncio.TaskGroup() as group:
        for name, size in (("first", 2), ("second", 2), ("large", 2), ("small", 1)):
            group.create_task(ticket(name, size))
            await asyncio.sleep(0)

    assert entered == ["first", "second", "large", "small"]


async def test_queue_a_batch_of_all_places_enters_beside_a_long_stream() -> None:
    queue = start_queue(max_running=8)
    stream, batch, chat = Ticket(1), Ticket(10_000, "batch"), Ticket(1)
    async with asyncio.timeout(30), queue.enter(stream), queue.enter(batch), queue.enter(chat):
        # And it leaves places for chats while it runs.
        assert (queue.count("batch"), queue.count("interactive")) == ((4, 0), (2, 0))


async def test_queue_batch_kept_out_by_long_streams_lets_chats_pass() -> None:
    queue = start_queue(max_running=8)
    async with contextlib.AsyncExitStack() as long_streams:
        for _ in range(5):
            await long_streams.enter_async_context(queue.enter(Ticket(1)))
        batch = asyncio.create_task(_stay(queue, Ticket(8, "batch"), 0.0))
        await until(lambda: queue.count("batch") == (0, 4))

        for lane in (*LANES, *LANES):
            async with asyncio.timeout(30):  # also one who has no time to wait
                await _stay(queue, Ticket(1, lane, deadline=time.monotonic() + 0.5), 0.001)
        async with asyncio.timeout(30):  # more than there is room for, and two large among them
            tickets = [Ticket(1 + index % 2, LANES[index % 3 // 2]) for index in range(20)]
            await asyncio.gather(*(_stay(queue, ticket, 0.001) for ticket in tickets))

        assert queue.count("batch") == (0, 4)
    await asyncio.wait_for(batch, 1)
    assert queue.count("batch") == queue.count("interactive") == (0, 0)


async def test_queue_batch_gets_in_under_a_steady_flow_of_chats() -> None:
    queue = start_queue(max_running=8, queue_timeout_s=2.0)

    async def chat(number: int) -> None:
        while True:
            # Of different lengths, so that they do not all leave at once.
            await _stay(queue, Ticket(1), 0.005 + 0.0007 * number)

    chats = [asyncio.create_task(chat(number)) for number in range(24)]
    try:
        await until(lambda: queue.count("interactive")[1] > 8)
        for _ in range(3):
            await _stay(queue, Ticket(8, "batch"), 0.001)
    finally:
        for one in chats:
            one.cancel()
        await asyncio.gather(*chats, return_exceptions=True)
    assert queue.count("batch") == queue.count("interactive") == (0, 0)


async def _stay(queue: AdmissionQueue, ticket: Ticket, seconds: float) -> None:
    async with queue.enter(ticket):
        await asyncio.sleep(seconds)
