"""The launcher's own face: /status, /crash, /readyz, /metrics. It takes no orders."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass
from typing import Any

from aiohttp import web
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from launcher.errors import SettingsError
from launcher.supervisor import Standing

_STATES = ("starting", "warming", "ready", "draining", "waiting", "stopped")


@dataclass(frozen=True)
class StatusSource:
    """What the endpoint reads; nothing here is written by it."""

    standings: dict[str, Standing]
    facts: dict[str, Any]
    labels: dict[str, str]
    progress: Callable[[], dict[str, Any] | None]
    crash: Callable[[], dict[str, Any] | None]

    def describe(self) -> dict[str, Any]:
        crash = self.crash()
        keys = ("time", "reason", "exit_code", "signal", "cause")
        return {
            **{name: describe_standing(standing) for name, standing in self.standings.items()},
            "progress": self.progress(),
            **self.facts,
            "last_crash": {key: crash[key] for key in keys} if crash else None,
        }


def describe_standing(standing: Standing) -> dict[str, Any]:
    return {
        "state": standing.state,
        "since_s": round(time.monotonic() - standing.since, 1),
        "pid": standing.pid,
        "start_seconds": standing.start_seconds and round(standing.start_seconds, 2),
        "restarts": standing.restarts,
    }


class StandingCollector(Collector):
    """Read at every scrape, so that nothing is counted twice."""

    def __init__(self, source: StatusSource) -> None:
        self._source = source

    def collect(self) -> Iterator[Metric]:
        info = GaugeMetricFamily(
            "launcher_engine_info", "What the engine runs.", labels=[*self._source.labels]
        )
        info.add_metric([*self._source.labels.values()], 1)
        yield info
        for name, standing in self._source.standings.items():
            yield from _collect(name, standing)


def _collect(name: str, standing: Standing) -> Iterator[Metric]:
    yield GaugeMetricFamily(
        f"launcher_{name}_up", f"1 while the {name} answers.", float(standing.state == "ready")
    )
    state = GaugeMetricFamily(f"launcher_{name}_state", "1 at the present state.", labels=["state"])
    for known in _STATES:
        state.add_metric([known], float(known == standing.state))
    yield state
    restarts = CounterMetricFamily(
        f"launcher_{name}_restarts", f"Restarts of the {name}.", labels=["reason"]
    )
    for reason, count in standing.restarts.items():
        restarts.add_metric([reason], count)
    yield restarts
    if standing.start_seconds is not None:
        yield GaugeMetricFamily(
            f"launcher_{name}_start_seconds",
            f"From the {name}'s last start to its first answer.",
            standing.start_seconds,
        )


@contextlib.asynccontextmanager
async def serve_status(source: StatusSource, host: str, port: int) -> AsyncIterator[None]:
    """While inside; port 0 serves nothing."""
    if not port:
        yield
        return
    runner = web.AppRunner(build_status_app(source), access_log=None)
    await runner.setup()
    try:
        try:
            await web.TCPSite(runner, host, port).start()
        except OSError as error:
            raise SettingsError(
                f"cannot listen on {host}:{port} ({error.strerror}); "
                "stop what uses it or set LAUNCHER_STATUS_PORT (0: none)"
            ) from None
        yield
    finally:
        await runner.cleanup()


def build_status_app(source: StatusSource) -> web.Application:
    registry = CollectorRegistry()
    registry.register(StandingCollector(source))

    async def status(_request: web.Request) -> web.Response:
        return _json(source.describe())

    async def crash(_request: web.Request) -> web.Response:
        card = source.crash()
        return _json(card) if card else _json({"error": "no crash so far"}, status=404)

    async def readyz(_request: web.Request) -> web.Response:
        states = {name: standing.state for name, standing in source.standings.items()}
        is_ready = all(state == "ready" for state in states.values())
        return _json(states, status=200 if is_ready else 503)

    async def metrics(_request: web.Request) -> web.Response:
        return web.Response(body=generate_latest(registry), content_type="text/plain")

    app = web.Application()
    app.router.add_get("/status", status)
    app.router.add_get("/crash", crash)
    app.router.add_get("/readyz", readyz)
    app.router.add_get("/metrics", metrics)
    return app


def _json(data: Any, *, status: int = 200) -> web.Response:
    text = json.dumps(data, indent=2, ensure_ascii=False)
    return web.Response(text=text + "\n", status=status, content_type="application/json")
