"""The application: its route table and the lifetimes of what lives as long as the process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING

from aiohttp import web

from common.web.foreign_pages import PageGuard
from gateway import middleware
from gateway.admission.accounts import ACCOUNTS, Accounts
from gateway.admission.keys import KEYRING, Keyring, run_key_reload
from gateway.admission.limits import LocalLimits
from gateway.admission.media_hosts import MEDIA_HOSTS, MediaHosts
from gateway.admission.queue import QUEUE, AdmissionQueue
from gateway.batches.access import BATCHES
from gateway.config import PREFIX, SETTINGS, Settings, SettingsError, load_settings
from gateway.engines.batch import BatchGenerator
from gateway.engines.capacity import EngineCapacity
from gateway.engines.client import EngineClient
from gateway.engines.connections import build_connector, build_session
from gateway.engines.deduplication import GENERATOR, Deduplicator
from gateway.engines.discovery import EngineDiscovery
from gateway.engines.engine import Engine
from gateway.engines.pool import POOL, EnginePool
from gateway.engines.warmup import Warmup
from gateway.errors import GatewayError
from gateway.observability.grade_record import GradeRecordFile
from gateway.observability.metrics import METRICS, Metrics
from gateway.observability.runtime import watch_event_loop
from gateway.observability.tracing import TRACER, Tracer
from gateway.page.launchers import LAUNCHERS, LauncherClient
from gateway.prompts.builder import PROMPTS, PromptBuilder
from gateway.request_body import BODIES, HeldBodies
from gateway.routes import (
    batches,
    files,
    health,
    metrics,
    openapi,
    page,
    predict,
    relay,
    responses,
    usage,
    version,
)
from gateway.schemas.predict import SAMPLING_FIELDS, parse_sampling

if TYPE_CHECKING:
    from gateway.batches.service import BatchService


def build_app(
    settings: Settings, reload: Callable[[], Settings] = load_settings
) -> web.Application:
    """The gateway as aiohttp serves it; `reload` reads the settings again when asked."""
    app = web.Application(
        client_max_size=settings.max_body_bytes,
        middlewares=[middleware.surround],
    )
    limits = LocalLimits()
    app[SETTINGS] = settings
    app[middleware.OPEN_REQUESTS] = middleware.OpenRequests()
    app[METRICS] = Metrics()
    app[PROMPTS] = build_prompts(settings)
    app[BODIES] = HeldBodies(settings, app[METRICS])
    app[KEYRING] = Keyring(settings)
    app[ACCOUNTS] = Accounts(settings, app[KEYRING], limits, app[METRICS])
    app[QUEUE] = AdmissionQueue(settings, app[METRICS], limits)
    app[MEDIA_HOSTS] = MediaHosts(settings)
    is_open = app[KEYRING].is_open
    app[middleware.PAGE_GUARD] = build_page_guard(settings) if is_open else None

    # First, so that it ends last: a drain can be watched.
    app.cleanup_ctx.append(metrics.run_metrics_port)
    app.cleanup_ctx.extend((partial(run_engines, reload=reload), watch_event_loop, run_key_reload))
    if settings.batch_folder is not None:
        app[BATCHES] = build_batches(settings, app[METRICS])
        app.cleanup_ctx.append(run_batches)
    if settings.grade_record:
        GradeRecordFile(settings.grade_record, app[METRICS])
    if settings.otlp_endpoint:
        app[TRACER] = build_tracer(settings.otlp_endpoint)
        app.middlewares.insert(0, middleware.trace_spans)
        app.on_cleanup.append(close_tracer)
    app.on_cleanup.append(close_media_hosts)
    add_routes(app)
    return app


def add_routes(app: web.Application) -> None:
    """A route is one file and one line here."""
    app.router.add_get("/", health.handle_root)
    for path in ("/health", "/healthz"):
        app.router.add_get(path, health.handle_healthz)
    app.router.add_get("/readyz", health.handle_readyz)
    app[openapi.API_DESCRIPTION] = openapi.ApiDescription()
    app.router.add_get("/openapi.json", openapi.handle_openapi)
    app.router.add_get("/docs", openapi.handle_docs)
    app.router.add_get("/version", version.handle_version)
    app.router.add_get("/metrics", metrics.handle_metrics)
    app.router.add_get("/usage", usage.handle_usage)
    page.add_page(app)
    app.router.add_post("/predict", predict.handle_predict)
    for method, path in relay.ROUTES:
        app.router.add_route(method, path, relay.handle_relay)
    for method, path in responses.ROUTES:
        app.router.add_route(method, path, responses.handle_response)
    for room in (files, batches):
        for (method, path), handler in zip(room.ROUTES, room.HANDLERS, strict=True):
            app.router.add_route(method, path, handler)
    # So that the first call of each is seen in the metrics.
    routes = {resource.canonical for resource in app.router.resources()} - middleware.QUIET_ROUTES
    entering = ("/predict", *relay.GENERATING)
    app[METRICS].expect_routes(
        sorted(routes - relay.SELDOM), entering=entering, streaming=relay.STREAMING
    )


async def run_engines(app: web.Application, reload: Callable[[], Settings]) -> AsyncIterator[None]:
    """The engines and the connections to them, for as long as the app lives."""
    settings, figures = app[SETTINGS], app[METRICS]
    connector = build_connector(settings)

    def build_engine(url: str) -> Engine:
        return Engine(url, settings, connector, figures)

    async with build_session(settings, connector) as session:
        pool = app[POOL] = EnginePool(map(build_engine, settings.engines), settings, figures)
        generator = BatchGenerator(pool, settings, figures)
        app[GENERATOR] = Deduplicator(generator, settings, figures)
        app[LAUNCHERS] = [LauncherClient(url, session) for url in settings.launchers]
        pool.on_capacity = app[QUEUE].change_capacity
        capacity = EngineCapacity(
            settings, pool, lambda url: EngineClient(url, connector, settings)
        )
        warmup = Warmup(settings, pool, generator, app[PROMPTS], figures, capacity=capacity)
        discovery = EngineDiscovery(settings, pool, warmup, build_engine, reload)
        discovery.start()
        following = asyncio.create_task(discovery.follow())
        yield
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await discovery.stop()


def build_batches(settings: Settings, figures: Metrics) -> BatchService:
    """Loaded only when asked for: its database takes its time."""
    from gateway.batches.service import BatchService  # noqa: PLC0415

    return BatchService(settings, figures)


async def run_batches(app: web.Application) -> AsyncIterator[None]:
    """For as long as the engines are there."""
    from gateway.batches.calls import BatchCaller  # noqa: PLC0415
    from gateway.batches.service import Parts  # noqa: PLC0415

    pool = app[POOL]
    caller = BatchCaller(
        settings=app[SETTINGS],
        pool=pool,
        queue=app[QUEUE],
        accounts=app[ACCOUNTS],
        media_hosts=app[MEDIA_HOSTS],
        bodies=app[BODIES],
    )
    parts = Parts(
        keyring=app[KEYRING],
        caller=caller,
        metrics=app[METRICS],
        open_requests=app[middleware.OPEN_REQUESTS],
        is_draining=lambda: pool.draining,
    )
    async with app[BATCHES].run(parts):
        yield


def build_page_guard(settings: Settings) -> PageGuard:
    """Who lets everybody in does not know by which names programs come, unless they list them."""
    return PageGuard(
        settings.host,
        settings.allowed_hosts,
        f"{PREFIX}ALLOWED_HOSTS",
        only_browsers=settings.allow_anonymous and not settings.allowed_hosts,
    )


def build_prompts(settings: Settings) -> PromptBuilder:
    """What every request without a wish of its own would be refused for stops the start."""
    builder = PromptBuilder(settings)
    try:
        own = {name: getattr(settings, name) for name in SAMPLING_FIELDS}
        own["stop"] = list(settings.stop)
        builder.complete(parse_sampling(own, settings))
    except GatewayError as error:
        raise SettingsError(f"{PREFIX}{(error.param or '').upper()}: {error}") from None
    return builder


def build_tracer(endpoint: str) -> Tracer:
    """Loaded only when asked for: its packages are an extra, and take their time."""
    try:
        from gateway.observability.otel import OpenTelemetryTracer  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"GATEWAY_OTLP_ENDPOINT needs the extra `otel` ({error}): "
            "pip install vllm-gateway[otel]"
        ) from None
    return OpenTelemetryTracer(endpoint)


async def close_media_hosts(app: web.Application) -> None:
    app[MEDIA_HOSTS].close()


async def close_tracer(app: web.Application) -> None:
    await app[TRACER].close()
