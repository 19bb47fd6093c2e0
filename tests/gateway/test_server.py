"""The short way past aiohttp: the same answers to the byte, the same routes."""

from __future__ import annotations

import asyncio
import gzip
import re
import time
from pathlib import Path
from urllib.parse import urlsplit

import pytest
from aiohttp import web
from aiohttp.helpers import DEFAULT_CHUNK_SIZE
from aiohttp.test_utils import make_mocked_request

from gateway.app import build_app
from gateway.engines.client import _READ_BYTES
from gateway.observability.metrics import Metrics
from gateway.request_context import CONTEXT
from gateway.server import Connection, RefusalPace, Request, Server, list_plain_routes
from tests.gateway.conftest import Serve, Served, make_settings
from tests.gateway.scripted_engine import Call, ScriptedEngine, serve_scripted, stream_head
from tests.patience import PROGRAM_S

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


# --- a flood of bad requests


async def test_refusals_above_their_rate_wait_their_turn(serve: Serve) -> None:
    async with serve(refusals_per_s=20) as served:
        began = time.monotonic()
        answers = [
            (await served.client.post("/predict", content=b"{")).status_code for _ in "x" * 60
        ]
        took_s = time.monotonic() - began

    # The first second's are answered as they come.
    assert (set(answers), took_s >= (60 - 20) / 20 - 0.1) == ({400}, True)


async def test_refusals_that_wait_hold_up_no_good_request(serve: Serve) -> None:
    async with serve(refusals_per_s=1) as served:
        overtaken = []
        for _ in range(5):
            bad = [asyncio.create_task(served.client.get("/v1/nothing")) for _ in range(8)]
            await asyncio.sleep(0)
            assert (await served.chat("hi")).status_code == 200
            overtaken.append(sum(not one.done() for one in bad))
            assert {(await one).status_code for one in bad} == {404}

    assert max(overtaken) >= 6


async def test_refusal_of_much_that_was_read_takes_many_turns(serve: Serve) -> None:
    """A few kilobytes unfold to megabytes, and to look at them takes the time of many refusals."""
    packed = gzip.compress(b'{"model": "fake", "prompt": "%s"}' % (b"x" * 2**23))
    headers = {"Content-Encoding": "gzip", "Content-Type": "application/json"}
    async with serve() as served:
        began = time.monotonic()
        for _ in range(5):
            answer = await served.client.post("/tokenize", content=packed, headers=headers)
            assert answer.status_code == 400, answer.text
        took_s = time.monotonic() - began

    # 128 turns each: one second's are there, the others wait for theirs.
    assert took_s >= 5 * 128 / 200 - 1 - 0.1


async def test_refusals_of_much_do_not_hold_up_those_of_little() -> None:
    pace = RefusalPace(1, Metrics())
    large = [asyncio.create_task(pace.wait_turn(read_bytes=2**20)) for _ in range(8)]
    await asyncio.sleep(0)
    small = asyncio.create_task(pace.wait_turn(read_bytes=0))
    await asyncio.sleep(0)

    assert (small.done(), any(one.done() for one in large)) == (True, False)
    async with asyncio.timeout(PROGRAM_S):
        await asyncio.gather(*large)


async def test_only_so_many_refusals_wait_at_once() -> None:
    pace = RefusalPace(1, Metrics())
    waiting = [asyncio.create_task(pace.wait_turn(read_bytes=2**20)) for _ in range(700)]
    await asyncio.sleep(0)

    assert sum(not one.done() for one in waiting) == 512
    for one in waiting:
        one.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    again = asyncio.create_task(pace.wait_turn(read_bytes=2**20))
    await asyncio.sleep(0)
    assert not again.done()
    again.cancel()


async def test_refusals_without_a_rate_wait_for_nothing() -> None:
    pace = RefusalPace(0, Metrics())
    async with asyncio.timeout(PROGRAM_S):
        for _ in range(10_000):
            await pace.wait_turn(read_bytes=2**20)


# --- a parser that stops where nobody has paused it


def build_chat(body: bytes = _CHAT, framing: str = "") -> bytes:
    framing = framing or f"Content-Length: {len(body)}"
    head = ["POST /v1/chat/completions HTTP/1.1", "Host: gateway", _TYPE, framing]
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


def cut_into_bytes(body: bytes) -> bytes:
    return b"".join(b"1\r\n%c\r\n" % one for one in body)


async def read_statuses(reader: asyncio.StreamReader, count: int) -> list[bytes]:
    statuses = []
    for _ in range(count):
        head = await reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"(?i)content-length: (\d+)", head)
        assert length is not None
        await reader.readexactly(int(length[1]))
        statuses.append(head[9:12])
    return statuses


@pytest.mark.parametrize("further", [31, 32, 40, 80])
async def test_requests_that_wait_on_one_connection_are_all_answered(
    served: Served, further: int
) -> None:
    """Of more than 32 the parser keeps the rest to itself until it is woken."""
    url = urlsplit(served.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    head, _, body = build_chat().partition(b"\r\n\r\n")
    writer.write(head + b"\r\n\r\n")
    await asyncio.sleep(0.1)  # no answer tells that its head has been read
    writer.write(body)
    await asyncio.sleep(0.005)
    writer.write(build_chat() * further)

    assert await read_statuses(reader, further + 1) == [b"200"] * (further + 1)
    writer.close()


# At one chunk of these the parser pauses, by itself and for the next body as well.
_CHUNKS = [DEFAULT_CHUNK_SIZE // 16 + more for more in (-1, 0, 1, 2)]


@pytest.mark.parametrize("chunks", _CHUNKS)
@pytest.mark.parametrize("pause_s", [0.0, 0.3])
async def test_body_in_as_many_chunks_as_a_parser_takes_costs_nothing(
    served: Served, chunks: int, pause_s: float
) -> None:
    url = urlsplit(served.url)
    reader, writer = await asyncio.open_connection(url.hostname, url.port)
    rest = _CHAT[1:]
    # So many before the pause, or in all.
    first = _CHAT[:1] + b" " * ((chunks if pause_s else chunks - len(rest)) - 1)
    writer.write(build_chat(cut_into_bytes(first), "Transfer-Encoding: chunked"))
    await asyncio.sleep(pause_s)
    writer.write(cut_into_bytes(rest) + b"0\r\n\r\n" + build_chat())

    assert await read_statuses(reader, 2) == [b"200"] * 2
    writer.close()


@pytest.mark.parametrize("chunks", [_READ_BYTES // 16 + more for more in (-1, 0, 1, 2)])
async def test_answer_in_as_many_chunks_as_a_parser_takes_is_passed_on(
    chunks: int, tmp_path: Path
) -> None:
    async def answer(call: Call) -> None:
        first, rest = b'{"choices":[],"pad":"'.ljust(chunks, b"y"), b'"}'
        head = stream_head().replace(b"text/event-stream", b"application/json")
        await call.send(head + cut_into_bytes(first))
        await asyncio.sleep(0.3)  # nothing tells that all of it has been read
        await call.send(cut_into_bytes(rest) + b"0\r\n\r\n")

    engine = ScriptedEngine()
    async with serve_scripted(tmp_path, engine) as served:
        engine.usual = answer
        answered = await served.client.post("/v1/chat/completions", content=_CHAT)
    assert len(answered.json()["pad"]) > chunks - 30


# --- long header lines, as a sign-on service's cookies make them


@pytest.mark.parametrize(("size", "status"), [(9_000, 200), (32_000, 200), (33_000, 400)])
async def test_line_of_cookies_is_taken_up_to_its_bound(
    served: Served, size: int, status: int
) -> None:
    cookie = "session=".ljust(size, "x")
    headers = {"Cookie": cookie, "Content-Type": "application/json"}
    answer = await served.client.post("/v1/chat/completions", content=_CHAT, headers=headers)

    assert answer.status_code == status, answer.text
    if status == 400:
        assert answer.json()["error"]["code"] == "bad_http"
        assert "32768" in answer.json()["error"]["message"]
