"""An engine that left the list is told of until it has finished what it had."""

from __future__ import annotations

import asyncio

from gateway.engines.pool import POOL
from tests.fake_engine import Behaviour
from tests.gateway.conftest import Serve, Served, until


async def is_gone(served: Served, url: str) -> bool:
    """The gateway has the engine no more, and it has finished what it had."""
    metrics = (await served.client.get("/metrics")).text
    figures = ("gateway_engine_ready", "gateway_engine_running_sequences")
    return not any(f'{figure}{{engine="{url}"}}' in metrics for figure in figures)


async def test_engine_that_left_is_told_until_it_has_finished(serve: Serve) -> None:
    old, new = Behaviour(), Behaviour()
    async with serve(old, new) as served:
        old.slots, new.slots = asyncio.Semaphore(0), asyncio.Semaphore(0)
        calls = [asyncio.create_task(served.chat("hi")) for _ in range(4)]
        await until(lambda: (old.running, new.running) == (2, 2))
        gone, stays = served.app[POOL].engines
        await served.app[POOL].set_engines([stays])

        figure = f'gateway_engine_running_sequences{{engine="{gone.url}"}} 2.0\n'
        assert figure in (await served.client.get("/metrics")).text
        assert not await is_gone(served, gone.url)
        old.slots.release()
        old.slots.release()
        await until(lambda: is_gone(served, gone.url))

        assert f'"{gone.url}"' not in (await served.client.get("/metrics")).text
        assert old.running == 0
        new.slots.release()
        new.slots.release()
        assert {(await call).status_code for call in calls} == {200}
