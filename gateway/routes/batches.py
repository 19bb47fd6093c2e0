"""/v1/batches: many requests at once, answered within a time, as OpenAI's SDK asks for them."""

from __future__ import annotations

import orjson
from aiohttp import web

from gateway.admission.keys import CALLER
from gateway.batches.access import find_batches
from gateway.batches.shapes import build_batch, parse_batch_request
from gateway.request_body import read_body
from gateway.schemas.pages import build_page, parse_page

ROUTES = (
    ("GET", "/v1/batches"),
    ("POST", "/v1/batches"),
    ("GET", "/v1/batches/{batch_id}"),
    ("POST", "/v1/batches/{batch_id}/cancel"),
)
_USUALLY_LISTED, _MOST_LISTED = 20, 100


async def handle_list(request: web.Request) -> web.Response:
    service = find_batches(request.app)
    page = parse_page(request.query, _USUALLY_LISTED, _MOST_LISTED)
    jobs, has_more = await service.store.list_jobs(
        request[CALLER].name, after=page.after, limit=page.limit
    )
    return _json(build_page([build_batch(one) for one in jobs], has_more=has_more))


async def handle_create(request: web.Request) -> web.Response:
    service = find_batches(request.app)
    asked = parse_batch_request(await read_body(request))
    return _json(orjson.dumps(build_batch(await service.create(request[CALLER], asked))))


async def handle_retrieve(request: web.Request) -> web.Response:
    service = find_batches(request.app)
    job = await service.store.find_job(request[CALLER].name, request.match_info["batch_id"])
    return _json(orjson.dumps(build_batch(job)))


async def handle_cancel(request: web.Request) -> web.Response:
    service = find_batches(request.app)
    job = await service.cancel(request[CALLER], request.match_info["batch_id"])
    return _json(orjson.dumps(build_batch(job)))


def _json(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")


HANDLERS = (handle_list, handle_create, handle_retrieve, handle_cancel)
