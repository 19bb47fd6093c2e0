"""The most sequences that an engine had at once."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from dataclasses import dataclass

from tests.fake_engine import Behaviour


@dataclass
class Peak:
    most: int = 0


@contextlib.asynccontextmanager
async def watch_peak(engine: Behaviour) -> AsyncIterator[Peak]:
    """At each turn of the event loop, for as long as the block runs."""
    peak = Peak()

    async def watch() -> None:
        while True:
            peak.most = max(peak.most, engine.running)
            await asyncio.sleep(0)

    watching = asyncio.create_task(watch())
    try:
        yield peak
    finally:
        watching.cancel()
