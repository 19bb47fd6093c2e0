"""/v1/* and the tokenizer routes: an engine's bytes and streams, passed on as they come.

A list of paths, not a prefix: nothing administrative of the engine can be reached. Awaiting each
write is the back-pressure, and a caller who hangs up cancels the engine's work with it.
"""

from __future__ import annotations

import time
from collections.abc import Mapping

from aiohttp import web
from multidict import CIMultiDict

from gateway.admission import GATE
from gateway.pool import POOL
from gateway.trace import TRACE

ROUTES = (
    ("GET", "/v1/models"),
    ("POST", "/v1/completions"),
    ("POST", "/v1/chat/completions"),
    ("POST", "/v1/responses"),
    ("POST", "/v1/messages"),
    ("POST", "/v1/embeddings"),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
)
# Of a connection, not of a message; or written anew by the gateway.
_NOT_PASSED_ON = frozenset(
    (
        "connection",
        "content-length",
        "date",
        "host",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "server",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
        "x-request-id",
    )
)
# Reading the body here undoes its encoding; what the caller is allowed is the gateway's business.
_NOT_SENT = _NOT_PASSED_ON | {"authorization", "cookie", "content-encoding", "expect"}


async def handle_relay(request: web.Request) -> web.StreamResponse:
    trace = request[TRACE]
    body = await request.read() if request.can_read_body else None
    engine = request.app[POOL].choose()
    headers = _without(request.headers, _NOT_SENT)
    headers["X-Request-Id"] = trace.request_id
    queued = time.perf_counter()
    async with request.app[GATE].enter(1):
        entered = time.perf_counter()
        trace.queue_s = entered - queued
        path = request.rel_url.raw_path_qs
        async with engine.open(request.method, path, headers=headers, body=body) as upstream:
            trace.engine_s = time.perf_counter() - entered
            response = web.StreamResponse(
                status=upstream.status, headers=_without(upstream.headers, _NOT_PASSED_ON)
            )
            if upstream.content_length is not None:
                response.content_length = upstream.content_length
            await response.prepare(request)
            async for chunk in upstream.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response


def _without(headers: Mapping[str, str], names: frozenset[str]) -> CIMultiDict[str]:
    return CIMultiDict(
        (name, value) for name, value in headers.items() if name.lower() not in names
    )
