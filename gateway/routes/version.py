"""GET /version: what serves here."""

from __future__ import annotations

import orjson
from aiohttp import web

from common.project import read_version
from gateway.engines.attempt import EngineCall
from gateway.engines.pool import POOL
from gateway.errors import EngineError
from gateway.request_context import CONTEXT
from gateway.schemas.vllm import parse_version


async def handle_version(request: web.Request) -> web.Response:
    """The engine's under the name that clients of vLLM read, as long as one is there to say it."""
    pool, version = request.app[POOL], None
    if pool.is_ready:
        call = EngineCall(
            request[CONTEXT], "GET", "/version", tries_left=1, parse=parse_version, is_relayed=True
        )
        try:
            async with pool.attempt(call) as answer:
                version = answer.value
        except EngineError:
            version = None  # it is the gateway that has been asked
    body = orjson.dumps({"version": version, "gateway": read_version()})
    return web.Response(body=body, content_type="application/json")
