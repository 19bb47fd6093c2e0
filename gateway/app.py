"""The application: its route table and the lifetimes of what lives as long as the process."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from functools import partial
from typing import TYPE_CHECKING

import aiohttp
from aiohttp import web

from common.web.cors import ANY, CORS, CrossOrigin
from common.web.foreign_pages import PageGuard
from gateway import middleware
from gateway.admission.accounts import ACCOUNTS, Accounts
from gateway.admission.budgets import BudgetedLimits
from gateway.admission.keys import KEYRING, Keyring, run_key_reload
from gateway.admission.limits import LIMITS, Limits, LocalLimits
from gateway.admission.media_hosts import MEDIA_HOSTS, MediaHosts
from gateway.admission.queue import AdmissionQueue
from gateway.admission.served_models import MODELS, ServedModel, ServedModels
from gateway.admission.unattended import UnattendedCaller
from gateway.batches.access import BATCHES
from gateway.config import PREFIX, SETTINGS, Settings, SettingsError, load_settings
from gateway.discovery.engine_list import EngineList
from gateway.discovery.settings_reload import SettingsReload
from gateway.engines.capacity import EngineCapacity
from gateway.engines.client import EngineClient
from gateway.engines.connections import build_connector, build_session
from gateway.engines.engine import Engine
from gateway.engines.lists.batch import BatchGenerator
from gateway.engines.lists.deduplication import Deduplicator
from gateway.engines.pool import POOL, EnginePool, ModelPool
from gateway.engines.warmup import Warmup
from gateway.errors import GatewayError
from gateway.observability.grade_record import GradeRecordFile
from gateway.observability.metrics import METRICS, Metrics
from gateway.observability.runtime import watch_event_loop
from gateway.observability.tracing import TRACER, Tracer
from gateway.page.launchers import LAUNCHERS, Launchers
from gateway.prompts.builders import PromptBuilders
from gateway.records.access import RECORDS
from gateway.records.ledger import LEDGER, Ledger
from gateway.request_body import BODIES, HeldBodies
from gateway.responses.access import RESPONSES
from gateway.routes import (
    adapters,
    batches,
    files,
    health,
    metrics,
    openapi,
    page,
    predict,
    records,
    relay,
    responses,
    version,
)
from gateway.schemas.predict import SAMPLING_FIELDS, parse_sampling
from gateway.server import REFUSAL_PACE, RefusalPace

if TYPE_CHECKING:
    from gateway.batches.service import BatchService
    from gateway.records.service import Records
    from gateway.responses.service import Responses


def build_app(
    settings: Settings, reload: Callable[[], Settings] = load_settings
) -> web.Application:
    """The gateway as aiohttp serves it; `reload` reads the settings again when asked."""
    app = web.Application(
        client_max_size=settings.max_body_bytes,
        middlewares=[middleware.surround],
    )
    app[SETTINGS] = settings
    app[middleware.OPEN_REQUESTS] = middleware.OpenRequests()
    app[METRICS] = Metrics()
    app[REFUSAL_PACE] = RefusalPace(settings.refusals_per_s, app[METRICS])
    ledger = app[LEDGER] = build_ledger(settings, app[METRICS])
    limits = app[LIMITS] = build_limits(app, ledger)
    prompts = build_prompts(settings)
    app[BODIES] = HeldBodies(settings, app[METRICS])
    app[KEYRING] = Keyring(settings)
    app[ACCOUNTS] = Accounts(settings, app[KEYRING], limits, app[METRICS], ledger)
    app[MEDIA_HOSTS] = MediaHosts(settings)
    is_open = app[KEYRING].is_open
    app[CORS] = CrossOrigin(settings.cors_origins) if settings.cors_origins else None
    if is_open and ANY in settings.cors_origins:
        raise SettingsError(
            f"{PREFIX}CORS_ORIGINS=* without API keys would let any web page that somebody opens "
            "use the engine: list the origins, or set GATEWAY_KEYS_FILE or GATEWAY_API_KEYS"
        )
    app[middleware.PAGE_GUARD] = build_page_guard(settings) if is_open else None

    # First, so that it ends last: a drain can be watched.
    app.cleanup_ctx.append(metrics.run_metrics_port)
    if ledger is not None:
        app[RECORDS] = build_records(settings, ledger, app[METRICS])
        app.cleanup_ctx.append(run_records)
    engines = partial(run_engines, prompts=prompts, limits=limits, reload=reload)
    app.cleanup_ctx.extend((engines, watch_event_loop, run_key_reload))
    if settings.responses_database:
        app[RESPONSES] = build_responses(settings, app[METRICS])
        app.cleanup_ctx.append(run_responses)
    if settings.keeps_batches:
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
    app.router.add_get("/usage", records.handle_usage)
    app.router.add_get("/audit", records.handle_audit)
    page.add_page(app)
    app.router.add_post("/predict", predict.handle_predict)
    app.router.add_post(adapters.LOAD, adapters.handle_load)
    app.router.add_post(adapters.UNLOAD, adapters.handle_unload)
    for method, path in relay.ROUTES:
        app.router.add_route(method, path, relay.handle_relay)
    for room in (responses, files, batches):
        for (method, path), handler in zip(room.ROUTES, room.HANDLERS, strict=True):
            app.router.add_route(method, path, handler)
    # So that the first call of each is seen in the metrics.
    routes = {resource.canonical for resource in app.router.resources()} - middleware.QUIET_ROUTES
    entering = ("/predict", *relay.GENERATING)
    app[METRICS].expect_routes(
        sorted(routes - relay.SELDOM), entering=entering, streaming=relay.STREAMING
    )


async def run_engines(
    app: web.Application,
    prompts: PromptBuilders,
    limits: Limits,
    reload: Callable[[], Settings],
    build: Callable[[str, Settings, aiohttp.BaseConnector, Metrics], Engine] = Engine,
) -> AsyncIterator[None]:
    """The engines and the connections to them, for as long as the app lives."""
    settings, figures = app[SETTINGS], app[METRICS]
    connector = build_connector(settings)

    def build_engine(url: str) -> Engine:
        return build(url, settings, connector, figures)

    def build_model(pool: ModelPool, queue: AdmissionQueue | None) -> ServedModel:
        if queue is None:
            queue = AdmissionQueue(settings, limits)
            pool.on_capacity = queue.change_capacity
        generator = BatchGenerator(pool, settings, figures)
        return ServedModel(pool, queue, Deduplicator(generator, settings, figures))

    async with build_session(settings, connector) as session:
        pool = app[POOL] = EnginePool((), settings, figures)
        app[MODELS] = ServedModels(settings, pool, prompts, build_model, figures)
        app[LAUNCHERS] = Launchers(settings.launchers, session)
        capacity = EngineCapacity(
            settings, pool, lambda url: EngineClient(url, connector, settings)
        )
        generator = BatchGenerator(pool, settings, figures)
        warmup = Warmup(settings, pool, generator, prompts, figures, capacity=capacity)
        listed = EngineList(settings, pool, warmup, build_engine)
        await listed.start()
        reloading = SettingsReload(
            settings,
            prompts,
            read=reload,
            build_prompts=build_prompts,
            take_engines=listed.take_entries,
        )
        following = asyncio.create_task(reloading.follow())
        yield
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
        await listed.stop()


def build_batches(settings: Settings, figures: Metrics) -> BatchService:
    """Loaded only when asked for: its database takes its time."""
    from gateway.batches.service import BatchService  # noqa: PLC0415

    return BatchService(settings, figures)


async def run_batches(app: web.Application) -> AsyncIterator[None]:
    """For as long as the engines are there."""
    from gateway.batches.service import Parts  # noqa: PLC0415

    pool = app[POOL]
    parts = Parts(
        keyring=app[KEYRING],
        caller=build_unattended_caller(app),
        metrics=app[METRICS],
        open_requests=app[middleware.OPEN_REQUESTS],
        is_draining=lambda: pool.draining,
    )
    async with app[BATCHES].run(parts):
        yield


def build_responses(settings: Settings, figures: Metrics) -> Responses:
    """Loaded only when asked for, as batches are."""
    from gateway.responses.service import Responses  # noqa: PLC0415

    return Responses(settings, figures)


async def run_responses(app: web.Application) -> AsyncIterator[None]:
    """For as long as the engines are there."""
    from gateway.responses.background import Parts  # noqa: PLC0415

    parts = Parts(
        keyring=app[KEYRING],
        caller=build_unattended_caller(app),
        bodies=app[BODIES],
        open_requests=app[middleware.OPEN_REQUESTS],
        ledger=app[LEDGER],
    )
    async with app[RESPONSES].run(parts):
        yield


def build_unattended_caller(app: web.Application) -> UnattendedCaller:
    return UnattendedCaller(
        settings=app[SETTINGS],
        models=app[MODELS],
        accounts=app[ACCOUNTS],
        media_hosts=app[MEDIA_HOSTS],
        bodies=app[BODIES],
        ledger=app[LEDGER],
    )


def build_page_guard(settings: Settings) -> PageGuard:
    """Who lets everybody in does not know by which names programs come, unless they list them."""
    return PageGuard(
        settings.host,
        settings.allowed_hosts,
        f"{PREFIX}ALLOWED_HOSTS",
        only_browsers=settings.allow_anonymous and not settings.allowed_hosts,
        origins=settings.cors_origins,
    )


def build_prompts(settings: Settings) -> PromptBuilders:
    """What every request without a wish of its own would be refused for stops the start."""
    prompts = PromptBuilders(settings)
    try:
        own = {name: getattr(settings, name) for name in SAMPLING_FIELDS}
        own["stop"] = list(settings.stop)
        prompts.main.complete(parse_sampling(own, settings))
    except GatewayError as error:
        raise SettingsError(f"{PREFIX}{(error.param or '').upper()}: {error}") from None
    return prompts


def build_limits(app: web.Application, ledger: Ledger | None) -> Limits:
    """Redis's client is loaded only where there is a Redis: it takes its time."""
    limits: Limits = LocalLimits()
    if app[SETTINGS].redis_url:
        from gateway.admission.redis_limits import RedisLimits  # noqa: PLC0415

        limits = shared = RedisLimits(app[SETTINGS], app[METRICS])
        app.cleanup_ctx.append(shared.run)
    return limits if ledger is None else BudgetedLimits(limits, ledger)


def build_ledger(settings: Settings, figures: Metrics) -> Ledger | None:
    return Ledger(figures, audits=settings.audit) if settings.usage_database else None


def build_records(settings: Settings, ledger: Ledger, figures: Metrics) -> Records:
    """Loaded only when asked for, as batches are."""
    from gateway.records.service import Records  # noqa: PLC0415

    return Records(settings, ledger, figures)


async def run_records(app: web.Application) -> AsyncIterator[None]:
    """Before all that is to be kept, and after it."""
    async with app[RECORDS].run():
        yield


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
