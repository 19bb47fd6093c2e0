"""Reading a request's body: all of it, bounded in size by the app and in time here."""

from __future__ import annotations

import asyncio

from aiohttp import web

from gateway.config import SETTINGS
from gateway.errors import BodyTimeout


async def read_body(request: web.Request) -> bytes:
    if request.content.is_eof():
        return await request.read()  # all here already, as small bodies are
    timeout_s = request.app[SETTINGS].body_timeout_s
    try:
        async with asyncio.timeout(timeout_s):
            return await request.read()
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {timeout_s:g} s") from None
