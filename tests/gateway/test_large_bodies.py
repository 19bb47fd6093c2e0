"""Large bodies, honest and hostile: what they cost the event loop, the memory and others."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import gzip
import itertools
import threading
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from aiohttp import web

from gateway import request_body
from gateway.errors import Overloaded
from gateway.middleware import OPEN_REQUESTS
from gateway.observability.metrics import Metrics
from gateway.observability.request_record import RequestRecord
from gateway.request_body import HeldBodies
from gateway.request_context import RequestContext
from lab.fuzz.raw_http import RawAnswer, ask, build_request, connect, read_answer
from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.conftest import Serve, make_settings, until
from tests.gateway.process import GatewayProcess, check_blocks, serve_process
from tests.gateway.scripted_engine import whole_answer
from tests.patience import PROGRAM_S
from tests.plain_http import NO_TLS

MEGABYTE = 10**6
TEXT = "Every kernel waits for its warps; 什么是 warp?\n"
LONG_CONTEXT = Behaviour(max_model_len=2**20)


@contextlib.asynccontextmanager
async def serve_watched(
    folder: Path, engine: Behaviour, *flags: str
) -> AsyncIterator[GatewayProcess]:
    """A gateway in a process of its own, whose event loop nothing may keep for more than 50 ms."""
    blocks = folder / "blocks.jsonl"
    async with (
        serve_app(build_fake_engine(engine)) as engine_url,
        serve_process(folder, engine_url, *flags, blocks=blocks) as gateway,
    ):
        yield gateway
    check_blocks(blocks)


@pytest.fixture
async def watched(tmp_path: Path) -> AsyncIterator[GatewayProcess]:
    async with serve_watched(tmp_path, LONG_CONTEXT) as gateway:
        yield gateway


async def post(
    gateway: GatewayProcess, path: str, body: bytes, *, packed: bool = False
) -> RawAnswer:
    headers = [("Content-Type", "application/json")]
    if packed:
        headers.append(("Content-Encoding", "gzip"))
        body = await asyncio.to_thread(gzip.compress, body, 6)
    return await ask(gateway.url, build_request("POST", path, body, headers), timeout_s=60)


def fill(text: str, size: int) -> str:
    return text * (size // len(text.encode()))


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def long_chat(size: int) -> list[dict[str, str]]:
    return [user(fill(TEXT, size // 1000))] * 1000


def batch_of_texts(size: int) -> list[str]:
    return [f"{number} {fill(TEXT, size // 1000)}" for number in range(1000)]


def batch_of_ids() -> list[list[int]]:
    return [[100_000 + number for number in range(1500)]] * 1000


HONEST: dict[str, tuple[str, Callable[[], dict[str, Any]]]] = {
    "text": ("/v1/completions", lambda: {"prompt": fill(TEXT, 10 * MEGABYTE)}),
    "chat": (
        "/v1/chat/completions",
        lambda: {"messages": long_chat(10 * MEGABYTE)},
    ),
    "stream": (
        "/v1/chat/completions",
        lambda: {"messages": [*long_chat(10 * MEGABYTE), user("hi")], "stream": True},
    ),
    "texts": ("/v1/completions", lambda: {"prompt": batch_of_texts(10 * MEGABYTE)}),
    "ids": ("/v1/completions", lambda: {"prompt": batch_of_ids()}),
    "one list of ids": (
        "/detokenize",
        lambda: {"tokens": [1000 + number % 3000 for number in range(2_000_000)]},
    ),
}


@pytest.mark.programs
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
@pytest.mark.parametrize("kind", HONEST)
async def test_honest_body_of_ten_megabytes_blocks_nobody(
    watched: GatewayProcess, kind: str, packed: bool
) -> None:
    path, build = HONEST[kind]
    fields = build()
    LONG_CONTEXT.calls.clear()
    body = orjson.dumps({"model": "fake", **fields})
    assert len(body) > 9 * MEGABYTE

    answer = await post(watched, path, body, packed=packed)

    assert answer.status == 200, answer.body[:500]
    (call,) = LONG_CONTEXT.calls
    for name, value in fields.items():
        assert call[name] == value


LISTS: dict[str, Callable[[], list[Any]]] = {
    "texts": lambda: batch_of_texts(30 * MEGABYTE),
    "ids": lambda: [[100_000 + number for number in range(1900)]] * 1000,
}


@pytest.mark.programs
@pytest.mark.parametrize("is_stream", [False, True])
@pytest.mark.parametrize("kind", LISTS)
async def test_long_list_of_thirty_megabytes_by_pieces_blocks_nobody(
    tmp_path: Path, kind: str, is_stream: bool
) -> None:
    prompts = LISTS[kind]()
    engine = Behaviour(max_model_len=2**20)
    body = orjson.dumps({"model": "fake", "prompt": prompts, "max_tokens": 8, "stream": is_stream})
    async with serve_watched(tmp_path, engine, "--engine-sequences", "384") as gateway:
        engine.calls.clear()
        answer = await post(gateway, "/v1/completions", body)

    assert answer.status == 200, answer.body[:500]
    assert len(engine.calls) > 24
    sent = [one for call in engine.calls for one in call["prompt"]]
    assert sorted(sent) == sorted(prompts)
    if not is_stream:
        choices = orjson.loads(answer.body)["choices"]
        assert [one["index"] for one in choices] == list(range(1000))
        if kind == "texts":
            texts = [one["text"].strip() for one in choices]
            assert texts == [f"answer:{one}".strip() for one in prompts]


@pytest.mark.slow
@pytest.mark.parametrize("packed", [False, True], ids=["plain", "gzip"])
async def test_honest_predict_of_ten_megabytes_blocks_nobody(
    watched: GatewayProcess, packed: bool
) -> None:
    questions = [f"{number} {fill(TEXT, 1000)}" for number in range(9000)]

    body = orjson.dumps({"prompt": questions, "system": "Be short. " * 10})
    answer = await post(watched, "/predict", body, packed=packed)

    assert answer.status == 200, answer.body[:500]
    assert orjson.loads(answer.body)["response"] == [f"answer:{one}".strip() for one in questions]


def fill_list(item: bytes, size: int) -> bytes:
    return b"[" + (item + b",") * (size // (len(item) + 1)) + item + b"]"


def pairs(size: int) -> bytes:
    return b"{" + b",".join(b'"k%07d":1' % number for number in range(size // 13)) + b"}"


HOSTILE: dict[str, Callable[[], bytes]] = {
    "objects": lambda: fill_list(b"{}", 33 * MEGABYTE),
    "lists": lambda: fill_list(b"[]", 33 * MEGABYTE),
    "few enough objects": lambda: fill_list(b"{}", MEGABYTE // 2),
    "depth": lambda: b"[" * 200_000 + b"]" * 200_000,
    "numbers": lambda: fill_list(b"1", 33 * MEGABYTE),
    "long numbers": lambda: fill_list(b"1" * 5000, 30 * MEGABYTE),
    "pairs": lambda: pairs(30 * MEGABYTE),
    "few enough pairs": lambda: pairs(MEGABYTE // 2),
    "empty texts": lambda: fill_list(b'""', 33 * MEGABYTE),
    "empty texts in a list": lambda: b"[" + fill_list(b'""', 11 * MEGABYTE) + b"]",
    "escapes": lambda: b'"' + b"\\n" * (15 * MEGABYTE) + b'"',
    "half characters": lambda: b'"' + b"\\ud800" * (5 * MEGABYTE) + b'"',
    "one text": lambda: b'"' + "é".encode() * (16 * MEGABYTE) + b'"',
    "texts": lambda: fill_list(b'"' + b"a " * 2000 + b'"', 3 * MEGABYTE),
    "commas in a text": lambda: b'"' + b"{[,:" * (8 * MEGABYTE) + b'"',
    "spaces": lambda: b" " * (33 * MEGABYTE) + b"1",
    "no end": lambda: b'"' + b"a" * (33 * MEGABYTE),
    "pictures": lambda: fill_list(b'{"url":"data:a"}', 2 * MEGABYTE),
}
FIELD_OF = {
    "/predict": b"prompt",
    "/v1/completions": b"prompt",
    "/v1/chat/completions": b"messages",
    "/v1/responses": b"input",
    "/v1/messages": b"messages",
    "/v1/embeddings": b"input",
    "/tokenize": b"prompt",
    "/detokenize": b"tokens",
}


@pytest.mark.timeout(300)
@pytest.mark.slow
async def test_hostile_body_blocks_nobody_on_any_route(tmp_path: Path) -> None:
    async with serve_watched(tmp_path, Behaviour(max_model_len=2**17)) as gateway:
        memory = gateway.rss_bytes()
        await send_hostile_bodies(gateway)
        assert gateway.rss_bytes() - memory < 200 * MEGABYTE


async def send_hostile_bodies(gateway: GatewayProcess) -> None:
    relayed = itertools.cycle(list(FIELD_OF)[1:])
    for kind, build in HOSTILE.items():
        value = build()
        for path in ("/predict", next(relayed)):
            name = FIELD_OF[path]
            field = name if kind not in {"pairs", "few enough pairs"} else b"metadata"
            body = b'{"model":"fake","max_tokens":1,"stream":true,"%s":%s}' % (field, value)
            answer = await post(gateway, path, body)
            assert answer.status in {200, 400, 413, 502}, (kind, path, answer.body[:300])
            assert b"internal_error" not in answer.body, (kind, path)


@pytest.mark.programs
async def test_bomb_of_objects_is_refused_while_it_unfolds(watched: GatewayProcess) -> None:
    bomb = gzip.compress(b'{"prompt":' + fill_list(b"{}", 33 * MEGABYTE) + b"}", 9)
    assert len(bomb) < 40_000
    headers = [("Content-Type", "application/json"), ("Content-Encoding", "gzip")]
    request = build_request("POST", "/predict", bomb, headers)
    await ask(watched.url, build_request("POST", "/predict", b'{"prompt":"a"}', headers[:1]))
    memory, busy_s = watched.rss_bytes(), watched.cpu_s()

    for _ in range(10):
        answer = await ask(watched.url, request)
        assert (answer.status, orjson.loads(answer.body)["error"]["code"]) == (
            400,
            "too_many_values",
        )

    assert watched.rss_bytes() - memory < 10 * MEGABYTE
    assert (watched.cpu_s() - busy_s) / 10 < 0.05


class DeafEngine:
    """Answers looks and small calls, and reads nothing of a large one."""

    def __init__(self) -> None:
        self.deaf_to = 0

    async def talk(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := (await reader.readuntil(b"\r\n\r\n")).decode("latin-1"):
                length = int(head.lower().partition("content-length: ")[2].split("\r")[0] or 0)
                if length > MEGABYTE:
                    self.deaf_to += 1
                    reader.feed_data(b"x" * 2**18)  # so that asyncio takes no more
                    await asyncio.Event().wait()
                await reader.readexactly(length)
                writer.write(self._answer(head.split(" ")[1]))
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.transport.abort()

    def _answer(self, path: str) -> bytes:
        card = {"id": "fake", "max_model_len": 2**20}
        choice = {"index": 0, "text": "hi", "message": {"content": "hi"}, "finish_reason": "stop"}
        if path == "/v1/models":
            return whole_answer(orjson.dumps({"data": [card]}))
        return whole_answer(orjson.dumps({"choices": [choice]}))


@pytest.fixture
async def deaf_engine() -> AsyncIterator[tuple[DeafEngine, str]]:
    engine = DeafEngine()
    tasks: list[asyncio.Task[None]] = []

    async def meet(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        tasks.append(task)
        with contextlib.suppress(asyncio.CancelledError):
            await engine.talk(reader, writer)

    server = await asyncio.start_server(meet, "127.0.0.1", 0, limit=2**16)
    yield engine, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
    server.close()
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


@pytest.mark.programs
async def test_bodies_held_for_a_deaf_engine_are_bounded_and_go_with_their_callers(
    tmp_path: Path, deaf_engine: tuple[DeafEngine, str]
) -> None:
    engine, engine_url = deaf_engine
    body = orjson.dumps({"model": "fake", "prompt": [fill(TEXT, MEGABYTE)] * 20})
    request = build_request("POST", "/v1/completions", body)
    flags = ("--warmup-prompts", "1", "--max-held-bytes", str(100 * MEGABYTE))
    async with (
        serve_process(tmp_path, engine_url, *flags) as gateway,
        httpx.AsyncClient(base_url=gateway.url, verify=NO_TLS) as client,
    ):
        memory = gateway.rss_bytes()
        callers = [asyncio.create_task(ask(gateway.url, request, timeout_s=60)) for _ in range(24)]
        await until(lambda: engine.deaf_to + sum(one.done() for one in callers) == 24, 60)

        refused = [one.result() for one in callers if one.done()]
        assert engine.deaf_to == 4  # of the 87.5 MB that large ones may take
        assert {one.status for one in refused} == {429}
        assert {orjson.loads(one.body)["error"]["code"] for one in refused} == {"too_many_bodies"}
        assert all("retry-after" in one.headers for one in refused)
        assert await _held_bytes(client) == 4 * len(body)
        assert gateway.rss_bytes() - memory < 200 * MEGABYTE
        # Small ones pass all the while.
        chat = await client.post("/v1/chat/completions", json={"model": "fake", "messages": []})
        assert chat.status_code == 200
        # One that is announced is not read first.
        head, _, _ = request.partition(b"\r\n\r\n")
        assert (await ask(gateway.url, head + b"\r\n\r\n", timeout_s=60)).status == 429

        for caller in callers:
            caller.cancel()
        await asyncio.gather(*callers, return_exceptions=True)
        await until(lambda: _is_empty(client))
        await until(lambda: gateway.rss_bytes() - memory < 20 * MEGABYTE)
        assert (await client.get("/readyz")).status_code == 200


async def test_body_that_is_announced_waits_for_room_and_is_read_then(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(request_body, "_LONGEST_WAIT_S", 60.0)
    body = orjson.dumps({"model": "fake", "prompt": "x" * 3 * MEGABYTE})
    request = build_request("POST", "/v1/completions", body)
    async with serve(max_held_bytes=4 * MEGABYTE, max_bytes_per_token=10_000) as served:
        async with connect(served.url) as (_, writer):
            writer.write(request[:-1])
            await until(lambda: _is_held(served.client, len(body) - 1))
            waiting = [asyncio.create_task(ask(served.url, request)) for _ in range(3)]
            is_there = served.app[OPEN_REQUESTS]
            await until(lambda: is_there.count == 4 or any(one.done() for one in waiting))
        answers = await asyncio.gather(*waiting)

    assert [one.status for one in answers] == [200, 200, 200]
    assert len(served.engine.calls) == 3


async def _wait(bodies: HeldBodies, size: int) -> RequestContext:
    context = RequestContext("", RequestRecord(""))
    await bodies.wait_for_room(context, size)
    bodies.hold(context, size)
    return context


async def test_all_for_whom_there_is_room_go_on_at_once_and_few_wait(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(request_body, "_LONGEST_WAIT_S", 3600.0)
    monkeypatch.setattr(request_body, "_MOST_WAITING", 16)
    bodies = HeldBodies(make_settings(max_held_bytes=100 * MEGABYTE), Metrics())
    first = await _wait(bodies, 87 * MEGABYTE)
    sizes = [86, 10, 10, 10] + [50] * 12
    waiting = [asyncio.create_task(_wait(bodies, size * MEGABYTE)) for size in sizes]
    await asyncio.sleep(0)
    with pytest.raises(Overloaded):
        await _wait(bodies, MEGABYTE)  # the seventeenth

    waiting[1].cancel()  # just before it would be its turn
    bodies.release(first, 80 * MEGABYTE)  # not for the one that has waited longest
    await asyncio.wait(waiting[2:4])
    await asyncio.wait({waiting[4]})
    assert [one.done() for one in waiting] == [False, True, True, True, True] + [False] * 11
    for one in waiting:
        one.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)


async def _is_held(client: httpx.AsyncClient, size: int) -> bool:
    return await _held_bytes(client) == size


async def _held_bytes(client: httpx.AsyncClient) -> float:
    text = (await client.get("/metrics")).text
    return float(text.partition("\ngateway_held_body_bytes ")[2].partition("\n")[0])


async def _is_empty(client: httpx.AsyncClient) -> bool:
    return await _held_bytes(client) == 0


async def test_stream_holds_its_body_no_longer_than_its_first_byte(serve: Serve) -> None:
    async with serve(max_held_bytes=200_000) as served:
        served.engine.stream_gap_s = 0.05
        long = [user("x " * 40), user("a long answer")]
        body = {"model": "fake", "messages": long, "stream": True}
        async with served.client.stream("POST", "/v1/chat/completions", json=body) as answer:
            async for _ in answer.aiter_lines():
                break
            assert await _held_bytes(served.client) == 0


async def test_stream_keeps_no_body_that_it_no_longer_holds(serve: Serve) -> None:
    async with serve(max_bytes_per_token=1000) as served:
        served.engine.stream_gap_s = 0.05
        fields = {"model": "fake", "messages": [user("x" * 50_000)], "stream": True}
        body = orjson.dumps(fields)
        reader, writer = await asyncio.open_connection("127.0.0.1", httpx.URL(served.url).port)
        writer.write(
            build_request("POST", "/v1/chat/completions", body)
        )  # at once, as small ones come
        await reader.readuntil(b"data: ")

        # Of the gateway and of the engine, which is in this process, too, and keeps its own.
        kept = [one._read_bytes for one in gc.get_objects() if isinstance(one, web.Request)]
        assert kept.count(body) == 0
        assert sum(map(bool, kept)) == 1
        writer.close()
        await writer.wait_closed()


async def test_media_at_the_end_of_a_large_body_are_looked_at_too(serve: Serve) -> None:
    picture = {"type": "image_url", "image_url": {"url": "http://127.0.0.1:8001/metrics"}}
    turns = [*long_chat(MEGABYTE), {"role": "user", "content": [picture]}]
    async with serve(max_bytes_per_token=10_000) as served:
        body = {"model": "fake", "messages": turns}
        answer = await served.client.post("/v1/chat/completions", json=body)

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "media_refused")
    assert served.engine.calls == []


async def test_memory_goes_back_beside_the_event_loop_once_for_many_bodies(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    returned: list[int] = []
    monkeypatch.setattr(request_body, "_SETTLED_S", 0.0)
    monkeypatch.setattr(
        request_body, "return_freed_memory", lambda: returned.append(threading.get_ident())
    )
    bodies = HeldBodies(make_settings(), Metrics())
    for _ in range(3):
        context = RequestContext("", RequestRecord(""))
        bodies.hold(context, 40 * MEGABYTE)
        bodies.release(context)
    await until(lambda: returned)
    await asyncio.sleep(0)  # whatever else was to come is due by now

    assert len(returned) == 1
    assert threading.get_ident() not in returned


# --- what follows a refusal on its connection


def announce(size: int) -> bytes:
    headers = [("Content-Type", "application/json"), ("Content-Length", str(size))]
    return build_request("POST", "/v1/completions", b"", headers, is_sized=False)


async def test_what_follows_a_refusal_is_hardly_read(tmp_path: Path) -> None:
    """Of callers who send on until they see their answer: a gigabyte a second, once."""
    rounds = 20
    async with (
        serve_app(build_fake_engine(Behaviour())) as engine_url,
        serve_process(tmp_path, engine_url) as gateway,
    ):
        empty = gateway.read_bytes()
        await post(gateway, "/v1/completions", bytes(MEGABYTE))
        before, began = gateway.read_bytes(), time.monotonic()
        assert before - empty > MEGABYTE  # what it reads is seen there
        for _ in range(rounds):
            async with connect(gateway.url) as (reader, writer):
                writer.write(announce(100 * MEGABYTE))
                sending = asyncio.create_task(send_on(writer))
                answer = await read_answer(reader)
                sending.cancel()
                assert answer is not None
                assert answer.status == 413
        read = gateway.read_bytes() - before

    paced = 50 * MEGABYTE * (time.monotonic() - began)
    assert read < rounds * MEGABYTE + paced


async def send_on(writer: asyncio.StreamWriter) -> None:
    with contextlib.suppress(ConnectionError):
        while True:
            writer.write(bytes(2**18))
            await writer.drain()


@pytest.mark.parametrize("closes", [False, True], ids=["keeps", "closes their half"])
async def test_who_sends_all_of_a_refused_body_first_reads_the_answer(
    serve: Serve, closes: bool
) -> None:
    size = 20 * MEGABYTE
    async with (
        serve(Behaviour(), max_body_bytes=MEGABYTE) as served,
        connect(served.url) as (reader, writer),
    ):
        writer.write(announce(size) + bytes(size))
        if closes:
            writer.write_eof()
        await asyncio.wait_for(writer.drain(), PROGRAM_S)
        answer = await read_answer(reader)
        assert answer is not None
        assert answer.status == 413
        if closes:
            assert await reader.read() == b""
        else:
            writer.write(build_request("GET", "/healthz"))
            next_answer = await read_answer(reader, "GET")
            assert next_answer is not None
            assert next_answer.status == 200
