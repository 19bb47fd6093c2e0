"""Bounds in time under a common timer."""

from __future__ import annotations

import asyncio
import time

import pytest

from gateway.engines.timeouts import CallTimeouts


async def test_call_that_takes_too_long_is_a_timeout() -> None:
    timeouts = CallTimeouts()
    started = time.monotonic()
    with pytest.raises(TimeoutError), timeouts.limit(0.05):
        await asyncio.sleep(10)
    assert 0.04 < time.monotonic() - started < 2


async def test_call_that_ends_in_time_is_left_alone() -> None:
    timeouts = CallTimeouts()
    with timeouts.limit(0.05):
        await asyncio.sleep(0)
    await asyncio.sleep(0.1)  # its time passes, and nobody is cancelled


async def test_calls_of_different_length_end_each_at_its_own_time() -> None:
    timeouts = CallTimeouts()
    ended: list[float] = []

    async def work(timeout_s: float) -> None:
        with pytest.raises(TimeoutError), timeouts.limit(timeout_s):
            await asyncio.sleep(10)
        ended.append(timeout_s)

    # The first sets the timer; the second must set it earlier.
    await asyncio.gather(work(0.3), work(0.05), work(0.15))
    assert ended == [0.05, 0.15, 0.3]


async def test_cancelled_from_outside_stays_cancelled() -> None:
    timeouts = CallTimeouts()

    async def work() -> None:
        with timeouts.limit(10):
            await asyncio.sleep(10)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_cancelled_and_out_of_time_at_once_stays_cancelled() -> None:
    timeouts = CallTimeouts()

    async def work() -> None:
        with timeouts.limit(0.02):
            await asyncio.sleep(10)

    task = asyncio.create_task(work())
    await asyncio.sleep(0)
    time.sleep(0.03)  # noqa: ASYNC251 - the timer must be due before the loop looks again
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
