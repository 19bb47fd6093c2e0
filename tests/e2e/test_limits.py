"""What one caller may take of the real engine, and what they are charged for it."""

from __future__ import annotations

import asyncio
import random
import re
from collections.abc import AsyncIterator
from typing import Any

import httpx
import orjson
import pytest

from tests.e2e.conftest import Stack
from tests.plain_http import NO_TLS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

_WAITING = re.compile(r'^gateway_waiting_sequences\{lane="batch"\} (\S+)$', re.MULTILINE)
_RUNNING = re.compile(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", re.MULTILINE)
_CALLS = re.compile(r'^http_requests_total\{handler="/v1/completions",.*\} (\S+)$', re.MULTILINE)
_TURN = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"
USER = [{"role": "user", "content": "什么是 warp？"}]
LONG: dict[str, Any] = {"model": "demo", "messages": USER, "max_tokens": 1900, "ignore_eos": True}


@pytest.fixture
async def gateway(stack: Stack) -> AsyncIterator[httpx.AsyncClient]:
    async with httpx.AsyncClient(base_url=stack.gateway, timeout=200, verify=NO_TLS) as client:
        yield client


async def _read(pattern: re.Pattern[str], url: str) -> float:
    async with httpx.AsyncClient(verify=NO_TLS) as client:
        text = (await client.get(f"{url}/metrics")).text
    return sum(map(float, pattern.findall(text)))


async def _wait_idle(stack: Stack) -> None:
    async with asyncio.timeout(60):
        while await _read(_RUNNING, stack.engine):  # noqa: ASYNC110 — it has no event for this
            await asyncio.sleep(0.05)


async def _read_given(gateway: httpx.AsyncClient) -> int:
    usage = (await gateway.get("/usage")).json()["keys"]
    return sum(row["completion_tokens"] for row in usage.values())


def _make_prompts(pairs: list[dict[str, str]], count: int) -> list[str]:
    """No two alike, and none that another test has asked."""
    salt = random.randrange(10**9)
    return [f"{pairs[n % len(pairs)]['question']} ({salt}-{n})" for n in range(count)]


async def test_chat_is_answered_while_most_of_a_large_batch_has_not_entered_yet(
    stack: Stack, gateway: httpx.AsyncClient, pairs: list[dict[str, str]]
) -> None:
    await _wait_idle(stack)
    size = 2000
    body = {"prompt": _make_prompts(pairs, size), "max_tokens": 24, "temperature": 0}
    batch = asyncio.create_task(gateway.post("/predict", json=body))
    async with asyncio.timeout(60):
        while not await _read(_RUNNING, stack.engine):  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    asked = {"model": "demo", "messages": USER, "max_tokens": 4}
    chat = await gateway.post("/v1/chat/completions", json=asked)
    waiting = await _read(_WAITING, stack.gateway)

    assert chat.status_code == 200
    assert waiting > size / 2
    answer = (await batch).json()
    assert len(answer["response"]) == size
    assert all(answer["response"])


async def test_batch_of_the_course_is_one_call_of_the_engine(
    stack: Stack, gateway: httpx.AsyncClient, pairs: list[dict[str, str]]
) -> None:
    await _wait_idle(stack)
    before = await _read(_CALLS, stack.engine)

    answer = await gateway.post(
        "/predict", json={"prompt": _make_prompts(pairs, 358), "max_tokens": 8}
    )

    assert len(answer.json()["response"]) == 358
    async with asyncio.timeout(60):  # the engine counts a call once its answer has left
        while (calls := await _read(_CALLS, stack.engine)) == before:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    assert calls == before + 1


@pytest.mark.parametrize("is_stream", [False, True])
async def test_chats_are_answered_while_most_of_a_long_list_has_not_entered_yet(
    stack: Stack, gateway: httpx.AsyncClient, pairs: list[dict[str, str]], is_stream: bool
) -> None:
    await _wait_idle(stack)
    prompts = [_TURN.format(pairs[n % len(pairs)]["question"]) for n in range(1000)]
    fields = {"model": "demo", "max_tokens": 24, "temperature": 0}
    before = await _read_given(gateway)
    body = fields | {"prompt": prompts, "stream": is_stream}
    asking = asyncio.create_task(gateway.post("/v1/completions", json=body))
    async with asyncio.timeout(60):
        while not await _read(_RUNNING, stack.engine):  # noqa: ASYNC110
            await asyncio.sleep(0.01)

    waiting = []
    for _ in range(2):
        chat = await gateway.post(
            "/v1/chat/completions", json={"model": "demo", "messages": USER, "max_tokens": 4}
        )
        assert chat.status_code == 200
        waiting.append(await _read(_WAITING, stack.gateway))

    assert waiting[0] > 0
    texts = _read_texts(await asking, is_stream=is_stream)
    assert sorted(texts) == list(range(1000))
    given = await _read_given(gateway) - before - 8
    assert 1000 < given <= 24_000
    for n in range(0, len(pairs), len(pairs) // 8):
        one = await gateway.post("/v1/completions", json=fields | {"prompt": prompts[n]})
        alone = one.json()["choices"][0]["text"]
        assert alone
        assert all(texts[place] == alone for place in range(n, 1000, len(pairs)))


def _read_texts(answer: httpx.Response, *, is_stream: bool) -> dict[int, str]:
    if not is_stream:
        return {one["index"]: one["text"] for one in answer.json()["choices"]}
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    texts: dict[int, str] = {}
    for event in events:
        [choice] = orjson.loads(event.removeprefix("data: "))["choices"]
        texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return texts


@pytest.mark.parametrize("route", ["chat", "completions"])
async def test_stream_of_large_chunks_left_in_the_middle_is_charged_by_its_tokens(
    stack: Stack, gateway: httpx.AsyncClient, route: str
) -> None:
    await _wait_idle(stack)
    before = await _read_given(gateway)
    path = "/v1/chat/completions" if route == "chat" else "/v1/completions"
    body = LONG | {"stream": True, "stream_interval": 400}
    if route == "completions":
        body |= {"prompt": "CUDA"}
        del body["messages"]
    seen = b""
    async with gateway.stream("POST", path, json=body) as answer:
        async for chunk in answer.aiter_bytes():
            seen += chunk
            if seen.count(b"data: ") >= 4:
                break
    await _wait_idle(stack)

    assert b"usage" not in seen  # it came with each chunk, and nobody had asked for it
    assert await _read_given(gateway) - before >= 801 - (route == "chat") * 400


async def test_whole_answer_left_in_the_middle_is_charged_for_its_time(
    stack: Stack, gateway: httpx.AsyncClient
) -> None:
    await _wait_idle(stack)
    taught = await gateway.post("/v1/chat/completions", json=LONG | {"max_tokens": 100})
    assert orjson.loads(taught.content)["usage"]["completion_tokens"] == 100
    before = await _read_given(gateway)

    call = asyncio.create_task(gateway.post("/v1/chat/completions", json=LONG))
    async with asyncio.timeout(60):
        while not await _read(_RUNNING, stack.engine):  # noqa: ASYNC110
            await asyncio.sleep(0.01)
    await asyncio.sleep(0.2)  # so long that it makes some tokens
    call.cancel()
    await _wait_idle(stack)

    assert 0 < await _read_given(gateway) - before <= 1900
