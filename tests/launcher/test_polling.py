"""Asking until the answer is yes."""

from __future__ import annotations

import asyncio

import pytest

from launcher.engine.polling import poll


async def test_poll_returns_the_first_answer_that_is_not_empty() -> None:
    answers = iter((False, None, 7, 8))

    async def ask() -> int | None:
        return next(answers)

    assert await poll(ask, pause_s=0.001) == 7


async def test_poll_ends_with_its_callers_time_and_with_an_error() -> None:
    async def never() -> bool:
        return False

    async def fail() -> bool:
        raise ZeroDivisionError

    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.05):
            await poll(never, pause_s=0.001)
    with pytest.raises(ZeroDivisionError):
        await poll(fail, pause_s=0.001)


async def test_poll_awaits_whatever_returns_an_awaitable() -> None:
    answers = iter((False, 7))

    async def ask(name: str) -> int | None:
        return next(answers) if name == "a" else None

    assert await poll(lambda: ask("a"), pause_s=0.001) == 7
