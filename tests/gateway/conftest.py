"""A gateway and its engine on real ports of the loopback."""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import httpx
import pytest
from aiohttp import web

from gateway.app import build_app
from gateway.config import Settings
from gateway.engines.pool import POOL
from gateway.server import Runner
from tests.fair_clock import FairLoop
from tests.fake_engine import MODEL_FOLDER, Behaviour, build_fake_engine, serve_app
from tests.plain_http import NO_TLS


@dataclass
class Served:
    """A running gateway, a client for it, and the engine's strings to pull."""

    url: str
    client: httpx.AsyncClient
    app: web.Application
    engine: Behaviour
    engine_url: str
    others: tuple[Behaviour, ...] = ()

    @property
    def all_engines(self) -> tuple[Behaviour, ...]:
        return (self.engine, *self.others)

    async def chat(self, content: str, **fields: object) -> httpx.Response:
        messages = [{"role": "user", "content": content}]
        body = {"model": "fake", "messages": messages, **fields}
        return await self.client.post("/v1/chat/completions", json=body)

    async def predict(self, prompt: object, **fields: object) -> httpx.Response:
        return await self.client.post("/predict", json={"prompt": prompt, **fields})


def pytest_asyncio_loop_factories() -> dict[str, Callable[[], asyncio.AbstractEventLoop]]:
    return {"fair": FairLoop}


Serve = Callable[..., contextlib.AbstractAsyncContextManager[Served]]


@pytest.fixture(autouse=True)
def _clean_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("GATEWAY_"):
            monkeypatch.delenv(name)


def make_settings(**fields: Any) -> Settings:
    defaults: dict[str, Any] = {
        "tokenizer": MODEL_FOLDER,
        "warmup_prompts": 2,
        "probe_interval_s": 0.05,
        "root_hold_s": 0.2,
        "restart_hold_s": 0.3,
        "port": 0,
        "reload_interval_s": 0.05,
        "breaker_pause_s": 0.3,
    }
    return Settings(**(defaults | fields))


@contextlib.asynccontextmanager
async def serve_gateway(
    engine: Behaviour | None = None,
    *others: Behaviour,
    wait_ready: bool = True,
    reload: Callable[[], Settings] | None = None,
    port: int = 0,
    **settings: Any,
) -> AsyncIterator[Served]:
    engines = (engine or Behaviour(), *others)
    async with contextlib.AsyncExitStack() as stack:
        urls = [await stack.enter_async_context(serve_app(build_fake_engine(e))) for e in engines]
        options = make_settings(**({"engines": tuple(urls)} | settings))
        app = build_app(options, reload or (lambda: options))
        url = await stack.enter_async_context(serve_app(app, port, Runner(app, options)))
        client = await stack.enter_async_context(
            httpx.AsyncClient(base_url=url, timeout=60, verify=NO_TLS)
        )
        served = Served(url, client, app, engines[0], urls[0], engines[1:])
        if wait_ready:
            await until(lambda: all(one.is_usable for one in app[POOL].engines))
            for one in engines:
                one.calls.clear()
                one.headers.clear()
        yield served


async def until(condition: Callable[[], Any], timeout_s: float = 150.0) -> None:
    """Polls a condition, plain or awaitable, until it holds."""
    async with asyncio.timeout(timeout_s):
        while True:
            holds = condition()
            if asyncio.iscoroutine(holds):
                holds = await holds
            if holds:
                return
            await asyncio.sleep(0.01)


@pytest.fixture
def serve() -> Serve:
    return serve_gateway


@pytest.fixture
async def served() -> AsyncIterator[Served]:
    async with serve_gateway() as running:
        yield running
