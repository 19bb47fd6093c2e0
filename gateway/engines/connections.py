"""Connections to engines: aiohttp's, and deaf to what nobody asked for.

aiohttp takes whatever arrives on a kept connection for the answer to the next request on it. An
engine that answers a call twice would so tell one caller what another asked; here it is hung up on.
"""

from __future__ import annotations

import functools
import socket
from typing import Any

import aiohttp
from aiohttp import AddrInfoType
from aiohttp.client_proto import ResponseHandler

from gateway.config import Settings

_KERNEL_BYTES = 2**18
# A host that loses its power or its network says nothing, and a stream from it would be waited for
# until GATEWAY_STREAM_IDLE_TIMEOUT_S. Its kernel is asked in every silence; one whose engine is
# only busy answers. An engine that takes nothing of a large body for as long looks the same, so it
# is as long as the launcher lets one hang.
_ASK_AFTER_S = 10
_SILENCE_MS = 120_000


class _OneAnswerProtocol(ResponseHandler):
    """Listens from a request's start to its answer's last byte."""

    _is_listening = False
    _has_paused = False
    _body: aiohttp.StreamReader | None = None

    def set_response_params(self, **options: Any) -> None:
        self._is_listening = True
        super().set_response_params(**options)

    def feed_data(self, data: Any, size: int = 0) -> None:
        message, payload = data
        if message.code >= 200:  # after an interim answer the real one is still to come
            payload.on_eof(self._stop_listening)
            self._body = payload
        super().feed_data(data, size)

    def set_exception(self, error: BaseException, *cause: Any) -> None:
        """aiohttp tells whoever waits for a head; the reader of a body with a broken chunk would
        wait for the rest of it until it is too late.
        """
        body, self._body = self._body, None
        if body is not None and not body.is_eof() and body.exception() is None:
            body.set_exception(error)
        super().set_exception(error, *cause)

    def data_received(self, data: bytes) -> None:
        if self._is_listening:
            super().data_received(data)
        elif data:  # aiohttp wakes its parser with nothing, too
            self.close()

    def pause_reading(self) -> None:
        self._has_paused = True
        super().pause_reading()

    def resume_reading(self, resume_parser: bool = True) -> None:
        """aiohttp has parser and transport go on after each chunk that is read. They need that only
        on a connection that was ever paused: the parser does not tell whether it still is.
        """
        if self._has_paused:
            super().resume_reading(resume_parser)

    def _stop_listening(self) -> None:
        self._is_listening, self._body = False, None


def _make_socket(address: AddrInfoType) -> socket.socket:
    """Left to itself, the kernel would hold megabytes of a stream whose reader is slow, and wait a
    quarter of an hour for a host that is no more.
    """
    family, kind, protocol, _, _ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, _KERNEL_BYTES)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, _ASK_AFTER_S)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, _ASK_AFTER_S)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _SILENCE_MS)
    return made


class EngineConnector(aiohttp.TCPConnector):
    """aiohttp's pool of connections, with a protocol of our own."""

    def __init__(self, **options: Any) -> None:
        super().__init__(socket_factory=_make_socket, **options)
        self._factory = functools.partial(_OneAnswerProtocol, loop=self._loop)  # type: ignore[assignment]


def build_connector(settings: Settings) -> EngineConnector:
    """The connections to all engines; aiohttp's own limit of 100 is off, the queue alone limits."""
    return EngineConnector(limit=0, keepalive_timeout=settings.engine_keepalive_s)


def build_session(settings: Settings, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
    """The same connections for what is asked seldom: a launcher's status. It closes them, too."""
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(
            total=settings.engine_timeout_s, sock_connect=settings.connect_timeout_s
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
    )
