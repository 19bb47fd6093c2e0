"""The short way past aiohttp: the same answers to the byte, the same routes."""

from __future__ import annotations

import asyncio
import re
from urllib.parse import urlsplit

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from gateway.app import build_app
from gateway.request_context import CONTEXT
from gateway.server import Connection, Request, Server, list_plain_routes
from tests.gateway.conftest import Serve, Served, make_settings

_CHAT = b'{"model":"fake","messages":[{"role":"user","content":"hi"}]}'
_TYPE = "Content-Type: application/json"
# What differs from one request to the next.
_CHANGING = re.compile(
    rb"(?<=\r\nServer-Timing: )[^\r]*|(?<=\r\nDate: )[^\r]*|chatcmpl-[\w.-]+|(?<=\"created\":)\d+"
)
_REQUESTS = {
    "chat": ("POST /v1/chat/completions HTTP/1.1", [_TYPE], _CHAT),
    "last": ("POST /v1/chat/completions HTTP/1.1", [_TYPE, "Connection: close"], _CHAT),
    "old": ("POST /v1/chat/completions HTTP/1.0", [_TYPE], _CHAT),
    "old and kept": (
        "POST /v1/chat/completions HTTP/1.0",
        [_TYPE, "Connection: keep-alive"],
        _CHAT,
    ),
    "expected": ("POST /v1/chat/completions HTTP/1.1", [_TYPE, "Expect: 100-continue"], _CHAT),
    "refused": ("POST /v1/chat/completions HTTP/1.1", [_TYPE], b"{"),
    "head": ("HEAD /healthz HTTP/1.1", [], b""),
    "version": ("GET /version HTTP/1.1", [], b""),
    "unknown": ("GET /nowhere HTTP/1.1", [], b""),
    "not so": ("GET /predict HTTP/1.1", [], b""),
    "escaped": ("GET /v1%2Fmodels HTTP/1.1", [], b""),
    "variable": ("GET /v1/models/none HTTP/1.1", [], b""),
    "not modified": ("GET /ui/none.js HTTP/1.1", ["If-None-Match: *"], b""),
}


async def ask(served: Served, line: str, headers: list[str], body: bytes) -> bytes:
    """All that comes until the server hangs up, as it is asked to by this request or the next."""
    url = urlsplit(served.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    common = ["Host: gateway", "X-Request-Id: me", f"Content-Length: {len(body)}"]
    head = "\r\n".join([line, *common, *headers]).encode() + b"\r\n\r\n"
    last = (
        b"GET /healthz HTTP/1.1\r\nHost: gateway\r\nX-Request-Id: me\r\nConnection: close\r\n\r\n"
    )
    is_kept = "Connection: keep-alive" in headers or (
        line.endswith("1.1") and "Connection: close" not in headers
    )
    writer.write(head + body + (last if is_kept else b""))
    answers = await reader.read()
    writer.close()
    return _CHANGING.sub(b"", answers)


@pytest.mark.parametrize("name", _REQUESTS)
async def test_answer_is_what_aiohttp_would_write(
    name: str, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with serve() as served:
        ours = await ask(served, *_REQUESTS[name])
        monkeypatch.setattr(Connection, "finish_response", web.RequestHandler.finish_response)
        monkeypatch.setattr(Server, "handle", lambda self, request: self.app._handle(request))
        theirs = await ask(served, *_REQUESTS[name])

    assert ours == theirs
    assert ours.startswith(b"HTTP/1.")


async def test_answer_to_who_has_gone_ends_the_connection_quietly(serve: Serve) -> None:
    async with serve() as served:
        served.engine.delay_s = 0.2
        url = urlsplit(served.url)
        _, writer = await asyncio.open_connection(url.hostname, url.port)
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: g\r\nContent-Length: {len(_CHAT)}\r\n"
        writer.write(head.encode() + _TYPE.encode() + b"\r\n\r\n" + _CHAT)
        await writer.drain()
        writer.transport.abort()

        assert (await served.chat("hi")).status_code == 200


async def test_plain_routes_are_those_that_aiohttp_finds() -> None:
    app = build_app(make_settings())
    known = list_plain_routes(app)

    assert ("POST", "/v1/chat/completions") in known
    for (method, path), (match, _) in known.items():
        found = await app.router.resolve(make_mocked_request(method, path))
        assert (found.route, found.handler) == (match.route, match.handler)


def test_request_finds_what_it_has_and_nothing_else() -> None:
    app, plain = web.Application(), make_mocked_request("GET", "/")
    request = Request(
        plain._message, plain.content, plain.protocol, plain.writer, plain.task, plain._loop
    )
    request.app = app

    assert request.app is app
    assert request.get(CONTEXT) is None
    assert request.get(CONTEXT, 1) == 1
