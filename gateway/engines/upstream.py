"""Requests over aiohttp's connections, without its session's ceremony.

aiohttp keeps the pool, opens connections and parses answers. A request object, a task for its body
and a response object for every call cost as much as all else the gateway does for it, so a head is
written here and an answer is read here, and nothing more: no cookies, no redirects, no retries.
"""

from __future__ import annotations

import asyncio
import base64
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import aiohttp
from aiohttp.connector import Connection
from aiohttp.http_exceptions import HttpProcessingError
from multidict import CIMultiDictProxy
from yarl import URL

# aiohttp holds two of these before it lets the engine wait; its own would be 256 KiB.
_READ_BYTES = 2**15


class Answer:
    """A head that has come, and its body on the way. Left as a context, it frees its connection:
    for the next call when the body has come to its end, for good when it has not.
    """

    __slots__ = ("_connection", "content", "headers", "status")

    def __init__(
        self,
        connection: Connection,
        status: int,
        headers: CIMultiDictProxy[str],
        content: aiohttp.StreamReader,
    ) -> None:
        self._connection = connection
        self.status, self.headers, self.content = status, headers, content

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self.content.at_eof():
            self._connection.release()
        else:
            self._connection.close()

    @property
    def is_stream(self) -> bool:
        return self.headers.get("Content-Type", "").startswith("text/event-stream")


class Upstream:
    """One base URL. Belongs to the event loop it was made in."""

    def __init__(self, url: str, connector: aiohttp.BaseConnector, connect_timeout_s: float):
        base = URL(url)
        self._connector = connector
        self._timeout = aiohttp.ClientTimeout(total=None, sock_connect=connect_timeout_s)
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
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None
    ) -> Answer:
        """Raises `aiohttp.ClientError` and `TimeoutError` as aiohttp's session does."""
        head = self._build_head(method, path, headers, body)
        connection = await self._connector.connect(self._address, [], self._timeout)
        try:
            return await self._exchange(connection, head, body)
        except HttpProcessingError as error:
            connection.close()
            raise aiohttp.ClientPayloadError(f"no HTTP: {error.message}") from error
        except BaseException:
            connection.close()
            raise

    async def _exchange(self, connection: Connection, head: bytes, body: bytes | None) -> Answer:
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
        while True:
            message, content = await protocol.read()
            if message.code >= 200:  # others announce the answer
                return Answer(connection, message.code, message.headers, content)

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
