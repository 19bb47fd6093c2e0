"""Connections: aiohttp's server, and what no setting of it can say.

What never became a request (no HTTP, a bad length, an odd `Expect`) is answered in OpenAI's
envelope and leaves one line in the log like every other refusal; aiohttp's own answer would be
text, and a traceback in the log.

What every request passes is shorter here than in aiohttp: a path without variables is looked up
once (`Server.handle`), and an answer that is there as a whole is written in one go
(`Connection.finish_response`). What that saves: docs/benchmarks.md.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import sys
import termios
import time
from collections.abc import Awaitable, Mapping
from functools import partial
from typing import Any, cast

import aiohttp
import structlog
from aiohttp import hdrs, web
from aiohttp.abc import AbstractStreamWriter
from aiohttp.helpers import rfc822_formatted_time
from aiohttp.http import HttpVersion11, RawRequestMessage
from aiohttp.http_exceptions import ContentEncodingError, HttpProcessingError
from aiohttp.http_writer import _serialize_headers
from aiohttp.typedefs import Handler
from aiohttp.web_urldispatcher import PlainResource, UrlMappingMatchInfo

from gateway.config import SETTINGS, Settings
from gateway.engines.pool import POOL
from gateway.errors import GatewayError, InvalidRequest
from gateway.middleware import OPEN_REQUESTS, refuse, translate
from gateway.observability.metrics import Metrics
from gateway.request_context import CONTEXT

_UNSENT_BYTES = 2**17
_LONGEST_FIELD_BYTES = 2**15  # a sign-on service sets many cookies, and they travel as one field
_POLL_S = 0.02  # how often a drain looks whether all have left
_LAST_ANSWERS_S = 1.0  # for what a drain has waited for in vain
_WITHOUT_BODY = frozenset((204, 304))
_REFUSAL_BURST_S = _LONGEST_TURN_S = 1.0
_BYTES_A_TURN, _MOST_WAITING = 2**16, 512
# What follows a refusal on its connection: how long it is thrown away, in which steps, how fast at
# first; each second is twice as fast as the one before.
_UNREAD_S, _UNREAD_STEP_BYTES, _UNREAD_BYTES_A_S = 10.0, 2**18, 2**23
_SHORTEST_PAUSE_S, _LONGEST_PAUSE_S = 0.001, 0.5
_CLOSED, _HALF_CLOSED = 7, 8  # the kernel's states TCP_CLOSE and TCP_CLOSE_WAIT
log = structlog.get_logger("gateway")


class Request(web.Request):
    """Quicker where each request asks often. aiohttp finds the app by way of the route, and raises
    and catches a KeyError for what `get` does not find.
    """

    __slots__ = ("app",)
    ATTRS = web.Request.ATTRS | {"app"}

    app: web.Application

    def get(self, key: Any, default: Any = None) -> Any:
        return self._state.get(key, default)


class RefusalPace:
    """Whoever is refused asks again at once, and thousands of refusals a second are all the time
    there is. Those above the rate wait their turn; good requests never do.
    """

    __slots__ = ("_interval_s", "_next_s", "_waiting")

    def __init__(self, per_s: int, metrics: Metrics) -> None:
        self._interval_s = 1 / per_s if per_s else 0.0
        self._next_s = [0.0, 0.0]  # after little that was read, and after much
        self._waiting = 0
        metrics.waiting_refusals.read = lambda: [((), self._waiting)]

    async def wait_turn(self, read_bytes: int) -> None:
        """Not at all after a second with fewer than the rate. What was read before it was refused
        took its time as well, which those who sent little do not wait for.
        """
        now = time.monotonic()
        kind, turns = read_bytes > _BYTES_A_TURN, 1 + read_bytes / _BYTES_A_TURN
        turn_s = max(self._next_s[kind], now - _REFUSAL_BURST_S) + turns * self._interval_s
        turn_s = self._next_s[kind] = min(turn_s, now + _LONGEST_TURN_S)
        if turn_s <= now or self._waiting >= _MOST_WAITING:
            return
        self._waiting += 1
        try:
            await asyncio.sleep(turn_s - now)
        finally:
            self._waiting -= 1


REFUSAL_PACE = web.AppKey("refusal_pace", RefusalPace)


class Connection(web.RequestHandler):
    """One caller's connection."""

    __slots__ = ("_has_paused",)

    @property
    def _app(self) -> web.Application:
        return cast("Server", self._manager).app

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._has_paused = False
        super().connection_made(transport)
        # Left to itself, the kernel would take megabytes for a caller who reads slowly.
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        # And it would keep a connection for ever whose caller takes nothing, or is cut off.
        limit_s = self._app[SETTINGS].client_write_timeout_s
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(limit_s * 1000))

    def pause_reading(self) -> None:
        self._has_paused = True
        super().pause_reading()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """aiohttp has parser and transport go on after each chunk that is read. They need that only
        on a connection that was ever paused, since the parser does not tell whether it still is, or
        that has sent its next requests already: of too many the parser keeps the rest to itself.
        """
        if self._has_paused or self._messages:
            super().resume_reading(resume_parser)

    def handle_error(
        self,
        request: web.BaseRequest,
        status: int = 500,
        exc: BaseException | None = None,
        message: str | None = None,
    ) -> web.StreamResponse:
        """For what could not be parsed, and for what the middleware let through."""
        if isinstance(exc, ConnectionError) or request.writer.output_size > 0:
            # Nobody is left to answer, or half an answer has left. A plain close would first wait
            # until a caller who takes nothing has taken what is in the buffers.
            if self.transport is not None:
                self.transport.abort()
            raise ConnectionResetError("the answer cannot be finished") from exc
        error = _explain(status, exc, message)
        response = refuse(self._app, error)
        response.force_close()
        return response

    async def shutdown(self, timeout: float | None = None) -> None:
        """aiohttp closes once its buffer is nearly empty. What is still in it would go with the
        process, and what the kernel holds would go with a container's network.
        """
        deadline = time.monotonic() + (timeout or 0)
        while self._request_in_progress or self._has_unsent():
            if time.monotonic() >= deadline:
                break
            await asyncio.sleep(_POLL_S)
        await super().shutdown(_LAST_ANSWERS_S)

    def _has_unsent(self) -> bool:
        """Whether the caller's side has not yet taken all that was written."""
        transport = self.transport
        if transport is None:
            return False
        connection = transport.get_extra_info("socket")
        try:
            if _read_state(connection) == _CLOSED:
                return False
            in_kernel = fcntl.ioctl(connection.fileno(), termios.TIOCOUTQ, bytes(4))
        except OSError:  # closed this moment
            return False
        return bool(transport.get_write_buffer_size() or any(in_kernel))

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """aiohttp refuses an odd `Expect` before any middleware is asked."""
        app = cast(Request, request).app  # not the connection's: it may be lost by now
        if isinstance(resp, web.HTTPException):
            resp = refuse(app, translate(app, request, resp))
        if request.content.exception() is not None:
            resp.force_close()  # where the next request would begin, nobody knows
        is_refused = 400 <= resp.status < 500 and resp.status != 429 and not resp.prepared
        if is_refused and request.content.is_eof():  # the others' next request is far off anyway
            context = request.get(CONTEXT)
            await app[REFUSAL_PACE].wait_turn(context.read_bytes if context else 0)
        body = resp.body if type(resp) is web.Response and not self._upgraded else None
        is_usual = request.version == HttpVersion11 and request.method != hdrs.METH_HEAD
        if isinstance(body, bytes) and is_usual and resp.status not in _WITHOUT_BODY:
            is_gone = await self._send_whole(request, resp, body)
        else:
            resp, is_gone = await super().finish_response(request, resp, start_time)
        if not (is_gone or request.content.is_eof()):
            await self._throw_away(request)
        while app[POOL].draining and self._has_unsent():  # noqa: ASYNC110 — once in its life
            await asyncio.sleep(_POLL_S)
        return resp, is_gone

    async def _send_whole(
        self, request: web.BaseRequest, response: web.StreamResponse, body: bytes
    ) -> bool:
        """As aiohttp would, to the byte; True where nobody is left to take it."""
        headers = response.headers
        headers[hdrs.CONTENT_LENGTH] = str(len(body))
        if body:
            headers.setdefault(hdrs.CONTENT_TYPE, "application/octet-stream")
        headers[hdrs.DATE] = rfc822_formatted_time()
        if response.keep_alive is None:
            response._keep_alive = request.keep_alive  # noqa: SLF001 — where aiohttp looks
        if not response.keep_alive:
            headers[hdrs.CONNECTION] = "close"
        status_line = f"HTTP/1.1 {response.status} {response.reason}"
        head = _serialize_headers(status_line, headers)
        if self.transport is None or self.transport.is_closing():
            return True
        self.transport.writelines((head, body))
        if self._paused:
            try:
                await self._drain_helper()
            except ConnectionError:
                return True
        return False

    async def _throw_away(self, request: web.BaseRequest) -> None:
        """The rest of a body whose answer has been sent: many callers read it only when they have
        sent all. aiohttp would take what comes as fast as it comes, megabytes a refusal, of callers
        who have left by then. Slowly, and with looks at the connection, it costs next to nothing.
        """
        content, began = request.content, time.monotonic()
        size = request.content_length
        rest = _UNREAD_STEP_BYTES if size is None else size - content.total_bytes
        pause_s = max(min(rest, _UNREAD_STEP_BYTES) / _UNREAD_BYTES_A_S, _SHORTEST_PAUSE_S)
        try:
            while not (content.is_eof() or self._close or self._force_close):
                await asyncio.sleep(pause_s)
                age_s = time.monotonic() - began
                if age_s > _UNREAD_S or self._is_left(request):
                    self.force_close()
                elif data := content.read_nowait():
                    # Ever faster: whoever is still there sends all of it before they read.
                    pause_s = len(data) / (_UNREAD_BYTES_A_S * 2**age_s)
                else:
                    pause_s = min(2 * pause_s, _LONGEST_PAUSE_S)
        except (HttpProcessingError, web.RequestPayloadError):
            self.force_close()

    def _is_left(self, request: web.BaseRequest) -> bool:
        """Whether the caller has closed before the end of the body; one who has sent all of it and
        closed their half still waits for the answer.
        """
        if self.transport is None:
            return True
        connection = self.transport.get_extra_info("socket")
        state = _read_state(connection)
        if state != _HALF_CLOSED:
            return bool(state == _CLOSED)
        waiting = fcntl.ioctl(connection.fileno(), termios.FIONREAD, bytes(4))
        here = request.content.total_bytes + int.from_bytes(waiting, sys.byteorder)
        return here < (request.content_length or 0)

    def log_exception(self, *args: Any, **details: Any) -> None:
        """aiohttp stumbles a second time over a body that has been answered with a 400."""
        if not isinstance(details.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **details)


def _read_state(connection: socket.socket) -> int:
    return connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1)[0]


def _explain(status: int, error: BaseException | None, message: str | None) -> GatewayError:
    """What a caller can do about it."""
    if isinstance(error, ContentEncodingError):
        return InvalidRequest(
            "send the body as it is, or with Content-Encoding gzip or deflate", code="bad_encoding"
        )
    if status == 400:
        reason = (message or "unreadable").partition("\n")[0].rstrip(":")
        return InvalidRequest(f"this is not HTTP: {reason}", code="bad_http")
    if isinstance(error, UnicodeEncodeError):
        # aiohttp's own refusal of an odd `Expect` quotes it, and trips over what is no text.
        return InvalidRequest("a header holds bytes that are no text", code="bad_http")
    log.error("connection_crashed", exc_info=error)
    return GatewayError("the gateway failed; see its log")


class Server(web.Server):
    """Makes a connection for each caller who connects, and knows where their requests go."""

    def __init__(self, app: web.Application, **options: Any) -> None:
        super().__init__(self.handle, request_factory=self._build_request, **options)  # type: ignore[arg-type]
        self.app = app
        self._known = list_plain_routes(app)

    def __call__(self) -> Connection:
        return Connection(self, loop=self._loop, **self._kwargs)

    def _build_request(
        self,
        message: RawRequestMessage,
        payload: aiohttp.StreamReader,
        protocol: web.RequestHandler,
        writer: AbstractStreamWriter,
        task: asyncio.Task[None],
    ) -> Request:
        size = self.app[SETTINGS].max_body_bytes
        request = Request(
            message, payload, protocol, writer, task, self._loop, client_max_size=size
        )
        request.app = self.app
        return request

    def handle(self, request: Request) -> Awaitable[web.StreamResponse]:
        """aiohttp's own way for whatever has a variable in its path, an `Expect`, or no route. No
        coroutine: it would be one more frame that each request passes.
        """
        known = self._known.get((request.method, request.rel_url.path_safe))
        if known is None or hdrs.EXPECT in request.headers:
            return self.app._handle(request)  # noqa: SLF001 — what it gives its own server
        request._match_info, handler = known  # noqa: SLF001 — as it does itself
        return handler(request)


def list_plain_routes(
    app: web.Application,
) -> Mapping[tuple[str, str], tuple[UrlMappingMatchInfo, Handler]]:
    """By method and path; each handler behind the app's middlewares."""
    known: dict[tuple[str, str], tuple[UrlMappingMatchInfo, Handler]] = {}
    for resource in app.router.resources():
        if not isinstance(resource, PlainResource):
            continue
        for route in resource:
            match, handler = UrlMappingMatchInfo({}, route), route.handler
            match.add_app(app)
            match.freeze()
            for middleware in reversed(app.middlewares):
                handler = partial(middleware, handler=handler)
            known.setdefault((route.method, resource.canonical), (match, handler))
    return known


class Runner(web.AppRunner):
    """Serves the gateway's app; used by the program and by the tests alike."""

    def __init__(self, app: web.Application, settings: Settings) -> None:
        super().__init__(
            app,
            # Without it a caller who hangs up leaves the engine working to the end.
            handler_cancellation=True,
            # `request_body.py` does it, bounded; aiohttp would also inflate what it throws away.
            auto_decompress=False,
            access_log=None,
            max_field_size=_LONGEST_FIELD_BYTES,
            keepalive_timeout=settings.client_keepalive_s,
            lingering_time=0,  # `Connection.finish_response` does it
            shutdown_timeout=_LAST_ANSWERS_S,
        )
        self._drain_timeout_s = settings.drain_timeout_s

    async def cleanup(self) -> None:
        """Readiness goes first, then what runs finishes, then the port is closed: who comes in the
        meantime is told when to come back.
        """
        self.app[POOL].draining = True
        deadline = time.monotonic() + self._drain_timeout_s
        while self.app[OPEN_REQUESTS].count and time.monotonic() < deadline:  # noqa: ASYNC110 — seldom
            await asyncio.sleep(_POLL_S)
        # Whole answers are sent after they have been counted out, and slow readers take time.
        self._shutdown_timeout = max(_LAST_ANSWERS_S, deadline - time.monotonic())
        await super().cleanup()

    async def _make_server(self) -> web.Server:
        await super()._make_server()  # starts the app up
        return Server(self.app, **self._kwargs)
