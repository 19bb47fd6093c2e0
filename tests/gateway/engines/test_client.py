"""Requests over aiohttp's connections: what is sent, what is read, when a connection is kept."""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import AsyncIterator, Callable

import aiohttp
import pytest

from gateway.engines.client import EngineClient
from gateway.engines.connections import _make_socket
from gateway.errors import EngineError, EngineUnreachable
from tests.gateway.conftest import make_settings

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"


class Peer:
    """A server that says what it is told to, and keeps what it heard."""

    def __init__(self) -> None:
        self.answers: list[bytes] = []
        self.heard: list[bytes] = []
        self.connections = 0
        self.closes = False

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                length = int(head.partition(b"Content-Length: ")[2].partition(b"\r\n")[0] or 0)
                self.heard.append(head + await reader.readexactly(length))
                writer.write(self.answers.pop(0) if self.answers else OK)
                if self.closes:
                    break
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


@pytest.fixture
async def peer() -> AsyncIterator[tuple[Peer, Callable[[str], EngineClient]]]:
    peer = Peer()
    server = await asyncio.start_server(peer.talk, "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    connector = aiohttp.TCPConnector(limit=0)
    yield peer, lambda url: EngineClient(url.format(port=port), connector, make_settings())
    await connector.close()
    server.close()
    await server.wait_closed()


async def test_request_is_sent_whole_and_its_connection_kept(
    peer: tuple[Peer, Callable[[str], EngineClient]],
) -> None:
    client = peer[1]("http://127.0.0.1:{port}/base")
    for _ in range(3):
        answer = await client.send("POST", "/v1/x?y=1", {"A": "b"}, b"body")
        assert (answer.status, answer.body) == (200, b"ok")

    assert peer[0].connections == 1
    head, body = peer[0].heard[-1].split(b"\r\n\r\n")
    assert head.startswith(b"POST /base/v1/x?y=1 HTTP/1.1\r\nHost: 127.0.0.1:")
    assert b"\r\nA: b\r\n" in head
    assert body == b"body"


async def test_password_of_the_url_is_sent(
    peer: tuple[Peer, Callable[[str], EngineClient]],
) -> None:
    await peer[1]("http://me:pw@127.0.0.1:{port}").send("GET", "/")

    assert b"\r\nAuthorization: Basic bWU6cHc=\r\n" in peer[0].heard[0]


@pytest.mark.parametrize("value", ["a\r\nB: c", "a\nb", "a\rb", "a\0b"])
async def test_header_with_a_line_break_is_never_sent(
    peer: tuple[Peer, Callable[[str], EngineClient]], value: str
) -> None:
    with pytest.raises(ValueError, match="line break"):
        await peer[1]("http://127.0.0.1:{port}").send("GET", "/", {"A": value}, None)

    assert peer[0].heard == []


async def test_redirect_is_an_answer_like_others(
    peer: tuple[Peer, Callable[[str], EngineClient]],
) -> None:
    peer[0].answers = [b"HTTP/1.1 302 Found\r\nLocation: /evil\r\nContent-Length: 0\r\n\r\n"]
    answer = await peer[1]("http://127.0.0.1:{port}").send("GET", "/", {}, None)

    assert (answer.status, answer.body, len(peer[0].heard)) == (302, b"", 1)


async def test_what_announces_an_answer_is_passed_over(
    peer: tuple[Peer, Callable[[str], EngineClient]],
) -> None:
    peer[0].answers = [b"HTTP/1.1 103 Early Hints\r\n\r\n" + OK]
    answer = await peer[1]("http://127.0.0.1:{port}").send("POST", "/", {}, b"x")

    assert (answer.status, answer.body) == (200, b"ok")


async def test_answer_left_half_read_costs_its_connection(
    peer: tuple[Peer, Callable[[str], EngineClient]],
) -> None:
    client = peer[1]("http://127.0.0.1:{port}")
    head = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nContent-Length: 5\r\n\r\n"
    peer[0].answers = [head + b"ha"]
    stream = await client.send("GET", "/")
    assert stream.body is None
    stream.close()
    assert (await client.send("GET", "/")).body == b"ok"

    assert peer[0].connections == 2


@pytest.mark.parametrize(
    "answer", [b"", b"SSH-2.0-x\r\n\r\n", b"HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\nshort"]
)
async def test_garbage_and_half_answers_are_the_engines_errors(
    peer: tuple[Peer, Callable[[str], EngineClient]], answer: bytes
) -> None:
    peer[0].answers, peer[0].closes = [answer], True
    client = peer[1]("http://127.0.0.1:{port}")

    with pytest.raises(EngineError):
        await client.send("POST", "/", {}, b"x")


async def test_reset_is_told_as_one() -> None:
    async def reset(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        linger = struct.pack("ii", 1, 0)
        writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
        writer.transport.abort()

    server = await asyncio.start_server(reset, "127.0.0.1", 0)
    connector = aiohttp.TCPConnector(limit=0)
    port = server.sockets[0].getsockname()[1]
    client = EngineClient(f"http://127.0.0.1:{port}", connector, make_settings())
    with pytest.raises(EngineError, match="ClientOSError: Connection reset by peer"):
        await client.send("GET", "/", {}, None)
    await connector.close()
    server.close()
    await server.wait_closed()


async def test_nobody_listening_is_engine_unreachable() -> None:
    connector = aiohttp.TCPConnector(limit=0)
    try:
        with pytest.raises(EngineUnreachable):
            await EngineClient("http://127.0.0.1:1", connector, make_settings()).send(
                "GET", "/", {}, None
            )
    finally:
        await connector.close()


def test_host_that_says_nothing_any_more_is_found_out_within_two_minutes() -> None:
    here = (socket.AF_INET, socket.SOCK_STREAM, 0, "", ("127.0.0.1", 1))
    with _make_socket(here) as made:
        tcp = {
            name: made.getsockopt(socket.IPPROTO_TCP, getattr(socket, f"TCP_{name}"))
            for name in ("KEEPIDLE", "KEEPINTVL", "USER_TIMEOUT")
        }
        assert made.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1

    assert 0 < tcp["KEEPIDLE"] + tcp["KEEPINTVL"] < 60
    # For the kernel, this counts in an idle silence, too.
    assert 0 < tcp["USER_TIMEOUT"] <= 120_000
