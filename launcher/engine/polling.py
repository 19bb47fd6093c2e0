"""Asking until the answer is yes; how long that may take is the caller's `asyncio.timeout`."""

from __future__ import annotations

import operator
from collections.abc import Awaitable, Callable
from typing import TypeVar, cast

import tenacity

T = TypeVar("T")


async def poll(ask: Callable[[], Awaitable[T | None]], *, pause_s: float) -> T:
    """The first answer that is neither False nor None."""
    asking = tenacity.AsyncRetrying(
        wait=tenacity.wait_fixed(pause_s), retry=tenacity.retry_if_result(operator.not_)
    )

    # Of a lambda tenacity would take the coroutine itself for the answer: always a yes.
    async def ask_once() -> T | None:
        return await ask()

    return cast("T", await asking(ask_once))
