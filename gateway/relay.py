"""/v1/* and the tokenizer routes: an engine's bytes and streams, passed on as they come.

A list of paths, not a prefix: nothing administrative of the engine can be reached. Awaiting each
write is the back-pressure: no queue, no task. A caller who hangs up cancels the engine's work.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Mapping

import aiohttp
from aiohttp import web

from gateway.admission import GATE, LaneName, build_visit, within
from gateway.body import read_body
from gateway.config import SETTINGS
from gateway.engine import Engine
from gateway.errors import EngineError, EngineTimeout, EngineUnreachable, GatewayError
from gateway.keys import CALLER, KEYRING
from gateway.metrics import METRICS
from gateway.pool import POOL
from gateway.trace import TRACE
from gateway.wire import (
    RelayCall,
    add_aliases,
    build_stream_error,
    drop_usage_events,
    parse_relay_call,
    parse_usage,
)

GENERATING = (
    "/v1/completions",
    "/v1/chat/completions",
    "/v1/responses",
    "/v1/messages",
    "/v1/embeddings",
)
ROUTES = (
    ("GET", "/v1/models"),
    *(("POST", path) for path in GENERATING),
    ("POST", "/tokenize"),
    ("POST", "/detokenize"),
)
# Lists of what passes, not of what does not: who the caller is, who goes first and how the
# connection is kept are the gateway's business, and the engine needs nothing else.
_SENT = ("Accept", "X-Session-Id", "anthropic-version", "traceparent", "tracestate")
_PASSED_ON = ("Content-Type", "Cache-Control", "Retry-After")


async def handle_relay(request: web.Request) -> web.StreamResponse:
    """Read, check, enter the gate, pass on."""
    if request.method == "GET":
        return await _pass_on(request, RelayCall(b""))
    path = request.path
    call = parse_relay_call(path, await read_body(request), request.app[SETTINGS])
    caller = request[CALLER]
    if call.model is not None:
        caller.check_model(call.model)
    if path not in GENERATING:
        return await _pass_on(request, call)
    trace = request[TRACE]
    lane: LaneName = "batch" if call.sequences > 1 else "interactive"
    visit = build_visit(request.headers, caller, call.sequences, lane)
    trace.note_queued()
    async with request.app[GATE].enter(visit):
        trace.note_entered()
        trace.deadline = visit.loop_deadline()
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
        engine = await pool.acquire(affinity, avoid)
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
        path = request.rel_url.raw_path_qs
        upstream = await within(
            trace.deadline, engine.open(request.method, path, headers, call.body or None)
        )
        try:
            trace.engine_s = time.perf_counter() - asked
            if upstream.headers.get("Content-Type", "").startswith("text/event-stream"):
                return await _stream(request, call, engine, upstream)
            if upstream.status in {429, 503} and len(request.app[POOL].engines) > 1 and not is_last:
                engine.note_busy()
                raise _TryAgain(EngineError("the engine is busy", code="engine_busy"))
            return await _whole(request, engine, upstream, asked)
        finally:
            upstream.release() if upstream.content.at_eof() else upstream.close()
    except GatewayError as error:
        if not is_last and (isinstance(error, EngineUnreachable) or _is_repeatable(error, call)):
            raise _TryAgain(error) from None
        raise
    finally:
        engine.running -= call.sequences


def _is_repeatable(error: GatewayError, call: RelayCall) -> bool:
    is_failure = isinstance(error, EngineError) and not isinstance(error, EngineTimeout)
    return is_failure and call.is_greedy


async def _whole(
    request: web.Request, engine: Engine, upstream: aiohttp.ClientResponse, asked: float
) -> web.Response:
    try:
        body = await within(request[TRACE].deadline, upstream.read())
    except (aiohttp.ClientError, TimeoutError) as error:
        engine.note_failure()
        raise engine.translate(error) from error
    request[TRACE].engine_s = time.perf_counter() - asked
    settings = request.app[SETTINGS]
    if upstream.status == 200:
        if request.path == "/v1/models" and settings.alias_map:
            body = add_aliases(body, settings.alias_map)
        _count(request, parse_usage(body))
    return web.Response(status=upstream.status, headers=_headers(upstream), body=body)


def _headers(upstream: aiohttp.ClientResponse) -> dict[str, str]:
    return {name: upstream.headers[name] for name in _PASSED_ON if name in upstream.headers}


async def _stream(
    request: web.Request, call: RelayCall, engine: Engine, upstream: aiohttp.ClientResponse
) -> web.StreamResponse:
    """Once its first byte has left, a stream ends as one: a failure is its last event."""
    response = web.StreamResponse(status=upstream.status, headers=_headers(upstream))
    response.headers.setdefault("Cache-Control", "no-cache")
    response.headers["X-Accel-Buffering"] = "no"  # nginx would hold a stream back
    request[TRACE].put_headers(response.headers)
    await response.prepare(request)
    request[TRACE].is_streaming = True
    try:
        await within(request[TRACE].deadline, _copy(request, call, engine, upstream, response))
    except GatewayError as error:
        await _end_with_error(request, response, error)
    await response.write_eof()
    return response


async def _end_with_error(
    request: web.Request, response: web.StreamResponse, error: GatewayError
) -> None:
    request[TRACE].note_error(error.error_code, error.source)
    timeout_s = request.app[SETTINGS].client_write_timeout_s
    await _write(response, build_stream_error(error, request.path), timeout_s)


async def _copy(
    request: web.Request,
    call: RelayCall,
    engine: Engine,
    upstream: aiohttp.ClientResponse,
    response: web.StreamResponse,
) -> None:
    timeout_s = request.app[SETTINGS].client_write_timeout_s
    usage: tuple[int, int] | None = None
    rest = b""  # of an event whose end has not come yet
    async for chunk in _chunks(request, engine, upstream):
        if not chunk:
            if not rest:  # never in the middle of an event
                await _write(response, b": keep-alive\n\n", timeout_s)
            continue
        events = chunk
        if rest or not chunk.endswith(b"\n\n"):
            events, rest = _split(rest + chunk)
        if b'"usage":{' in events:
            usage = _add(usage, parse_usage(events))
            if call.hides_usage:
                events = drop_usage_events(events)
        if events:
            await _write(response, events, timeout_s)
    if rest:
        await _write(response, rest, timeout_s)
    _count(request, usage)


async def _chunks(
    request: web.Request, engine: Engine, upstream: aiohttp.ClientResponse
) -> AsyncIterator[bytes]:
    """What comes, as it comes; an empty one for each while of silence."""
    settings, trace = request.app[SETTINGS], request[TRACE]
    first_chunk = request.app[METRICS].first_chunk_seconds.labels(trace.route)
    silent_s = 0.0
    while True:
        try:
            async with asyncio.timeout(settings.keepalive_comment_s):
                chunk = await upstream.content.readany()
        except TimeoutError:
            silent_s += settings.keepalive_comment_s
            if silent_s >= settings.stream_idle_timeout_s:
                raise EngineTimeout("the engine's stream fell silent") from None
            yield b""
            continue
        except aiohttp.ClientError as error:
            engine.note_failure()
            raise engine.translate(error) from error
        if not chunk:
            return
        trace.note_chunk()
        if trace.chunks == 1:
            first_chunk.observe(trace.elapsed_s(), trace.exemplar)
        silent_s = 0.0
        yield chunk


async def _write(response: web.StreamResponse, data: bytes, timeout_s: float) -> None:
    """Awaiting is the back-pressure; one who takes nothing at all is given up."""
    try:
        async with asyncio.timeout(timeout_s):
            await response.write(data)
    except TimeoutError:
        raise ConnectionResetError("the caller takes no data") from None
    except ConnectionError:
        # aiohttp's own is a ClientError too, and must not pass for a failure of the engine.
        raise ConnectionResetError("the caller has gone") from None


def _split(data: bytes) -> tuple[bytes, bytes]:
    """Whole events, and the beginning of the next."""
    end = data.rfind(b"\n\n") + 2
    return (data[:end], data[end:]) if end > 1 else (b"", data)


def _add(known: tuple[int, int] | None, told: tuple[int, int] | None) -> tuple[int, int] | None:
    """Anthropic's streams tell the input at their start and the output at their end."""
    if known is None or told is None:
        return told or known
    return max(known[0], told[0]), max(known[1], told[1])


def _count(request: web.Request, usage: tuple[int, int] | None) -> None:
    if usage is None:
        return
    trace = request[TRACE]
    trace.prompt_tokens, trace.completion_tokens = usage
    request.app[KEYRING].count_tokens(request[CALLER], *usage)
