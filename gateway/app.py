"""The application: its route table and the lifetimes of what lives as long as the process."""

from __future__ import annotations

from collections.abc import AsyncIterator

from aiohttp import web

from gateway import health, middleware, predict, relay, warmup
from gateway.admission import GATE, Gate
from gateway.config import SETTINGS, Settings
from gateway.engine import Engine, build_session
from gateway.keys import KEYRING, Keyring
from gateway.metrics import METRICS, Metrics
from gateway.pool import POOL, Pool
from gateway.prompts import PROMPTS, PromptBuilder


def build_app(settings: Settings) -> web.Application:
    """The gateway as aiohttp serves it."""
    app = web.Application(
        client_max_size=settings.max_body_bytes,
        middlewares=[
            middleware.trace_request,
            middleware.translate_errors,
            middleware.authenticate,
        ],
    )
    app[SETTINGS] = settings
    app[METRICS] = Metrics()
    app[PROMPTS] = PromptBuilder(settings)
    app[KEYRING] = Keyring(settings, app[METRICS])
    app[GATE] = Gate(settings, app[METRICS])
    app.cleanup_ctx.extend((_hold_engines, warmup.run_warmup))
    app.on_response_prepare.append(middleware.add_headers)

    app.router.add_get("/", health.handle_root)
    app.router.add_get("/healthz", health.handle_healthz)
    app.router.add_get("/readyz", health.handle_readyz)
    app.router.add_get("/metrics", health.handle_metrics)
    app.router.add_post("/predict", predict.handle_predict)
    for method, path in relay.ROUTES:
        app.router.add_route(method, path, relay.handle_relay)
    return app


async def _hold_engines(app: web.Application) -> AsyncIterator[None]:
    settings = app[SETTINGS]
    async with build_session(settings) as session:
        engines = [Engine(url, settings, session) for url in settings.engines]
        app[POOL] = Pool(engines, settings, app[METRICS])
        yield
