"""What lines of batches cost those who wait, as their streams tell."""

from __future__ import annotations

import asyncio

import pytest

from gateway.admission.served_models import MODELS
from gateway.admission.throughput import FirstTokens
from tests.gateway.conftest import Serve, until


def _learn(first_tokens: FirstTokens, seconds: float, lines: int, times: int = 24) -> None:
    for _ in range(times):
        first_tokens.learn(seconds, lines)


def test_slowdown_is_told_once_by_nine_of_ten_of_enough_streams() -> None:
    first_tokens = FirstTokens()
    _learn(first_tokens, 0.1, lines=0)
    first_tokens.forget_beside()
    _learn(first_tokens, 0.2, lines=8, times=23)
    too_few = first_tokens.take_slowdown()
    first_tokens.learn(9.0, lines=8)  # late for a reason of its own

    assert too_few is None
    assert first_tokens.take_slowdown() == 2.0
    assert first_tokens.take_slowdown() is None


def test_slowdown_is_unknown_without_streams_alone() -> None:
    first_tokens = FirstTokens()
    _learn(first_tokens, 0.1, lines=8)

    assert first_tokens.take_slowdown() is None


def test_single_line_is_no_reason_to_yield() -> None:
    first_tokens = FirstTokens()
    _learn(first_tokens, 0.1, lines=0)
    first_tokens.forget_beside()
    _learn(first_tokens, 0.3, lines=1)  # by day all is slower

    assert first_tokens.take_slowdown() == 1.0
    _learn(first_tokens, 0.6, lines=2)
    assert first_tokens.take_slowdown() == pytest.approx(2.0)  # not six


async def test_streams_tell_how_long_their_first_token_took(serve: Serve) -> None:
    async with serve() as served:
        (model,) = served.app[MODELS].all
        for _ in range(24):
            await served.chat("a", stream=True)
        slots = [served.chat(f"b{n}", n=2) for n in range(2)]
        served.engine.delay_s = 60.0
        held = [asyncio.create_task(one) for one in slots]
        await until(lambda: model.queue.count("batch")[0] == 4)
        served.engine.delay_s = 0.0
        model.first_tokens.forget_beside()
        for _ in range(24):
            await served.chat("c", stream=True)
        slowdown = model.first_tokens.take_slowdown()
        for one in held:
            one.cancel()
        await asyncio.gather(*held, return_exceptions=True)

    assert slowdown is not None
    assert slowdown != 1.0
