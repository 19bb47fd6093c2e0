"""The application: its route table and the lifetimes of what lives as long as the process."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable

from aiohttp import web

from gateway import middleware
from gateway.admission.keys import KEYRING, Keyring, run_key_reload
from gateway.admission.ledger import LEDGER, LEDGER_NAME, Ledger
from gateway.admission.queue import GATE, Gate
from gateway.config import PREFIX, SETTINGS, Settings, SettingsError, load_settings, read_worker
from gateway.engines import warmup
from gateway.engines.engine import Engine, build_connector, build_session
from gateway.engines.pool import ENGINE_LIST, POOL, EngineList, Pool
from gateway.errors import GatewayError
from gateway.observability import pulse
from gateway.observability.grade_record import GradeFile
from gateway.observability.metrics import METRICS, Metrics
from gateway.observability.trace import SPANS, SpanSource
from gateway.page.launchers import LAUNCHERS, Launcher
from gateway.prompts.builder import PROMPTS, PromptBuilder
from gateway.routes import health, page, predict, relay, usage
from gateway.schemas.wire import SAMPLING_FIELDS, parse_sampling


def build_app(
    settings: Settings, reload: Callable[[], Settings] = load_settings
) -> web.Application:
    """The gateway as aiohttp serves it; `reload` reads the settings again when asked."""
    app = web.Application(
        client_max_size=settings.max_body_bytes,
        middlewares=[middleware.surround],
    )
    app[SETTINGS] = settings
    app[middleware.CROWD] = middleware.Crowd()
    worker = read_worker()
    app[METRICS] = Metrics(worker.folder)
    app[LEDGER] = Ledger(worker.folder / LEDGER_NAME if worker.folder else None)
    app[PROMPTS] = build_prompts(settings)
    app[KEYRING] = Keyring(settings, app[METRICS], app[LEDGER])
    app[GATE] = Gate(settings, app[METRICS], app[LEDGER], worker)

    async def hold_engines(app: web.Application) -> AsyncIterator[None]:
        connector = build_connector(settings)
        async with build_session(settings, connector) as session:

            def build_engine(url: str) -> Engine:
                return Engine(url, settings, connector, app[METRICS])

            app[POOL] = Pool(map(build_engine, settings.engines), settings, app[METRICS])
            app[LAUNCHERS] = [Launcher(url, session) for url in settings.launchers]
            app[ENGINE_LIST] = EngineList(settings, build_engine, reload)
            yield

    # First, so that it ends last: a drain can be watched.
    app.cleanup_ctx.append(health.run_metrics_port)
    app.cleanup_ctx.extend((hold_engines, warmup.run_warmup, pulse.run_pulse, run_key_reload))
    if settings.grade_record:
        GradeFile(settings.grade_record, app[METRICS])
    if settings.otlp_endpoint:
        app[SPANS] = build_spans(settings.otlp_endpoint)
        app.middlewares.insert(0, middleware.trace_spans)
        app.on_cleanup.append(close_spans)

    app.router.add_get("/", health.handle_root)
    app.router.add_get("/healthz", health.handle_healthz)
    app.router.add_get("/readyz", health.handle_readyz)
    app.router.add_get("/metrics", health.handle_metrics)
    app.router.add_get("/usage", usage.handle_usage)
    page.add_page(app)
    app.router.add_post("/predict", predict.handle_predict)
    for method, path in relay.ROUTES:
        app.router.add_route(method, path, relay.handle_relay)
    expect_routes(app)
    return app


def expect_routes(app: web.Application) -> None:
    """So that the first call of each is seen."""
    routes = {resource.canonical for resource in app.router.resources()} - middleware.QUIET_ROUTES
    entering = ("/predict", *relay.GENERATING)
    app[METRICS].expect_routes(sorted(routes), entering=entering, streaming=relay.STREAMING)


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


def build_spans(endpoint: str) -> SpanSource:
    """Loaded only when asked for: its packages are an extra, and take their time."""
    try:
        from gateway.observability.spans import Spans  # noqa: PLC0415
    except ModuleNotFoundError as error:
        raise SettingsError(
            f"GATEWAY_OTLP_ENDPOINT needs the extra `otel` ({error}): "
            "pip install -r requirements/otel.txt"
        ) from None
    return Spans(endpoint)


async def close_spans(app: web.Application) -> None:
    await app[SPANS].close()
