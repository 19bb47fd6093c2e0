"""/v1/* and the tokenizer routes: an engine's bytes and streams, passed on as they come.

A list of paths, not a prefix: nothing administrative of the engine can be reached. Awaiting each
write is the back-pressure: no queue, no task. A caller who hangs up cancels the engine's work.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping

import aiohttp
from aiohttp import web

from gateway.admission.keys import CALLER, KEYRING
from gateway.admission.queue import GATE, LaneName, build_visit, within
from gateway.config import SETTINGS
from gateway.engines.engine import Engine
from gateway.engines.pool import POOL
from gateway.engines.timeouts import Silence
from gateway.engines.upstream import Answer
from gateway.errors import (
    DeadlinePassed,
    EngineError,
    EngineTimeout,
    EngineUnreachable,
    GatewayError,
)
from gateway.observability.metrics import METRICS
from gateway.observability.trace import TRACE, Trace
from gateway.request_body import read_body
from gateway.schemas.wire import (
    RelayCall,
    build_models,
    build_stream_error,
    drop_usage_events,
    name_engine_error,
    name_stream_errors,
    parse_relay_call,
    parse_usage,
)

STREAMING = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
GENERATING = (*STREAMING, "/v1/embeddings")
ROUTES = (
    ("GET", "/v1/models"),
    ("GET", "/v1/models/{model:.+}"),
    *(("POST", path) for path in GENERATING),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
)
# Lists of what passes, not of what does not: who the caller is, who goes first and how the
# connection is kept are the gateway's business, and the engine needs nothing else.
_SENT = ("Accept", "X-Session-Id", "anthropic-version", "traceparent", "tracestate")
_EVENT_ENDS = (b"\n\n", b"\r\n\r\n")
_PASSED_ON = ("Content-Type", "Cache-Control", "Retry-After")
_RETRY_AFTER_S = "1"
_REFUSED = "engine_refused"
_BYTES_A_TOKEN = 4


async def handle_relay(request: web.Request) -> web.StreamResponse:
    """Read, check, enter the gate, pass on."""
    if request.method == "GET":
        # Nothing is generated, so it may be asked again like a greedy call.
        return await _pass_on(request, RelayCall(b"", is_greedy=True))
    path = request.path
    call = parse_relay_call(path, await read_body(request), request.app[SETTINGS])
    caller = request[CALLER]
    if caller.models:
        caller.check_model(call.model)
    trace, gate = request[TRACE], request.app[GATE]
    lane: LaneName = "batch" if call.sequences > 1 else "interactive"
    visit = build_visit(request.headers, caller, call.sequences, lane)
    trace.deadline = visit.loop_deadline()
    if path not in GENERATING:
        with gate.enter_beside(visit):
            return await _pass_on(request, call)
    trace.note_queued()
    async with gate.enter(visit):
        trace.note_entered()
        return await _pass_on(request, call)


async def _pass_on(request: web.Request, call: RelayCall) -> web.StreamResponse:
    """Tries engines until one has answered; only what provably did not run, or is greedy and
    unanswered, is sent again.
    """
    pool, settings = request.app[POOL], request.app[SETTINGS]
    affinity = call.affinity
    if settings.routing == "session":
        affinity = request.headers.get("X-Session-Id") or affinity
    trace = request[TRACE]
    trace.carried = {name: request.headers[name] for name in _SENT if name in request.headers}
    avoid: Engine | None = None
    for attempt in range(settings.max_attempts):
        # Later, "not before the deadline" would hide what became of the first try.
        early = trace.deadline if attempt == 0 else None
        acquiring = pool.acquire(affinity, avoid, deadline=early)
        engine = await (acquiring if trace.deadline is None else within(trace.deadline, acquiring))
        headers, span = trace.open_call(engine.url, call.sequences)
        headers["Content-Type"] = "application/json"
        code: str | None = "cancelled"
        try:
            response = await _exchange(
                request, call, engine, headers, is_last=attempt + 1 == settings.max_attempts
            )
        except _TryAgain as again:
            avoid, reason, code = engine, again.reason, again.reason.error_code
            request.app[METRICS].retried_calls.labels(code).inc()
        except GatewayError as error:
            code = error.error_code
            raise
        else:
            code = trace.error_code
            return response
        finally:
            if span is not None:
                span.close(code)
    raise reason


class _TryAgain(Exception):
    """Nothing has been sent to the caller, and asking another engine is safe."""

    def __init__(self, reason: GatewayError) -> None:
        super().__init__()
        self.reason = reason


async def _exchange(
    request: web.Request,
    call: RelayCall,
    engine: Engine,
    headers: Mapping[str, str],
    *,
    is_last: bool,
) -> web.StreamResponse:
    trace = request[TRACE]
    asked = time.perf_counter()
    engine.running += call.sequences
    try:
        # One model is picked from the list here: vLLM has no route for it.
        path = "/v1/models" if request.method == "GET" else request.rel_url.raw_path_qs
        asking = engine.ask(request.method, path, headers, call.body or None)
        try:
            upstream, body = await (
                asking if trace.deadline is None else within(trace.deadline, asking)
            )
        except (asyncio.CancelledError, DeadlinePassed):
            _charge(request, call)
            raise
        trace.engine_s = time.perf_counter() - asked
        if body is None:
            with upstream:
                return await _stream(request, call, engine, upstream)
        if upstream.status in {429, 503} and len(request.app[POOL].engines) > 1 and not is_last:
            engine.note_busy()
            raise _TryAgain(EngineError("the engine is busy", code="engine_busy"))
        return _whole(request, upstream, body)
    except GatewayError as error:
        if not is_last and (isinstance(error, EngineUnreachable) or _is_repeatable(error, call)):
            raise _TryAgain(error) from None
        raise
    finally:
        engine.running -= call.sequences


def _is_repeatable(error: GatewayError, call: RelayCall) -> bool:
    is_failure = isinstance(error, EngineError) and not isinstance(error, EngineTimeout)
    return is_failure and call.is_greedy


def _whole(request: web.Request, upstream: Answer, body: bytes) -> web.Response:
    headers = _headers(upstream)
    if upstream.status == 200:
        if request.method == "GET":
            aliases = request.app[SETTINGS].alias_map
            body = build_models(body, aliases, request.match_info.get("model"))
        _count(request, parse_usage(body))
    elif upstream.status >= 400:
        body = name_engine_error(upstream.status, body)
        headers["Content-Type"] = "application/json"
        if upstream.status in {429, 503}:
            headers.setdefault("Retry-After", _RETRY_AFTER_S)  # vLLM does not say
    return web.Response(status=upstream.status, headers=headers, body=body)


def _headers(upstream: Answer) -> dict[str, str]:
    return {name: upstream.headers[name] for name in _PASSED_ON if name in upstream.headers}


async def _stream(
    request: web.Request, call: RelayCall, engine: Engine, upstream: Answer
) -> web.StreamResponse:
    """Once its first byte has left, a stream ends as one: a failure is its last event."""
    trace = request[TRACE]
    response = web.StreamResponse(status=upstream.status, headers=_headers(upstream))
    response.headers.setdefault("Cache-Control", "no-cache")
    response.headers["X-Accel-Buffering"] = "no"  # nginx would hold a stream back
    trace.put_headers(response.headers)
    await response.prepare(request)
    trace.is_streaming = True
    is_whole = is_engines_fault = False
    with Silence(request, upstream.content, response) as silence:
        try:
            copying = _copy(trace, call, upstream, response, silence)
            await (copying if trace.deadline is None else within(trace.deadline, copying))
            is_whole = True
            if trace.error_code is None:  # else told in the stream, after a status of 200
                engine.note_success()
            elif trace.error_code == EngineError.code:
                engine.note_failure()
        except GatewayError as error:
            is_engines_fault = isinstance(error, EngineError)
            await _end_with_error(request, response, error)
        except aiohttp.ClientError as error:
            if silence.is_writing:
                # aiohttp's own for a caller who has gone is a ClientError too.
                raise ConnectionResetError("the caller has gone") from None
            is_engines_fault = True
            engine.note_failure()
            await _end_with_error(request, response, engine.translate(error))
        finally:
            if is_whole or is_engines_fault:
                _count(request, trace.usage)
            else:
                _charge(request, call)
    await response.write_eof()
    return response


async def _end_with_error(
    request: web.Request, response: web.StreamResponse, error: GatewayError
) -> None:
    request[TRACE].note_error(error.error_code, error.source)
    event = build_stream_error(error, request.path, request[TRACE].chunks)
    await response.write(event)


async def _copy(
    trace: Trace,
    call: RelayCall,
    upstream: Answer,
    response: web.StreamResponse,
    silence: Silence,
) -> None:
    """The path of every chunk, so each line here is felt."""
    read, write = upstream.content.readany, response.write
    rest = b""  # of an event whose end has not come yet
    while chunk := await read():
        trace.note_chunk()
        if rest or not chunk.endswith(_EVENT_ENDS):
            chunk, rest = _split(rest + chunk)
            silence.is_inside_event = bool(rest)
        if b'"usage":{' in chunk:
            trace.usage = _add(trace.usage, parse_usage(chunk))
            if call.hides_usage:
                chunk = drop_usage_events(chunk)
        if b'data: {"error"' in chunk:
            chunk, is_fault = name_stream_errors(chunk)
            own = (EngineError.code, EngineError.source)
            trace.note_error(*(own if is_fault else (_REFUSED, "caller")))
        if chunk:
            silence.is_writing = True
            await write(chunk)
            silence.is_writing = False
    if rest:
        silence.is_writing = True
        await write(rest)
        silence.is_writing = False


def _split(data: bytes) -> tuple[bytes, bytes]:
    """Whole events, and the beginning of the next."""
    end = max(data.rfind(mark) + len(mark) if mark in data else 0 for mark in _EVENT_ENDS)
    return data[:end], data[end:]


def _add(known: tuple[int, int] | None, told: tuple[int, int] | None) -> tuple[int, int] | None:
    """Anthropic's streams tell the input at their start and the output at their end."""
    if known is None or told is None:
        return told or known
    return max(known[0], told[0]), max(known[1], told[1])


def _charge(request: web.Request, call: RelayCall) -> None:
    """For what was left in the middle the engine tells no figures, or only the first: at least a
    token for each chunk, and for the prompt one for four bytes. Else hanging up would be free.
    """
    if request.path not in GENERATING:
        return
    trace = request[TRACE]
    taken, given = trace.usage or (0, 0)
    taken, given = taken or len(call.body) // _BYTES_A_TOKEN, max(given, trace.chunks)
    request.app[KEYRING].charge_tokens(request[CALLER], taken, given)


def _count(request: web.Request, usage: tuple[int, int] | None) -> None:
    if usage is None:
        return
    trace = request[TRACE]
    trace.prompt_tokens, trace.completion_tokens = usage
    request.app[KEYRING].count_tokens(request[CALLER], *usage)
