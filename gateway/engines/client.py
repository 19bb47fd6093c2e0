"""HTTP to one engine: the border at which aiohttp's exceptions become this project's.

aiohttp keeps the connections, opens them and parses answers. Its session's request object, task
for the body and response object for every call cost as much as all else the gateway does for it
(docs/benchmarks.md), so a head is written here and an answer is read here, and nothing more: no
cookies, no redirects, no retries.
"""

from __future__ import annotations

import asyncio
import base64
import errno
from collections.abc import Mapping
from typing import Any

import aiohttp
from aiohttp.client_proto import ResponseHandler
from aiohttp.connector import Connection
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.http_parser import RawResponseMessage
from multidict import CIMultiDictProxy
from yarl import URL

from gateway.config import Settings
from gateway.engines.timeouts import CallTimeouts
from gateway.errors import EngineError, EngineTimeout, EngineUnreachable, OutOfFiles

# aiohttp holds two of these before it lets the engine wait; its own would be 256 KiB.
_READ_BYTES = 2**15


class EngineAnswer:
    """What an engine answered: its body, or a stream that its reader reads and closes."""

    __slots__ = ("_connection", "_content", "body", "headers", "is_at_fault", "status", "value")

    def __init__(
        self,
        connection: Connection,
        status: int,
        headers: CIMultiDictProxy[str],
        content: aiohttp.StreamReader,
    ) -> None:
        self._connection, self._content = connection, content
        self.status, self.headers = status, headers
        self.body: bytes | None = None  # of a stream
        self.value: Any = None  # the body, parsed, where the call says how
        # Of a stream, by what it says itself: None, as far as is known it is good.
        self.is_at_fault: bool | None = None

    @property
    def is_page(self) -> bool:
        """For people: no engine answers so, but what stands between may, as if all were well."""
        return self.headers.get("Content-Type", "").startswith("text/html")

    async def read_chunk(self) -> bytes:
        """What has come of a stream, as it came; empty at its end."""
        try:
            return await self._content.readany()
        except (aiohttp.ClientError, HttpProcessingError, OSError) as error:
            raise translate(error) from error

    @property
    def is_in_pieces(self) -> bool:
        """Whether what is read are several calls' streams, each of which has a time of its own."""
        return False

    def find_quiet_since(self, moved_at: float, now: float) -> float:
        """Since when the engine owes the next chunk; times are those of `time.perf_counter`."""
        return moved_at

    def fail(self, error: EngineError) -> None:
        """Whoever reads the stream gets the error."""
        self._content.set_exception(error)

    def close(self) -> None:
        """Its connection is for the next call where all has been read, and of no use where not."""
        if self._content.at_eof():
            self._connection.release()
        else:
            _drop(self._connection)


class EngineClient:
    """One base URL. Belongs to the event loop it was made in."""

    def __init__(self, url: str, connector: aiohttp.BaseConnector, settings: Settings) -> None:
        base = URL(url)
        self._connector = connector
        self._timeouts = CallTimeouts()
        self._timeout_s = settings.engine_timeout_s
        self._connect_timeout = aiohttp.ClientTimeout(
            total=None, sock_connect=settings.connect_timeout_s
        )
        # By this the pool knows the address; it is never sent.
        self._address = aiohttp.ClientRequest(
            "GET", base, loop=asyncio.get_running_loop(), response_class=aiohttp.ClientResponse
        )
        self._prefix = base.raw_path.rstrip("/")
        port = "" if base.is_default_port() else f":{base.port}"
        lines = [f"Host: {base.host_subcomponent}{port}", "User-Agent: vllm-gateway"]
        if base.user:
            pair = f"{base.user}:{base.password or ''}".encode()
            lines.append(f"Authorization: Basic {base64.b64encode(pair).decode()}")
        self._lines = lines

    async def send(
        self,
        method: str,
        path: str,
        headers: Mapping[str, str] | None = None,
        body: bytes | None = None,
    ) -> EngineAnswer:
        """The whole answer, or the head of a stream; every failure is a `GatewayError`."""
        head = self._build_head(method, path, headers or {}, body)
        connection: Connection | None = None
        try:
            with self._timeouts.limit(self._timeout_s):
                connection = await self._connector.connect(self._address, [], self._connect_timeout)
                protocol = _write(connection, head, body)
                message, content = await _read_head(protocol)
                answer = EngineAnswer(connection, message.code, message.headers, content)
                if not message.headers.get("Content-Type", "").startswith("text/event-stream"):
                    # Nearly always all of it has come with its head.
                    is_here = content.is_eof()
                    answer.body = content.read_nowait() if is_here else await content.read()
                    answer.close()
                return answer
        except BaseException as error:
            if connection is not None:
                _drop(connection)
            if isinstance(error, aiohttp.ClientError | HttpProcessingError | OSError):
                raise translate(error) from error
            raise

    def _build_head(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None
    ) -> bytes:
        lines = [f"{method} {self._prefix}{path} HTTP/1.1", *self._lines]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body is not None:
            lines.append(f"Content-Length: {len(body)}")
        text = "\r\n".join(lines)
        breaks = len(lines) - 1
        if text.count("\n") != breaks or text.count("\r") != breaks or "\0" in text:
            raise ValueError("a header of an engine's request holds a line break")
        return text.encode("utf-8", "surrogateescape") + b"\r\n\r\n"


def _write(connection: Connection, head: bytes, body: bytes | None) -> ResponseHandler:
    protocol, transport = connection.protocol, connection.transport
    if protocol is None or transport is None or transport.is_closing():
        raise aiohttp.ServerDisconnectedError
    protocol.set_response_params(
        read_until_eof=True, auto_decompress=False, read_bufsize=_READ_BYTES
    )
    if body:
        transport.writelines((head, body))
    else:
        transport.write(head)
    return protocol


async def _read_head(protocol: ResponseHandler) -> tuple[RawResponseMessage, aiohttp.StreamReader]:
    while True:
        message, content = await protocol.read()
        if message.code >= 200:  # others announce the answer
            return message, content
        if message.code == 101:  # none would come any more
            raise EngineError("the engine switched to another protocol", code="engine_garbled")


def _drop(connection: Connection) -> None:
    """At once: a plain close would keep a request's body until an engine that reads nothing has
    taken it.
    """
    if connection.transport is not None:
        connection.transport.abort()
    connection.close()


def translate(error: Exception) -> EngineError | OutOfFiles:
    """What a caller is told of a foreign exception."""
    if isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE}:
        return OutOfFiles(
            "the gateway may not open more connections; raise its limit of open files "
            "(ulimit -n) or lower GATEWAY_MAX_RUNNING",
            retry_after_s=1,
        )
    if isinstance(error, aiohttp.ClientConnectorCertificateError):
        reason = getattr(error.certificate_error, "verify_message", error.certificate_error)
        said = f"the engine's certificate is not valid: {reason}"
        return EngineUnreachable(said, retry_after_s=5)
    if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
        return EngineUnreachable(
            "the engine does not accept connections; it may be starting", retry_after_s=5
        )
    if isinstance(error, TimeoutError):
        return EngineTimeout("the engine did not answer in time")
    what = type(error).__name__
    if isinstance(error, OSError) and error.strerror:
        what += f": {error.strerror}"  # a reset is another story than a write to a closed one
    return EngineError(f"the engine broke the connection off ({what})")
