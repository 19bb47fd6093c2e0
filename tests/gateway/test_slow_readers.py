"""Callers who take a byte a second from streams that could run at any speed."""

from __future__ import annotations

import asyncio
import socket
import statistics
import time
from pathlib import Path

import httpx
import orjson
import pytest

from lab.fuzz.raw_http import address, build_request
from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.conftest import until
from tests.gateway.process import GatewayProcess, serve_process
from tests.plain_http import NO_TLS

pytestmark = pytest.mark.programs

READERS = 200
READING_S = 12
# Of the gateway's own memory, and of all that lies between engine and reader, the kernel's too.
MOST_MEMORY_BYTES = 512 * 1024
MOST_HELD_BYTES = 1536 * 1024
# Of other callers' median time; the machine's own noise is taken from before and after.
MOST_SLOWER = 1.5
SLACK_S = 0.001
PROBES = 300


@pytest.mark.timeout(300)
@pytest.mark.slow
async def test_slow_readers_take_little_memory_and_slow_nobody(tmp_path: Path) -> None:
    engine = Behaviour(floods=lambda question: question == "flood")
    async with (
        serve_app(build_fake_engine(engine)) as engine_url,
        serve_process(tmp_path, engine_url) as gateway,
        httpx.AsyncClient(base_url=gateway.url, verify=NO_TLS) as client,
    ):
        await _median_s(client)  # the first calls fill caches
        before_s = await _median_s(client)
        before = gateway.rss_bytes()
        readers = [asyncio.create_task(_read_slowly(gateway.url)) for _ in range(READERS)]
        await until(lambda: engine.running == READERS, timeout_s=30)
        await asyncio.sleep(2)  # until every buffer on the way is full
        during_s = await _median_s(client)
        held = engine.flooded_bytes
        taken, most = await _watch(gateway, readers)
        await until(lambda: engine.running == 0)
        after_s = await _median_s(client)

    figures = (
        f"{(most - before) // READERS // 1024} KiB of memory and {held // READERS // 1024} KiB in "
        f"all a reader; median of others {before_s * 1e3:.2f} ms before, {during_s * 1e3:.2f} "
        f"during, {after_s * 1e3:.2f} after"
    )
    assert all(READING_S / 2 < one <= READING_S + 1 for one in taken)
    assert most - before <= READERS * MOST_MEMORY_BYTES, figures
    assert held <= READERS * MOST_HELD_BYTES, figures
    assert during_s <= max(before_s, after_s) * MOST_SLOWER + SLACK_S, figures


async def _read_slowly(url: str, pause_s: float = 1) -> int:
    """How many bytes were taken, one at a time; then hangs up."""
    body = {"model": "fake", "stream": True, "messages": [{"role": "user", "content": "flood"}]}
    loop = asyncio.get_running_loop()
    taken = 0
    with socket.socket() as slow:
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.setblocking(False)
        await loop.sock_connect(slow, address(url))
        request = build_request("POST", "/v1/chat/completions", orjson.dumps(body))
        await loop.sock_sendall(slow, request)
        for _ in range(READING_S):
            taken += len(await loop.sock_recv(slow, 1))
            await asyncio.sleep(pause_s)
    return taken


async def _watch(
    gateway: GatewayProcess, readers: list[asyncio.Task[int]]
) -> tuple[list[int], int]:
    """What the readers took, and the most memory that the gateway had meanwhile."""
    most = 0
    while not all(reader.done() for reader in readers):
        most = max(most, gateway.rss_bytes())
        await asyncio.sleep(0.1)
    return [reader.result() for reader in readers], most


async def _median_s(client: httpx.AsyncClient) -> float:
    times = []
    for number in range(PROBES):
        started = time.perf_counter()
        answer = await client.post("/predict", json={"prompt": f"#{number}#"})
        times.append(time.perf_counter() - started)
        assert answer.json() == {"response": f"answer:#{number}#"}
    return statistics.median(times)


async def test_readers_who_take_nothing_lose_their_sockets(tmp_path: Path) -> None:
    """A plain close would wait for ever until they have taken what was written."""
    engine = Behaviour(floods=lambda question: question == "flood")
    async with (
        serve_app(build_fake_engine(engine)) as engine_url,
        serve_process(tmp_path, engine_url, "--client-write-timeout-s", "0.5") as gateway,
    ):
        before = gateway.count_sockets()
        readers = [asyncio.create_task(_read_slowly(gateway.url, pause_s=60)) for _ in range(20)]
        await until(lambda: engine.running == len(readers))

        await until(lambda: engine.running == 0)

        await until(lambda: gateway.count_sockets() <= before)
        await until(lambda: gateway.read_log().count('"status":499') == len(readers))
        for reader in readers:
            reader.cancel()
        await asyncio.gather(*readers, return_exceptions=True)
    assert "Traceback" not in gateway.read_log()


async def test_reader_who_takes_nothing_of_a_whole_answer_loses_his_socket(tmp_path: Path) -> None:
    async with (
        serve_app(build_fake_engine(Behaviour(max_model_len=10_000))) as engine_url,
        serve_process(tmp_path, engine_url, "--client-write-timeout-s", "0.5") as gateway,
        httpx.AsyncClient(base_url=gateway.url, verify=NO_TLS) as client,
    ):
        with await _ask_for_much(gateway.url, 1000) as idle:
            await until(lambda: _is_served(idle))

            # Far below what an idle connection is kept for.
            await until(lambda: not _is_served(idle), timeout_s=20)
        answer = await client.post("/predict", json={"prompt": "still here?"})
    assert answer.json() == {"response": "answer:still here?"}
    assert "Traceback" not in gateway.read_log()


@pytest.mark.slow
async def test_reader_who_is_slow_but_steady_gets_all(tmp_path: Path) -> None:
    """Many times the limit in all, never without taking something."""
    async with (
        serve_app(build_fake_engine(Behaviour(max_model_len=10_000))) as engine_url,
        serve_process(tmp_path, engine_url, "--client-write-timeout-s", "2") as gateway,
    ):
        loop, got = asyncio.get_running_loop(), bytearray()
        with await _ask_for_much(gateway.url, 100) as slow:
            started = time.monotonic()
            while not got.endswith(b"}"):
                got += await asyncio.wait_for(loop.sock_recv(slow, 4096), 5)
                await asyncio.sleep(0.08)
            took_s = time.monotonic() - started
    answers = orjson.loads(got.partition(b"\r\n\r\n")[2])["response"]
    assert answers == [f"answer:{question}" for question in _list_long(100)]
    assert took_s > 6


async def _ask_for_much(url: str, count: int) -> socket.socket:
    """A caller with little room for the long answers that they have asked for."""
    loop, caller = asyncio.get_running_loop(), socket.socket()
    caller.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    caller.setblocking(False)
    await loop.sock_connect(caller, address(url))
    body = orjson.dumps({"prompts": _list_long(count)})
    await loop.sock_sendall(caller, build_request("POST", "/predict", body))
    return caller


def _is_served(caller: socket.socket) -> bool:
    """Is the other end of their connection still there? Established is 01."""
    ends = [f"0100007F:{name[1]:04X}" for name in (caller.getpeername(), caller.getsockname())]
    lines = Path("/proc/net/tcp").read_text(encoding="ascii").splitlines()
    return any(line.split()[1:4] == [*ends, "01"] for line in lines)


def _list_long(count: int) -> list[str]:
    return [f"#{number}#" + "x" * 4000 for number in range(count)]
