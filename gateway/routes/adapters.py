"""POST /v1/load_lora_adapter and /v1/unload_lora_adapter: a model's adapters, changed in all of its
engines by an admin key alone, for a path on their hosts is read and put before other callers.
"""

from __future__ import annotations

import asyncio

from aiohttp import web

from gateway.admission.keys import CALLER
from gateway.admission.served_models import MODELS
from gateway.config import SETTINGS
from gateway.engines.engine import Engine, EngineState
from gateway.engines.pool import POOL, EnginePool, ModelPool
from gateway.errors import EngineError, Forbidden, GatewayError, InvalidRequest, NotFound
from gateway.request_body import read_body
from gateway.request_context import CONTEXT
from gateway.schemas.adapters import (
    AdapterOrder,
    build_adapter_answer,
    explain_adapter_refusal,
    parse_adapter_order,
)

LOAD = "/v1/load_lora_adapter"
UNLOAD = "/v1/unload_lora_adapter"


async def handle_load(request: web.Request) -> web.Response:
    _check_admin(request)
    order = parse_adapter_order(await read_body(request), is_load=True)
    models, aliases = request.app[MODELS], request.app[SETTINGS].alias_map
    name = aliases.get(order.model, order.model) if order.model else None
    served = await models.find(name, request[CALLER], request[CONTEXT].deadline)
    if served.pool.base:
        raise InvalidRequest(f"{name!r} is an adapter itself; name its model", param="model")
    if order.name in request.app[POOL].models or order.name in aliases:
        raise InvalidRequest(f"{order.name!r} is the name of a model here", param="lora_name")
    await served.pool.ensure_ready(None)
    return await _change(request, LOAD, order, served.pool)


async def handle_unload(request: web.Request) -> web.Response:
    _check_admin(request)
    order = parse_adapter_order(await read_body(request), is_load=False)
    pools = request.app[POOL]
    holders = pools.adapters.get(order.name)
    pool = pools.models.get(holders.base) if holders else None
    if pool is None:
        raise NotFound(
            f"there is no adapter {order.name!r}; GET /v1/models lists what there is",
            param="lora_name",
            code="model_not_found",
        )
    return await _change(request, UNLOAD, order, pool)


def _check_admin(request: web.Request) -> None:
    """Also where everybody may come in: an open gateway has no admin."""
    if not request[CALLER].admin:
        raise Forbidden(
            "this needs an admin key (`admin = true` in GATEWAY_KEYS_FILE)", code="not_admin"
        )


async def _change(
    request: web.Request, path: str, order: AdapterOrder, pool: ModelPool
) -> web.Response:
    engines = [engine for engine in pool.engines if engine.state is EngineState.READY]
    changing = asyncio.gather(
        *(_change_engine(request.app[POOL], engine, path, order.body) for engine in engines)
    )
    try:
        failures = await asyncio.shield(changing)
    except asyncio.CancelledError:
        # An engine goes on though the caller hangs up, and what it has then is to be known.
        await changing
        raise
    changed = failures.count(None)
    for failure in failures:
        if failure is not None:
            failure.message += f"; {changed} of {len(engines)} engines have done it"
            raise failure
    body = build_adapter_answer(order.name, pool.name, [engine.url for engine in engines])
    return web.Response(body=body, content_type="application/json")


async def _change_engine(
    pool: EnginePool, engine: Engine, path: str, body: bytes
) -> GatewayError | None:
    """What it serves then is read whatever it answered: it may have done so before, or have been
    too slow to say.
    """
    failure: GatewayError | None = None
    try:
        status, answer = await engine.change_adapter(path, body)
        if status != 200:
            failure = explain_adapter_refusal(engine.url, status, answer, is_load=path == LOAD)
    except GatewayError as error:
        failure = error
    try:
        if cards := await engine.read_model_cards():
            await pool.set_cards(engine, cards)
    except (GatewayError, TimeoutError) as error:
        reason = str(error) or "no answer in time"
        failure = failure or EngineError(
            f"{engine.url} does not say what it serves now ({reason}); send the same again"
        )
    return failure
