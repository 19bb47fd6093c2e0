"""GET /, /healthz, /readyz and /metrics: what others ask before they send work.

And the port for Prometheus alone, where /metrics tells the names of keys.
"""

from __future__ import annotations

from collections.abc import AsyncIterator

import orjson
from aiohttp import web

from gateway.admission.keys import KEYRING
from gateway.config import SETTINGS, SettingsError, read_worker
from gateway.engines.pool import POOL
from gateway.errors import Unavailable
from gateway.observability.metrics import METRICS, Metrics

_RETRY_AFTER_S = 1


async def handle_root(request: web.Request) -> web.Response:
    """The course's judge polls this: held until warm, for as long as the setting allows."""
    settings = request.app[SETTINGS]
    pool = request.app[POOL]
    if await pool.wait_ready(settings.root_hold_s) and pool.is_ready:
        return _json({"status": settings.root_status})
    return _json({"status": "warming"}, status=503, headers={"Retry-After": str(_RETRY_AFTER_S)})


async def handle_healthz(_request: web.Request) -> web.Response:
    return _json({"status": "ok"})


async def handle_readyz(request: web.Request) -> web.Response:
    pool = request.app[POOL]
    if not pool.is_ready:
        raise Unavailable(pool.describe(), retry_after_s=_RETRY_AFTER_S)
    return _json({"status": "ready"})


async def handle_metrics(request: web.Request) -> web.Response:
    """For everybody, so without the names of keys."""
    return _answer_metrics(request, request.app[METRICS], by_key=request.app[KEYRING].is_open)


def _answer_metrics(request: web.Request, metrics: Metrics, *, by_key: bool) -> web.Response:
    """Classic text, or OpenMetrics for who asks for it, as Prometheus does."""
    body, content_type = metrics.render(request.headers.get("Accept", ""), by_key=by_key)
    return web.Response(body=body, headers={"Content-Type": content_type})


async def run_metrics_port(app: web.Application) -> AsyncIterator[None]:
    """An app of its own: whoever reaches this port must not reach an engine through it."""
    settings = app[SETTINGS]
    if not settings.metrics_port:
        yield
        return

    async def answer(request: web.Request) -> web.Response:
        return _answer_metrics(request, app[METRICS], by_key=True)

    inner = web.Application()
    inner.router.add_get("/metrics", answer)
    runner = web.AppRunner(inner, access_log=None)
    await runner.setup()
    host, port = settings.metrics_host, settings.metrics_port
    try:
        await web.TCPSite(runner, host, port, reuse_port=read_worker().count > 1).start()
    except OSError as error:
        await runner.cleanup()
        raise SettingsError(
            f"cannot listen on {host}:{port} ({error.strerror}); stop what uses it or set "
            "GATEWAY_METRICS_PORT"
        ) from None
    yield
    await runner.cleanup()


def _json(
    data: object, *, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    return web.Response(
        body=orjson.dumps(data), status=status, headers=headers, content_type="application/json"
    )
