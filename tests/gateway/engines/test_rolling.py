"""A new model in the old one's place, as docs/operations.md has it: no call fails."""

from __future__ import annotations

import asyncio
from pathlib import Path

from gateway.config import Settings, load_settings
from gateway.engines.pool import POOL
from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.conftest import Serve, Served, until


async def test_new_engine_takes_over_under_load_and_no_call_fails(
    serve: Serve, tmp_path: Path
) -> None:
    path = tmp_path / "gateway.toml"
    old, new = Behaviour(), Behaviour()
    async with (
        serve_app(build_fake_engine(old)) as old_url,
        serve_app(build_fake_engine(new)) as new_url,
    ):

        def write(*urls: str) -> None:
            listed = ", ".join(f'"{url}"' for url in urls)
            path.write_text(f'prompt_style = "raw"\nengines = [{listed}]\n', encoding="utf-8")

        def reload() -> Settings:
            return load_settings(["--config", str(path)])

        write(old_url)
        own = {"config": path, "engines": (old_url,), "reload_interval_s": 0.05}
        async with serve(**own, reload=reload) as served:
            statuses: set[int] = set()
            callers = [asyncio.create_task(call_on(served, statuses)) for _ in range(8)]
            await until(lambda: len(old.calls) > 20)

            write(old_url, new_url)
            await until(lambda: len(new.calls) > 20)  # warmed up, and at work
            write(new_url)
            await until(lambda: is_gone(served, old_url))
            before, after = len(old.calls), len(new.calls) + 20
            await until(lambda: len(new.calls) > after)

            for caller in callers:
                caller.cancel()
            await asyncio.gather(*callers, return_exceptions=True)

    assert statuses == {200}
    assert len(old.calls) == before
    assert old.running == 0


async def call_on(served: Served, statuses: set[int]) -> None:
    number = 0
    while True:
        number += 1
        statuses.add((await served.predict(f"question {number}")).status_code)


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
