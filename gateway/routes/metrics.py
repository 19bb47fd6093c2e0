"""GET /metrics; and a port for Prometheus alone, where it tells the names of keys."""

from __future__ import annotations

from collections.abc import AsyncIterator

from aiohttp import web

from common.web.foreign_pages import PageGuard, build_middleware
from gateway.admission.keys import KEYRING
from gateway.config import PREFIX, SETTINGS, SettingsError
from gateway.listening import listen
from gateway.observability.metrics import METRICS, Metrics


async def handle_metrics(request: web.Request) -> web.Response:
    """For everybody, so without the names of keys."""
    return await _answer_metrics(request, request.app[METRICS], by_key=request.app[KEYRING].is_open)


async def _answer_metrics(request: web.Request, metrics: Metrics, *, by_key: bool) -> web.Response:
    """Classic text, or OpenMetrics for who asks for it, as Prometheus does."""
    body, content_type = await metrics.render(request.headers.get("Accept", ""), by_key=by_key)
    return web.Response(body=body, headers={"Content-Type": content_type})


async def run_metrics_port(app: web.Application) -> AsyncIterator[None]:
    """An app of its own: whoever reaches this port must not reach an engine through it."""
    settings = app[SETTINGS]
    if not settings.metrics_port:
        yield
        return

    async def answer(request: web.Request) -> web.Response:
        return await _answer_metrics(request, app[METRICS], by_key=True)

    # Nobody needs a key here, so a web page must not come by.
    guard = PageGuard(settings.metrics_host, settings.allowed_hosts, f"{PREFIX}ALLOWED_HOSTS")
    inner = web.Application(middlewares=[build_middleware(guard)])
    inner.router.add_get("/metrics", answer)
    runner = web.AppRunner(inner, access_log=None)
    await runner.setup()
    host, port = settings.metrics_host, settings.metrics_port
    try:
        await listen(runner, host, port)
    except OSError as error:
        await runner.cleanup()
        raise SettingsError(
            f"cannot listen on {host}:{port} ({error.strerror}); stop what uses it or set "
            "GATEWAY_METRICS_PORT"
        ) from None
    yield
    await runner.cleanup()
