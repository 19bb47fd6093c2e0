"""A caller who hangs up frees the engine at once: seen in the engine's own figures.

The verdict is in tokens, not in seconds: what is left soon costs the engine a small part of what it
would have made, however slow the two of them are at that time.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import re
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import openai
import orjson
import pytest

from lab.fuzz.raw_http import build_request, connect
from tests.e2e.clients import KINDS, Kind, open_sdk
from tests.e2e.conftest import Stack
from tests.plain_http import NO_TLS

pytestmark = [pytest.mark.engine, pytest.mark.timeout(300)]

USER = [{"role": "user", "content": "什么是 warp？"}]
WHOLE = 1900
LONG: dict[str, Any] = {"model": "demo", "max_tokens": WHOLE, "extra_body": {"ignore_eos": True}}
_RUNNING = re.compile(r"^vllm:num_requests_(?:running|waiting)\{.*\} (\S+)$", re.MULTILINE)
_MADE = re.compile(r"^vllm:generation_tokens_total\{.*\} (\S+)$", re.MULTILINE)


@dataclass
class EngineFigures:
    client: httpx.AsyncClient
    made_before: int = 0

    async def count(self) -> tuple[int, int]:
        """Sequences that it runs or has waiting, and tokens that it has made."""
        text = (await self.client.get("/metrics")).text
        running = sum(int(float(value)) for value in _RUNNING.findall(text))
        return running, sum(int(float(value)) for value in _MADE.findall(text))

    async def wait(self, *, is_busy: bool) -> int:
        """Until it works, or no longer does; the tokens made by then."""
        async with asyncio.timeout(60):
            while True:
                now, made = await self.count()
                if bool(now) == is_busy:
                    return made
                await asyncio.sleep(0.01)

    async def ensure_freed(self, most: int = WHOLE // 2) -> None:
        """With `WHOLE` tokens a sequence would have come to its end by itself."""
        made = await self.take_made()
        assert made < most, f"{made} tokens were made for who had gone"

    async def take_made(self) -> int:
        """When it no longer works: the tokens made since this was last asked."""
        made = await self.wait(is_busy=False)
        since, self.made_before = made - self.made_before, made
        return since


@pytest.fixture
async def engine(stack: Stack) -> AsyncIterator[EngineFigures]:
    async with httpx.AsyncClient(base_url=stack.engine, timeout=60, verify=NO_TLS) as client:
        figures = EngineFigures(client)
        figures.made_before = await figures.wait(is_busy=False)
        yield figures


async def _hang_up(engine: EngineFigures, call: Awaitable[Any]) -> None:
    """Asks, and hangs up as soon as the engine works on it."""
    asking = asyncio.ensure_future(call)
    await engine.wait(is_busy=True)

    asking.cancel()

    with pytest.raises(asyncio.CancelledError):
        await asking


async def _ensure_freed_once(engine: EngineFigures, leave: Callable[[], Any], whole: int) -> None:
    """`whole` tokens are soon made: a busy machine may have made them before a hang-up arrives
    there. An engine that is not told makes all of them each time.
    """
    made = []
    for _ in range(5):
        await leave()
        made.append(await engine.take_made())
        if made[-1] < whole // 2:
            return
    pytest.fail(f"{made} of {whole} tokens were made for who had gone")


@pytest.mark.parametrize("kind", KINDS)
async def test_stream_left_in_the_middle_frees_the_engine(
    stack: Stack, engine: EngineFigures, kind: Kind
) -> None:
    async with open_sdk(kind, stack.gateway) as sdk:
        stream = await sdk.ask(
            lambda client: client.chat.completions.create(messages=USER, stream=True, **LONG)
        )
        if sdk.is_sync:
            await asyncio.to_thread(lambda: [next(stream) for _ in range(5)])
        else:
            [await anext(stream) for _ in range(5)]
        await engine.wait(is_busy=True)

        await sdk.ask(lambda _: stream.close())

        await engine.ensure_freed()


async def test_stream_left_before_its_first_token_frees_the_engine(
    stack: Stack, engine: EngineFigures
) -> None:
    """Left ever later until it is before the first chunk, but not before the engine knows of it."""
    body = LONG["extra_body"] | {"model": "demo", "messages": USER, "max_tokens": WHOLE}
    request = build_request("POST", "/v1/chat/completions", orjson.dumps(body | {"stream": True}))
    has_left_in_time = False  # or the test never ends
    async with httpx.AsyncClient(base_url=stack.gateway, verify=NO_TLS) as gateway:
        number = 0
        while not has_left_in_time or number < 20:
            number += 1
            gone, begun = await _read_figures(gateway)
            async with connect(stack.gateway) as (_, writer):
                writer.write(request)
                await asyncio.sleep(0.002 * (1 + number % 5))

            await engine.ensure_freed()
            gone_then, begun_then = await _read_figures(gateway)
            has_left_in_time |= gone_then == gone + 1 and begun_then == begun


async def _read_figures(gateway: httpx.AsyncClient) -> tuple[int, int]:
    """Chats whose callers hung up, and those whose first chunk came."""
    text = (await gateway.get("/metrics")).text
    route = 'route="/v1/chat/completions"'
    figures = []
    for name in (
        f'requests_total{{{route},status="499"}}',
        f"first_chunk_seconds_count{{{route}}}",
    ):
        found = re.search(rf"^gateway_{re.escape(name)} (\S+)", text, re.MULTILINE)
        figures.append(int(float(found[1])) if found else 0)
    return figures[0], figures[1]


@pytest.mark.parametrize("route", ["chat", "completions", "responses"])
async def test_whole_answer_left_frees_the_engine(
    stack: Stack, engine: EngineFigures, route: str
) -> None:
    async with open_sdk("async", stack.gateway) as sdk:
        calls: dict[str, Callable[[], Awaitable[Any]]] = {
            "chat": lambda: sdk.client.chat.completions.create(messages=USER, **LONG),
            "completions": lambda: sdk.client.completions.create(prompt="CUDA", **LONG),
            "responses": lambda: sdk.client.responses.create(
                model="demo",
                input="CUDA",
                max_output_tokens=WHOLE,
                extra_body={"ignore_eos": True},
            ),
        }
        await _hang_up(engine, calls[route]())
        await engine.ensure_freed()


async def test_sync_callers_timeout_frees_the_engine(stack: Stack, engine: EngineFigures) -> None:
    """A sync caller hangs up by their own deadline; there is no other way."""
    async with open_sdk("sync", stack.gateway, timeout_s=1.0) as sdk:
        asking = asyncio.ensure_future(
            sdk.ask(lambda client: client.chat.completions.create(messages=USER, **LONG))
        )
        await engine.wait(is_busy=True)
        try:
            answer = await asking
        except openai.APITimeoutError:
            pass
        else:
            pytest.fail(f"answered in time: {answer}")

        await engine.ensure_freed(most=WHOLE)


@pytest.mark.parametrize("lane", ["interactive", "batch"])
async def test_predict_left_frees_the_engine(
    stack: Stack, engine: EngineFigures, lane: str
) -> None:
    prompts = [f"{number} Q" for number in range(20)]
    # So much chance that few end by themselves: half of it must be long for a busy machine, too.
    body = {"prompt": prompts, "max_tokens": 900, "temperature": 2.0, "seed": 1}
    async with httpx.AsyncClient(base_url=stack.gateway, timeout=60, verify=NO_TLS) as client:
        ask = functools.partial(client.post, "/predict", json=body, headers={"X-Priority": lane})
        await ask()
        whole = await engine.take_made()
        await _ensure_freed_once(engine, lambda: _hang_up(engine, ask()), whole)


async def test_sync_predict_left_frees_the_engine(stack: Stack, engine: EngineFigures) -> None:
    prompts = [f"{number} Q" for number in range(100)]
    body = {"prompt": prompts, "temperature": 1.5, "max_tokens": 900, "seed": 1}
    ask = functools.partial(httpx.post, f"{stack.gateway}/predict", json=body, verify=NO_TLS)
    await asyncio.to_thread(ask, timeout=300)
    whole = await engine.take_made()

    async def leave() -> None:
        with contextlib.suppress(httpx.ReadTimeout):
            await asyncio.to_thread(ask, timeout=0.3)

    await _ensure_freed_once(engine, leave, whole)
