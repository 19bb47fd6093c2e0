"""Reading a request's body: all of it, bounded in size by the app and in time here."""

from __future__ import annotations

import asyncio

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, PayloadEncodingError

from gateway.config import SETTINGS
from gateway.errors import BodyTimeout, InvalidRequest, PayloadTooLarge


async def read_body(request: web.Request) -> bytes:
    settings = request.app[SETTINGS]
    if (request.content_length or 0) > settings.max_body_bytes:
        raise PayloadTooLarge(
            f"the body is larger than {settings.max_body_bytes} bytes; send it in parts"
        )
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
