"""GET /openapi.json and /docs: what this gateway serves, with the models that are behind it now."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web

from common.project import read_version
from gateway.admission.keys import KEYRING
from gateway.config import SETTINGS
from gateway.engines.attempt import EngineCall
from gateway.engines.engine import Engine
from gateway.engines.pool import POOL
from gateway.errors import GatewayError
from gateway.page.docs import render_docs
from gateway.request_context import CONTEXT
from gateway.schemas.openapi import NOTES, build_openapi, parse_engine_openapi

_POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"
_HEADERS = {"Content-Security-Policy": _POLICY, "X-Content-Type-Options": "nosniff"}


@dataclass(slots=True)
class ApiDescription:
    """As it was built last, and of which life of an engine of each model, None where none is ready:
    as long as these are the same, nothing changes.
    """

    lives: list[tuple[Engine, int] | None] | None = None
    document: bytes = b""
    page: bytes = b""


API_DESCRIPTION = web.AppKey("api_description", ApiDescription)


async def handle_openapi(request: web.Request) -> web.Response:
    description = await _describe(request)
    return web.Response(body=description.document, content_type="application/json")


async def handle_docs(request: web.Request) -> web.Response:
    description = await _describe(request)
    return web.Response(
        body=description.page, content_type="text/html", charset="utf-8", headers=_HEADERS
    )


async def _describe(request: web.Request) -> ApiDescription:
    app = request.app
    pools = app[POOL].models.values()
    engines = [next((one for one in pool.engines if one.is_usable), None) for pool in pools]
    lives = [None if one is None else (one, one.starts) for one in engines]
    known = app[API_DESCRIPTION]
    if known.lives == lives:
        return known
    asked = await asyncio.gather(*(_ask(request, engine) for engine in engines))
    told = [document for document, _ in asked]
    document = build_openapi(
        list_routes(app), read_version(), app[SETTINGS], told, needs_key=not app[KEYRING].is_open
    )
    description = ApiDescription(lives, orjson.dumps(document), render_docs(document))
    if all(is_known for _, is_known in asked):
        # It is the same to everybody, and large.
        known.lives = lives
        known.document, known.page = description.document, description.page
    return description


async def _ask(request: web.Request, engine: Engine | None) -> tuple[dict[str, Any] | None, bool]:
    """What the engine says of itself, if it does; and whether it would say the same again."""
    if engine is None:
        return None, True
    call = EngineCall(
        request[CONTEXT],
        "GET",
        "/openapi.json",
        tries_left=1,
        engine=engine,
        parse=_parse,
        is_relayed=True,
    )
    try:
        async with request.app[POOL].attempt(call) as answer:
            return answer.value, answer.status < 500
    except GatewayError:
        return None, False


def _parse(status: int, body: bytes) -> dict[str, Any] | None:
    try:
        return parse_engine_openapi(status, orjson.loads(body))
    except orjson.JSONDecodeError:
        return None


def list_routes(app: web.Application) -> list[tuple[str, str]]:
    """In the order in which they are described; HEAD goes without saying, and the page's files."""
    served = {
        (route.method, route.resource.canonical)
        for route in app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }
    order = {path: place for place, path in enumerate(NOTES)}
    return sorted((one for one in served if one[1] in order), key=lambda one: order[one[1]])
