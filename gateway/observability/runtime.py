"""What the process tells of itself: how late its event loop is, since when it runs, what it is."""

from __future__ import annotations

import asyncio
import hashlib
import platform
import time
from collections.abc import AsyncIterator

from aiohttp import web

from common.project import read_version
from gateway.config import SETTINGS, Settings
from gateway.observability.metrics import METRICS, Metrics

_INTERVAL_S = 0.5


async def watch_event_loop(app: web.Application) -> AsyncIterator[None]:
    """For as long as the app lives."""
    metrics, settings = app[METRICS], app[SETTINGS]
    build = read_version(), platform.python_version()
    began_at = time.time()
    metrics.start_time_seconds.read = lambda: [((), began_at)]
    metrics.config_info.read = lambda: [(describe_settings(settings), 1)]
    metrics.build_info.read = lambda: [(build, 1)]
    metrics.event_loop_tasks.read = lambda: [((), len(asyncio.all_tasks()))]
    measuring = asyncio.create_task(_measure_lag(metrics))
    yield
    measuring.cancel()
    await asyncio.gather(measuring, return_exceptions=True)


async def _measure_lag(metrics: Metrics) -> None:
    loop = asyncio.get_running_loop()
    while True:
        due = loop.time() + _INTERVAL_S
        await asyncio.sleep(_INTERVAL_S)
        metrics.event_loop_lag_seconds.observe(max(0.0, loop.time() - due))


def describe_settings(settings: Settings) -> tuple[str, ...]:
    """The values of `gateway_config_info`; the fingerprint tells that something has changed."""
    text = settings.model_dump_json(exclude={"api_keys", "redis_url"})
    return (
        hashlib.sha256(text.encode()).hexdigest()[:12],
        settings.prompt_style,
        str(settings.max_tokens),
        settings.routing,
        str(settings.dedup).lower(),
    )
