"""That a wrong answer is found, whoever else is there, and that a gateway gives none."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

import pytest

from lab.bench.answer_book import MixedUp
from lab.bench.relay import numbered, stand_in_engine
from lab.bench.relay.stand_in_engine import EngineProtocol, find_number
from lab.reports.console import ProgressLine


@contextlib.asynccontextmanager
async def serve_engine() -> AsyncIterator[int]:
    EngineProtocol.lost.clear()
    loop = asyncio.get_running_loop()
    server = await loop.create_server(EngineProtocol, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


async def ask(layout: str, answers: int) -> None:
    async with serve_engine() as port:
        await numbered.run_layout(layout, port, answers, ProgressLine())


async def try_number(port: int, path: bytes, is_stream: bool) -> bytes:
    """The first line of the answer to a call that is lost once, or nothing."""
    body = b'{"prompt":["lose number-7."]%s}' % (b',"stream":true' if is_stream else b"")
    head = b"POST %s HTTP/1.1\r\nContent-Length: %d\r\n\r\n" % (path, len(body))
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(head + body)
        return (await reader.readline()).strip()
    except ConnectionError:
        return b""
    finally:
        writer.close()


@pytest.mark.parametrize("layout", ["chat", "stream"])
async def test_one_answer_that_is_anothers_is_found(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(numbered, "_CALLERS", {numbered.wait_for_answers: 8})
    await ask(layout, 100)

    def swap_one(data: bytes) -> int:
        number = find_number(data)
        return 51 if number == 50 else number

    monkeypatch.setattr(stand_in_engine, "find_number", swap_one)
    with pytest.raises(ExceptionGroup) as found:
        await ask(layout, 100)
    assert found.value.subgroup(MixedUp) is not None
    assert "50" in str(found.value.exceptions[0])


async def test_first_try_is_lost_of_each_way_to_ask() -> None:
    ways = [(b"/v1/chat/completions", False), (b"/v1/chat/completions", True)]
    ways.append((b"/v1/completions", False))
    async with serve_engine() as port:
        tries = [await try_number(port, *way) for way in (*ways, *ways)]

    assert tries == [b"", b"", b"", *[b"HTTP/1.1 200 OK"] * 3]


@pytest.mark.programs
def test_gateway_gives_each_caller_their_own(capfd: pytest.CaptureFixture[str]) -> None:
    assert numbered.main(["--answers", "400"]) == 0

    out, err = capfd.readouterr()
    assert [line.partition(":")[0].split()[0] for line in (out + err).splitlines()] == [
        "chat",
        "stream",
        "predict",
    ]
    assert (out + err).count("0 wrong") == 3
    for kind in ("hung up", "slowly read", "after a lost try"):
        assert kind in out + err


def test_layout_that_is_none_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        numbered.main(["--only", "chat,chats"])
    assert end.value.code == 2
    assert "there is no chats" in capsys.readouterr().err
