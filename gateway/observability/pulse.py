"""The process watches itself: how late its event loop is, and how its engines stand.

Each worker writes its own row for each engine, so that whichever is asked can tell for all; only
engines of the settings as they are now are told of.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import platform
import time
from collections.abc import AsyncIterator, Iterator, Sequence

from aiohttp import web

from gateway.admission.ledger import LEDGER, Ledger, Row
from gateway.config import SETTINGS, Settings, Worker, read_worker
from gateway.engines.engine import Engine, EngineState
from gateway.engines.pool import POOL, Pool
from gateway.observability.metrics import METRICS, Metrics

_BEAT_S = 0.5
_RUNNING, _OPEN_UNTIL = 1, 2  # fields of a worker's row for an engine
_BEGAN_AT = 1


class Pulse:
    """Writes what this worker knows; reads what all of them know."""

    def __init__(
        self, settings: Settings, pool: Pool, metrics: Metrics, ledger: Ledger, worker: Worker
    ) -> None:
        self._pool = pool
        self._metrics = metrics
        self._ledger = ledger
        self._worker = worker
        metrics.engine_ready.read = self._read_ready
        metrics.engine_state.read = self._read_states
        metrics.engine_breaker_open.read = self._read_breakers
        metrics.engine_running_sequences.read = self._read_running
        metrics.max_running_sequences.read = lambda: [((), settings.max_running)]
        metrics.max_waiting_sequences.read = lambda: [((), settings.max_waiting)]
        began = ledger.row("start")
        began[_BEGAN_AT] = began[_BEGAN_AT] or time.time()  # a worker that comes back is no start
        metrics.start_time_seconds.read = lambda: [((), began[_BEGAN_AT])]
        about, build = describe_settings(settings), (read_version(), platform.python_version())
        metrics.config_info.read = lambda: [(about, 1)]
        metrics.build_info.read = lambda: [(build, 1)]

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due = loop.time() + _BEAT_S
            await asyncio.sleep(_BEAT_S)
            self._metrics.event_loop_lag_seconds.observe(max(0.0, loop.time() - due))
            self.publish()

    def publish(self) -> None:
        for engine in self._pool.engines:
            row = self._row(engine, self._worker.index)
            row[_RUNNING] = engine.running
            row[_OPEN_UNTIL] = engine.tripped_until

    def _row(self, engine: Engine, index: int) -> Row:
        return self._ledger.row(f"standing:{engine.url}:{index}")

    def _rows(self, engine: Engine) -> list[Row]:
        return [self._row(engine, index) for index in range(self._worker.count)]

    def _read_ready(self) -> Iterator[tuple[Sequence[str], float]]:
        for engine in self._pool.engines:
            yield (engine.url,), engine.state is EngineState.READY

    def _read_states(self) -> Iterator[tuple[Sequence[str], float]]:
        for engine in self._pool.engines:
            for state in EngineState:
                yield (engine.url, state), engine.state is state

    def _read_breakers(self) -> Iterator[tuple[Sequence[str], float]]:
        self.publish()
        now = time.monotonic()
        for engine in self._pool.engines:
            yield (engine.url,), sum(row[_OPEN_UNTIL] > now for row in self._rows(engine))

    def _read_running(self) -> Iterator[tuple[Sequence[str], float]]:
        self.publish()
        for engine in self._pool.engines:
            yield (engine.url,), sum(row[_RUNNING] for row in self._rows(engine))


def describe_settings(settings: Settings) -> tuple[str, ...]:
    """The values of `gateway_config_info`; the fingerprint tells that something has changed."""
    text = settings.model_dump_json(exclude={"api_keys"})
    return (
        hashlib.sha256(text.encode()).hexdigest()[:12],
        str(settings.workers),
        settings.prompt_style,
        str(settings.max_tokens),
        settings.routing,
        str(settings.dedup).lower(),
    )


def read_version() -> str:
    try:
        return importlib.metadata.version("vllm-gateway")
    except importlib.metadata.PackageNotFoundError:
        return "source"


async def run_pulse(app: web.Application) -> AsyncIterator[None]:
    """For as long as the app lives."""
    pulse = Pulse(app[SETTINGS], app[POOL], app[METRICS], app[LEDGER], read_worker())
    beating = asyncio.create_task(pulse.run())
    yield
    beating.cancel()
    await asyncio.gather(beating, return_exceptions=True)
