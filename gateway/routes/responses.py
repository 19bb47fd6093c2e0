"""/v1/responses/{id}: a stored response, as the key that made it may have it.

Where this gateway stores none an engine may have kept it: they are asked one by one until one has
it, and whoever knows the id may have it.
"""

from __future__ import annotations

from typing import cast

import orjson
from aiohttp import web

from gateway.admission.keys import CALLER
from gateway.engines.attempt import EngineCall
from gateway.engines.engine import Engine
from gateway.engines.pool import POOL
from gateway.errors import EngineError, GatewayError, InvalidRequest, Unavailable
from gateway.request_body import read_body
from gateway.request_context import CONTEXT
from gateway.responses.access import RESPONSES, find_responses
from gateway.responses.shapes import build_deleted
from gateway.schemas.fields import read_flag
from gateway.schemas.openai import name_engine_error
from gateway.schemas.pages import parse_page
from gateway.streaming import follow_events

_ID = "{response_id:[A-Za-z0-9_-]{1,128}}"
ROUTES = (
    ("GET", f"/v1/responses/{_ID}"),
    ("DELETE", f"/v1/responses/{_ID}"),
    ("GET", f"/v1/responses/{_ID}/input_items"),
    ("POST", f"/v1/responses/{_ID}/cancel"),
)
_USUALLY_LISTED, _MOST_LISTED = 20, 100
_DIGITS = 9


async def handle_retrieve(request: web.Request) -> web.StreamResponse:
    responses = request.app.get(RESPONSES)
    if responses is None:
        return await _ask_engines(request)
    owner, name = request[CALLER].name, request.match_info["response_id"]
    after = _parse_number(request.query.get("starting_after"))
    if not read_flag(request.query.get("stream", "false"), "stream"):
        return _json(await responses.find(owner, name))
    await responses.ensure_is_stream(owner, name)
    return await follow_events(request, responses.follow(owner, name, after))


async def handle_delete(request: web.Request) -> web.Response:
    name = request.match_info["response_id"]
    await find_responses(request.app).delete(request[CALLER].name, name)
    return _json(build_deleted(name))


async def handle_items(request: web.Request) -> web.Response:
    responses = find_responses(request.app)
    page = parse_page(request.query, _USUALLY_LISTED, _MOST_LISTED)
    name = request.match_info["response_id"]
    return _json(await responses.list_items(request[CALLER].name, name, page, request[CONTEXT]))


async def handle_cancel(request: web.Request) -> web.Response:
    responses = request.app.get(RESPONSES)
    if responses is None:
        return await _ask_engines(request)
    await read_body(request)  # nothing is said in it
    return _json(await responses.cancel(request[CALLER].name, request.match_info["response_id"]))


HANDLERS = (handle_retrieve, handle_delete, handle_items, handle_cancel)


async def _ask_engines(request: web.Request) -> web.Response:
    pool = request.app[POOL]
    if request.method == "POST":
        await read_body(request)  # nothing is said in it
    await pool.ensure_ready(request[CONTEXT].deadline)
    engines = [one for one in pool.engines if one.is_usable]
    if not engines:
        raise Unavailable(f"no engine is ready: {pool.describe()}", retry_after_s=1)
    missing = failed = None
    failure: GatewayError | None = None
    for engine in engines:
        try:
            status, body = await _find(request, engine)
        except GatewayError as error:  # another one may have it
            failure = error
            continue
        answer = web.Response(status=status, body=body, content_type="application/json")
        if status == 404:
            missing = answer
        elif status >= 500:
            failed = answer
        else:
            if status < 400 and request[CALLER].models:
                request[CALLER].check_model(_read_model(body))
            return answer
    if failure is not None:  # it may be the one that has it
        raise failure
    return cast("web.Response", failed or missing)


async def _find(request: web.Request, engine: Engine) -> tuple[int, bytes]:
    """What the engine answers; it is told to cancel nothing that is not of the key's models."""
    path = request.rel_url.raw_path
    if request.method == "POST" and request[CALLER].models:
        status, body = await _ask(request, engine, "GET", path.removesuffix("/cancel"))
        if status >= 400 or _read_model(body) not in request[CALLER].models:
            return status, body
    return await _ask(request, engine, request.method, path)


async def _ask(request: web.Request, engine: Engine, method: str, path: str) -> tuple[int, bytes]:
    call = EngineCall(
        request[CONTEXT],
        method,
        path,
        tries_left=1,
        body=b"" if method == "POST" else None,
        engine=engine,
        is_relayed=True,
    )
    async with request.app[POOL].attempt(call) as answer:
        body = answer.body
        if body is None:
            raise EngineError("the engine answered with a stream", code="engine_garbled")
    if answer.status >= 400:
        return answer.status, name_engine_error(answer.status, body, request.path)
    return answer.status, body


def _parse_number(text: str | None) -> int:
    """Of the last event that has been read."""
    if text is None:
        return -1
    if not text.isascii() or not text.isdigit() or len(text) > _DIGITS:
        raise InvalidRequest(
            "starting_after is the number of the last event that you have", param="starting_after"
        )
    return int(text)


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")


def _read_model(body: bytes) -> str | None:
    try:
        model = orjson.loads(body)["model"]
    except (orjson.JSONDecodeError, LookupError, TypeError):
        return None
    return model if isinstance(model, str) else None
