"""Connections: aiohttp's server, and what no setting of it can say.

What never became a request (no HTTP, a bad length, an odd `Expect`) is answered in OpenAI's
envelope and leaves one line in the log like every other refusal; aiohttp's own answer would be
text, and a traceback in the log.
"""

from __future__ import annotations

import asyncio
import socket
import time
from typing import Any, cast

import structlog
from aiohttp import web
from aiohttp.http_exceptions import ContentEncodingError

from gateway.config import SETTINGS, Settings
from gateway.engines.pool import POOL
from gateway.errors import GatewayError, InvalidRequest
from gateway.middleware import OPEN_REQUESTS, refuse, translate

_UNSENT_BYTES = 2**17
_LONGEST_FIELD_BYTES = 2**15  # a sign-on service sets many cookies, and they travel as one field
_POLL_S = 0.02  # how often a drain looks whether all have left
_LAST_ANSWERS_S = 1.0  # for what a drain has waited for in vain
log = structlog.get_logger("gateway")


class Connection(web.RequestHandler):
    """One caller's connection."""

    __slots__ = ()

    @property
    def _app(self) -> web.Application:
        return cast("Server", self._manager).app

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        super().connection_made(transport)
        # Left to itself, the kernel would take megabytes for a caller who reads slowly.
        connection = transport.get_extra_info("socket")
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NOTSENT_LOWAT, _UNSENT_BYTES)
        # And it would keep a connection for ever whose caller takes nothing, or is cut off.
        limit_s = self._app[SETTINGS].client_write_timeout_s
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, int(limit_s * 1000))

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

    async def finish_response(
        self, request: web.BaseRequest, resp: web.StreamResponse, start_time: float | None
    ) -> tuple[web.StreamResponse, bool]:
        """aiohttp refuses an odd `Expect` before any middleware is asked."""
        if isinstance(resp, web.HTTPException):
            resp = refuse(self._app, translate(self._app, request, resp))
        if request.content.exception() is not None:
            resp.force_close()  # where the next request would begin, nobody knows
        return await super().finish_response(request, resp, start_time)

    def log_exception(self, *args: Any, **details: Any) -> None:
        """aiohttp stumbles a second time over a body that has been answered with a 400."""
        if not isinstance(details.get("exc_info"), web.RequestPayloadError):
            super().log_exception(*args, **details)


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
    """Makes a connection for each caller who connects."""

    def __init__(self, app: web.Application, server: web.Server, **options: Any) -> None:
        super().__init__(server.request_handler, request_factory=server.request_factory, **options)
        self.app = app

    def __call__(self) -> Connection:
        return Connection(self, loop=self._loop, **self._kwargs)


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
        return Server(self.app, await super()._make_server(), **self._kwargs)
