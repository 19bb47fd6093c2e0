"""Stands between a gateway and a real engine, and spoils its answers when it is told to.

Prompts, health and metrics are passed on as they are.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import aiohttp
from aiohttp import web

_DRIP_PIECES = 12
_DRIP_PAUSE_S = 0.05
# Hop by hop, or no longer true of what is passed on.
_OWN_HEADERS = frozenset(
    ("connection", "content-encoding", "content-length", "date", "server", "transfer-encoding")
)
_NOT_FORWARDED = frozenset(("host", "content-length"))

Spoil = Callable[[web.Request, aiohttp.ClientResponse], Awaitable[web.StreamResponse]]


class BrokenEngine:
    """`spoil` is what becomes of answers to what is generated; None: nothing."""

    def __init__(self, engine_url: str) -> None:
        self._engine_url = engine_url
        self.spoil: Spoil | None = None
        self.spoilt = 0
        self.url = ""

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[BrokenEngine]:
        app = web.Application(client_max_size=2**30)
        app.router.add_route("*", "/{path:.*}", self._handle)
        runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1)
        connector = aiohttp.TCPConnector(limit=0, keepalive_timeout=1)
        async with aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=None), auto_decompress=False
        ) as self._session:
            await runner.setup()
            try:
                await web.TCPSite(runner, "127.0.0.1", 0).start()
                self.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
                yield self
            finally:
                await runner.cleanup()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {
            k: v for k, v in request.headers.items() if k.lower() not in {"host", "content-length"}
        }
        url = self._engine_url + request.rel_url.raw_path_qs
        try:
            async with self._session.request(
                request.method, url, data=body, headers=headers
            ) as got:
                is_generated = request.path.endswith("completions")
                if self.spoil and is_generated and got.status == 200:
                    self.spoilt += 1
                    return await self.spoil(request, got)
                return await pass_on(request, got)
        except aiohttp.ClientError:
            return web.Response(status=502)


async def pass_on(request: web.Request, got: aiohttp.ClientResponse) -> web.StreamResponse:
    response = _answer_as(got)
    await response.prepare(request)
    async for piece in got.content.iter_any():
        await response.write(piece)
    return response


# --- what it may do ---


async def leave_out(request: web.Request, got: aiohttp.ClientResponse) -> web.StreamResponse:
    """One answer too few."""
    return await _change(request, got, lambda choices: choices[:-1])


async def double(request: web.Request, got: aiohttp.ClientResponse) -> web.StreamResponse:
    """The first answer twice, the last not at all."""
    return await _change(request, got, lambda choices: [choices[0], *choices[:-1]])


async def misplace(request: web.Request, got: aiohttp.ClientResponse) -> web.StreamResponse:
    """In another order, each with its own number."""
    return await _change(request, got, lambda choices: choices[::-1])


async def cut_off(request: web.Request, got: aiohttp.ClientResponse) -> web.StreamResponse:
    """The connection breaks after half, or after a stream's first pieces."""
    response = _answer_as(got)
    if got.content_type == "application/json":
        whole = await got.read()
        response.content_length = len(whole)
        await response.prepare(request)
        await response.write(whole[: len(whole) // 2])
    else:
        await response.prepare(request)
        await response.write(await got.content.readany())
    await asyncio.sleep(0.01)
    if request.transport:
        request.transport.abort()
    return response


async def answer_html(_: web.Request, got: aiohttp.ClientResponse) -> web.StreamResponse:
    """A page of some proxy's, as if all were well."""
    return web.Response(text="<html>502 Bad Gateway</html>", content_type="text/html")


async def drip(request: web.Request, got: aiohttp.ClientResponse) -> web.StreamResponse:
    """Piece by piece, all of it."""
    response, whole = _answer_as(got), await got.read()
    await response.prepare(request)
    step = max(1, len(whole) // _DRIP_PIECES)
    for place in range(0, len(whole), step):
        await response.write(whole[place : place + step])
        await asyncio.sleep(_DRIP_PAUSE_S)
    return response


async def never_answer(_: web.Request, got: aiohttp.ClientResponse) -> web.StreamResponse:
    """Until the other side hangs up."""
    await asyncio.Event().wait()
    return web.Response()


def _answer_as(got: aiohttp.ClientResponse) -> web.StreamResponse:
    headers = {k: v for k, v in got.headers.items() if k.lower() not in _OWN_HEADERS}
    return web.StreamResponse(status=got.status, headers=headers)


async def _change(
    request: web.Request,
    got: aiohttp.ClientResponse,
    change: Callable[[list[dict[str, Any]]], list[dict[str, Any]]],
) -> web.StreamResponse:
    """Of several answers in one; others have only the one and its stream."""
    if got.content_type != "application/json":
        return await pass_on(request, got)
    answer = json.loads(await got.read())
    if len(answer["choices"]) > 1:
        answer["choices"] = change(answer["choices"])
    return web.json_response(answer)
