"""HTTP by hand: what a test must send that no client library would, and a strict reader."""

from __future__ import annotations

import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Iterable, Mapping
from dataclasses import dataclass

_STATUS_LINE = re.compile(rb"HTTP/(\d\.\d) (\d{3}) [^\r\n]*")
_FIELD = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\r\n\0]*?)[ \t]*")

Headers = Iterable[tuple[str, str | bytes]]


class NotHTTP(Exception):
    """What came is no answer of a server that keeps to the protocol."""


@dataclass(frozen=True, slots=True)
class RawAnswer:
    """One answer, to its last byte."""

    status: int
    headers: Mapping[str, str]
    body: bytes
    keeps_connection: bool


def build_request(
    method: str, path: str, body: bytes = b"", headers: Headers = (), *, is_sized: bool = True
) -> bytes:
    """A request as it travels; with `is_sized` off its length is the caller's business."""
    lines = [f"{method} {path} HTTP/1.1\r\nHost: gateway\r\n".encode("utf-8", "surrogateescape")]
    for name, value in headers:
        text = value.encode("utf-8", "surrogateescape") if isinstance(value, str) else value
        lines.append(name.encode() + b": " + text + b"\r\n")
    if is_sized and (body or method == "POST"):
        lines.append(b"Content-Length: %d\r\n" % len(body))
    return b"".join((*lines, b"\r\n", body))


async def read_answer(reader: asyncio.StreamReader, method: str = "POST") -> RawAnswer | None:
    """The next answer, interim ones left out; None where the connection ends instead."""
    while True:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError) as error:
            if getattr(error, "partial", b""):
                raise NotHTTP(f"a head breaks off: {error}") from None
            return None
        version, status, headers = _parse_head(head)
        if status >= 200:
            break
    try:
        body, is_delimited = await _read_body(reader, status, headers, method)
    except (asyncio.IncompleteReadError, ConnectionError) as error:
        raise NotHTTP(f"a body breaks off: {error}") from None
    usual = "close" if version == "1.0" else "keep-alive"
    keeps = is_delimited and headers.get("connection", usual).lower() == "keep-alive"
    if method == "HEAD" and not keeps:
        await reader.read()  # one that could not be parsed is not known to have been a HEAD
    return RawAnswer(status, headers, body, keeps)


def _parse_head(head: bytes) -> tuple[str, int, dict[str, str]]:
    first, *lines = head[:-4].split(b"\r\n")
    found = _STATUS_LINE.fullmatch(first)
    if found is None:
        raise NotHTTP(f"no status line: {first[:100]!r}")
    headers: dict[str, str] = {}
    for line in lines:
        field = _FIELD.fullmatch(line)
        if field is None:
            raise NotHTTP(f"no header: {line[:100]!r}")
        name = field[1].decode().lower()
        if name in headers:
            raise NotHTTP(f"{name} is there twice")
        headers[name] = field[2].decode("latin-1")
    return found[1].decode(), int(found[2]), headers


async def _read_body(
    reader: asyncio.StreamReader, status: int, headers: Mapping[str, str], method: str
) -> tuple[bytes, bool]:
    if method == "HEAD" or status in {204, 304}:
        return b"", True
    if headers.get("transfer-encoding") == "chunked":
        return await _read_chunks(reader), True
    if "content-length" in headers:
        return await reader.readexactly(int(headers["content-length"])), True
    return await reader.read(), False


async def _read_chunks(reader: asyncio.StreamReader) -> bytes:
    pieces = []
    while size := int(await reader.readuntil(b"\r\n"), 16):
        pieces.append(await reader.readexactly(size))
        if await reader.readexactly(2) != b"\r\n":
            raise NotHTTP("a chunk is longer than it says")
    await reader.readuntil(b"\r\n")
    return b"".join(pieces)


def address(url: str) -> tuple[str, int]:
    host, port = url.removeprefix("http://").rsplit(":", 1)
    return host, int(port)


@contextlib.asynccontextmanager
async def connect(url: str) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A plain connection, broken off at the end whatever is on its way."""
    reader, writer = await asyncio.open_connection(*address(url), limit=2**26)
    try:
        yield reader, writer
    finally:
        writer.transport.abort()


async def ask(url: str, request: bytes, method: str = "POST", timeout_s: float = 60) -> RawAnswer:
    """One request on a connection of its own, and its answer."""
    async with connect(url) as (reader, writer), asyncio.timeout(timeout_s):
        writer.write(request)
        answer = await read_answer(reader, method)
    if answer is None:
        raise NotHTTP("the connection ended without an answer")
    return answer
