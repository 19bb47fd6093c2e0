"""Reading a request's body: JSON, all of it, bounded in size (sent and inflated) and in time."""

from __future__ import annotations

import asyncio
import re
import zlib

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, PayloadEncodingError

from gateway.config import SETTINGS
from gateway.errors import BodyTimeout, InvalidRequest, PayloadTooLarge, UnsupportedMediaType

_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
_WORTH_A_THREAD_BYTES = 2**16
_JSON = re.compile(r"(application|text)/([\w.+-]+\+)?json", re.IGNORECASE)


async def read_body(request: web.Request) -> bytes:
    settings = request.app[SETTINGS]
    _check_type(request.headers.get("Content-Type", ""))
    if (request.content_length or 0) > settings.max_body_bytes:
        raise _too_large(settings.max_body_bytes)
    encoding = request.headers.get("Content-Encoding")
    if encoding is None or encoding == "identity":
        return await _read(request)
    window = _WINDOWS.get(encoding.strip().lower())
    if window is None:
        raise InvalidRequest(
            "send the body as it is, or with Content-Encoding gzip or deflate", code="bad_encoding"
        )
    packed = await _read(request)
    if len(packed) < _WORTH_A_THREAD_BYTES:
        return _inflate(packed, window, settings.max_body_bytes)
    return await asyncio.to_thread(_inflate, packed, window, settings.max_body_bytes)


def _check_type(given: str) -> None:
    """A web page may send forms and text to any server without asking it first, but no JSON."""
    if given and given != "application/json" and not _JSON.fullmatch(given.partition(";")[0]):
        raise UnsupportedMediaType(
            f"the body is {given[:100]!r}; send JSON, with `Content-Type: application/json`"
        )


def _inflate(packed: bytes, window: int, most: int) -> bytes:
    """At most so many bytes of it: a few megabytes of zeros unfold to gigabytes."""
    inflater = zlib.decompressobj(window)
    try:
        body = inflater.decompress(packed, most + 1)
    except zlib.error as error:
        raise InvalidRequest(f"the body cannot be decoded: {error}", code="bad_encoding") from None
    if len(body) > most:
        raise _too_large(most)
    if not inflater.eof or inflater.unused_data:
        raise InvalidRequest(
            "the body cannot be decoded: it is cut off or has a tail", code="bad_encoding"
        )
    return body


def _too_large(most: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is larger than {most} bytes; send it in parts")


async def _read(request: web.Request) -> bytes:
    settings = request.app[SETTINGS]
    try:
        if request.content.is_eof():
            return await request.read()  # all here already, as small bodies are
        async with asyncio.timeout(settings.body_timeout_s):
            return await request.read()
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {settings.body_timeout_s:g} s") from None
    except (HttpProcessingError, PayloadEncodingError, web.RequestPayloadError) as error:
        reason = str(error).splitlines()[-1].strip()  # aiohttp's has a status and a line break too
        raise InvalidRequest(f"the body cannot be decoded: {reason}", code="bad_encoding") from None
