"""What surrounds every request: its id, who asks, its log line and metrics, and errors in the
envelope of the route: OpenAI's, or on /v1/messages Anthropic's.
"""

from __future__ import annotations

import asyncio
import math
import random
import re

import structlog
from aiohttp import web
from aiohttp.typedefs import Handler

from common.web.cors import CORS, CrossOrigin
from common.web.foreign_pages import PageGuard
from gateway.admission.accounts import ACCOUNTS
from gateway.admission.keys import CALLER, KEYRING
from gateway.admission.limits import CLAIM, Claim
from gateway.admission.served_models import SERVED_MODEL
from gateway.admission.tickets import open_claim
from gateway.config import SETTINGS
from gateway.engines.pool import POOL
from gateway.errors import (
    Forbidden,
    GatewayError,
    InvalidRequest,
    MethodNotAllowed,
    NotFound,
    PayloadTooLarge,
    Unavailable,
)
from gateway.observability.metrics import METRICS, STOPPING
from gateway.observability.request_record import RequestRecord
from gateway.observability.tracing import SPAN, TRACER
from gateway.records.ledger import LEDGER, Entry
from gateway.request_body import BODIES
from gateway.request_context import CONTEXT, RequestContext
from gateway.schemas.openai import build_error

log = structlog.get_logger("gateway")
_REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
# The page asks for a key itself, once a second: that is no request to count.
_PAGE_ROUTES = frozenset(("/ui", "/ui/", "/ui/status", "/ui/{file}"))
# Whoever asks for these, by whatever name, learns that somebody is there.
_HEALTH_ROUTES = frozenset(("/", "/health", "/healthz", "/readyz"))
_OPEN_ROUTES = _HEALTH_ROUTES | {"/metrics", "/openapi.json", "/docs", "other"} | _PAGE_ROUTES
# What callers have stored.
_PRIVATE_ROUTES = ("/v1/files", "/v1/batches", "/v1/responses/")
_RESTART_S = 5
_GONE = 499  # what log and counters say of a caller who hung up
QUIET_ROUTES = _HEALTH_ROUTES | {"/metrics"} | _PAGE_ROUTES


class _Stopping(Unavailable):
    """No failure: callers are told `not_ready`, the log and the figures STOPPING."""


class OpenRequests:
    """How many requests are being answered, but for those who only look: a drain waits for them."""

    __slots__ = ("count",)

    def __init__(self) -> None:
        self.count = 0


OPEN_REQUESTS = web.AppKey("open_requests", OpenRequests)
# None where there are keys: no page has one.
PAGE_GUARD: web.AppKey[PageGuard | None] = web.AppKey("page_guard")


@web.middleware
async def surround(request: web.Request, handler: Handler) -> web.StreamResponse:
    """One for everything: each more would cost every request a frame and a task of bookkeeping."""
    record = RequestRecord(_route(request))
    context = RequestContext(_request_id(request), record, span=request.get(SPAN))
    request[CONTEXT] = context
    status = _GONE
    open_requests = request.app[OPEN_REQUESTS]
    counts = record.route not in QUIET_ROUTES
    cors = request.app[CORS]
    if cors is not None:
        handler = _let_page_in(request, cors, handler)
    open_requests.count += counts
    try:
        try:
            if record.route not in _HEALTH_ROUTES:
                _refuse_foreign_page(request, record.route)
            if record.route not in _OPEN_ROUTES:
                await _admit(request, record)
            response = await handler(request)
        except asyncio.CancelledError:
            end = context.take_end()
            if end is None:
                raise
            response = _answer_exception(request, end)
        except Exception as error:  # noqa: BLE001 — the one place where exceptions become answers
            response = _answer_exception(request, error)
        status = response.status
        if not response.prepared:
            _end_head(request, context, response)
        return response
    finally:
        open_requests.count -= counts
        request.app[KEYRING].close_call()
        request.app[BODIES].release(context)
        if context.rates is not None:
            request.app[ACCOUNTS].close_claim(request[CLAIM])
        if context.entry is not None:
            _keep(request, context, context.entry, status)
        _finish(request.app, context, status)


@web.middleware
async def trace_spans(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Around `surround`, and only there when spans are wanted."""
    route = _route(request)
    if route in QUIET_ROUTES:
        return await handler(request)
    span = request.app[TRACER].open_request(request.method, route, request.headers)
    request[SPAN] = span
    status = _GONE
    try:
        response = await handler(request)
        status = response.status
        return response
    finally:
        context = request[CONTEXT]
        span.close(context.record, context.request_id, status)


def _end_head(request: web.Request, context: RequestContext, response: web.StreamResponse) -> None:
    """Of an answer that has not begun to leave."""
    context.put_headers(response.headers)
    if request.app[POOL].draining:
        response.force_close()  # the caller's next call should find a gateway that stays
    if context.entry is not None:
        body = response.body if isinstance(response, web.Response) else None
        if isinstance(body, bytes):
            context.entry.note_answer(body)


def _keep(request: web.Request, context: RequestContext, entry: Entry, status: int) -> None:
    ledger, served = request.app[LEDGER], request.get(SERVED_MODEL)
    if served is not None:
        entry.model = served.name
    if not entry.prompt_bytes:  # an upload, or a form
        entry.prompt_bytes = request.content.total_bytes
    if ledger is not None:
        ledger.close(entry, context.request_id, context.record, status)


def refuse(app: web.Application, error: GatewayError) -> web.Response:
    """The answer to what never became a request: in the same form, with the same line and count."""
    context = RequestContext(_make_request_id(), RequestRecord("other"))
    context.record.note_error(error.error_code, error.source)
    response = _build_refusal(error)
    context.put_headers(response.headers)
    _finish(app, context, response.status)
    return response


def _finish(app: web.Application, context: RequestContext, status: int) -> None:
    record = context.record
    duration_s = record.elapsed_s()
    app[METRICS].count_request(record, status, duration_s, context.exemplar)
    write = log.debug if record.route in QUIET_ROUTES else log.info
    write(
        "request_done",
        request_id=context.request_id,
        route=record.route,
        status=status,
        duration_s=round(duration_s, 4),
        **context.log_fields(),
    )


def _answer_exception(request: web.Request, error: Exception) -> web.Response:
    """Raises again where nobody is left to answer, or half an answer has left."""
    context = request[CONTEXT]
    is_streaming = context.record.stream is not None
    if isinstance(error, ConnectionError):
        raise error
    if isinstance(error, web.HTTPException):
        response = _answer_error(request, translate(request.app, request, error))
        if "Allow" in error.headers:
            response.headers["Allow"] = error.headers["Allow"]
        return response
    if not isinstance(error, GatewayError):
        log.error("request_crashed", request_id=context.request_id, exc_info=error)
        if is_streaming:
            context.record.note_error(GatewayError.code, GatewayError.source)
            raise error
        return _answer_error(request, GatewayError("the gateway failed; see its log"))
    if is_streaming:  # a second head in the middle of a stream would be garbage
        context.record.note_error(error.error_code, error.source)
        raise ConnectionResetError(error.message) from error
    return _answer_error(request, error)


def _let_page_in(request: web.Request, cors: CrossOrigin, handler: Handler) -> Handler:
    """Its browser is told so with every answer, and in advance where it asks with OPTIONS."""
    request[CONTEXT].cors_headers = cors.build_headers(request.headers.get("Origin"))
    return cors.answer_options if request.method == "OPTIONS" else handler


def _refuse_foreign_page(request: web.Request, route: str) -> None:
    guard = request.app[PAGE_GUARD]
    if guard is None:
        return
    is_private = route.startswith(_PRIVATE_ROUTES)
    refusal = guard.check(request.method, request.headers, is_private=is_private)
    if refusal is not None:
        raise Forbidden(refusal.message, code=refusal.code)


async def _admit(request: web.Request, record: RequestRecord) -> None:
    """Who calls, may they, and have they any allowance left."""
    if request.app[POOL].draining:
        raise _Stopping("the gateway is stopping", retry_after_s=_RESTART_S)
    caller = request.app[KEYRING].identify(request.headers)
    ledger = request.app[LEDGER]
    if ledger is not None:
        # Who only reads has no prompt; an answer of /audit would keep others' texts once more.
        share = caller.text_share if request.method == "POST" else 0.0
        request[CONTEXT].entry = ledger.open(caller.name, share)
    caller.check_route(record.route)
    request[CALLER] = caller
    request.app[KEYRING].open_call(caller, request[CONTEXT])
    claim: Claim | None = None
    if caller.has_limits:
        claim = open_claim(caller, may_reserve=request.method == "POST")
        request[CLAIM] = request[CONTEXT].rates = claim
    await request.app[ACCOUNTS].take_request(caller, claim)


def translate(
    app: web.Application, request: web.BaseRequest, error: web.HTTPException
) -> GatewayError:
    """aiohttp's own refusals as errors of ours."""
    if isinstance(error, web.HTTPRequestEntityTooLarge):
        limit = app[SETTINGS].max_body_bytes
        return PayloadTooLarge(f"the body is larger than {limit} bytes; send it in parts")
    if isinstance(error, web.HTTPNotFound):
        return NotFound(f"there is no {request.path}")
    if isinstance(error, web.HTTPMethodNotAllowed):
        allowed = ", ".join(sorted(error.allowed_methods))
        return MethodNotAllowed(f"{request.path} takes {allowed}, not {request.method}")
    return InvalidRequest(error.text or error.reason, code="bad_request")


def _request_id(request: web.Request) -> str:
    given = request.headers.get("X-Request-Id", "")
    return given if _REQUEST_ID.fullmatch(given) else _make_request_id()


def _make_request_id() -> str:
    return f"{random.getrandbits(128):032x}"


def _route(request: web.Request) -> str:
    """The route's pattern, not the path: callers must not be able to invent label values."""
    resource = request.match_info.route.resource
    return resource.canonical if resource is not None else "other"


def _answer_error(request: web.Request, error: GatewayError) -> web.Response:
    code = STOPPING if isinstance(error, _Stopping) else error.error_code
    request[CONTEXT].record.note_error(code, error.source)
    return _build_refusal(error, request.path)


def _build_refusal(error: GatewayError, path: str = "") -> web.Response:
    headers = {}
    if error.retry_after_s is not None:
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if error.is_not_for_retry:
        headers["x-should-retry"] = "false"  # else OpenAI's clients do
    return web.Response(
        body=build_error(error, path),
        status=error.status,
        headers=headers,
        content_type="application/json",
    )
