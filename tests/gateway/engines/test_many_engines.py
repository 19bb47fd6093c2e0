"""What hundreds of engines must not cost: each call, each look, each caller who waits."""

from __future__ import annotations

import asyncio
import contextlib
from collections import Counter
from collections.abc import AsyncIterator

from gateway.engines.connections import build_connector
from gateway.engines.engine import Engine, EngineState
from gateway.engines.pool import EnginePool
from gateway.observability.metrics import Metrics
from tests.gateway.conftest import make_settings

_ENGINES = 300


class CountedEngine(Engine):
    """Counts how often it is asked whether it is usable."""

    asked = 0

    @property
    def is_usable(self) -> bool:
        type(self).asked += 1
        return super().is_usable


@contextlib.asynccontextmanager
async def _build_pool(count: int = _ENGINES, *, is_ready: bool = True) -> AsyncIterator[EnginePool]:
    settings, metrics = make_settings(), Metrics()
    connector = build_connector(settings)
    pool = EnginePool((), settings, metrics)
    engines = [
        CountedEngine(f"http://10.0.{n // 250}.{n % 250}:8000", settings, connector, metrics)
        for n in range(count)
    ]
    await pool.set_engines(engines)
    for engine in engines if is_ready else ():
        await pool.set_state(engine, EngineState.READY)
    yield pool
    await connector.close()


async def test_choice_among_hundreds_asks_few_of_them() -> None:
    async with _build_pool() as pool:
        for number, engine in enumerate(pool.engines):
            engine.running = 1 + number % 7
        pool.engines[200].running = 0
        CountedEngine.asked = 0
        for affinity in ("", "a session"):
            await pool.acquire(affinity)

        assert await pool.acquire() is pool.engines[200]
        assert CountedEngine.asked < 20


async def test_choice_passes_over_what_has_just_failed() -> None:
    async with _build_pool() as pool:
        for engine in pool.engines[10:]:
            engine.running = 1
        for engine in pool.engines[:5]:
            engine.note_failure()
        for engine in pool.engines[5:8]:
            engine.note_busy()

        assert await pool.acquire(avoid=pool.engines[8]) is pool.engines[9]


async def test_only_sessions_of_engines_that_go_move() -> None:
    async with _build_pool() as pool:
        sessions = [f"session {number}" for number in range(3000)]
        before = {one: await pool.acquire(one) for one in sessions}
        gone = set(pool.engines[::10])
        for engine in gone:
            await pool.set_state(engine, EngineState.DOWN, "gone")
        after = {one: await pool.acquire(one) for one in sessions}

    moved = {one for one in sessions if before[one] is not after[one]}
    assert moved == {one for one in sessions if before[one] in gone}
    counts = Counter(before.values())
    assert len(counts) > 0.99 * _ENGINES
    assert max(counts.values()) < 30  # ten on the mean


async def test_session_moves_for_a_full_engine_and_not_for_a_few_calls() -> None:
    async with _build_pool() as pool:
        its = await pool.acquire("a session")
        its.running = 7  # and all others nothing
        assert await pool.acquire("a session") is its

        its.running = 8
        assert await pool.acquire("a session") is not its

        its.running, its.sequences = 3, 4
        assert await pool.acquire("a session") is not its


async def test_engine_that_is_still_away_wakes_nobody() -> None:
    async with _build_pool(is_ready=False) as pool:
        looks, has_looked = 0, asyncio.Event()

        def holds() -> bool:
            nonlocal looks
            looks += 1
            has_looked.set()
            return pool.has_engine

        waiting = asyncio.create_task(pool.wait_until(holds, 60))
        await has_looked.wait()
        for _ in range(3):
            for engine in pool.engines:
                await pool.set_state(engine, EngineState.DOWN, "it does not answer GET /health")
                await asyncio.sleep(0)
        assert looks == 1

        await pool.set_state(pool.engines[7], EngineState.READY)
        assert await waiting


async def test_message_names_few_of_hundreds() -> None:
    async with _build_pool(is_ready=False) as pool:
        told = pool.describe()

    assert told.count("is down") == 8
    assert told.endswith(f"and {_ENGINES - 8} more")
