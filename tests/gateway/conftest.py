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
from tests.fake_engine import MODEL_FOLDER, Behaviour, build_fake_engine, serve_app


@dataclass
class Served:
    """A running gateway, a client for it, and the engine's strings to pull."""

    url: str
    client: httpx.AsyncClient
    app: web.Application
    engine: Behaviour
    engine_url: str

    async def predict(self, prompt: object, **fields: object) -> httpx.Response:
        return await self.client.post("/predict", json={"prompt": prompt, **fields})


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
    }
    return Settings(**(defaults | fields))


@contextlib.asynccontextmanager
async def serve_gateway(
    engine: Behaviour | None = None, *, wait_ready: bool = True, **settings: Any
) -> AsyncIterator[Served]:
    engine = engine or Behaviour()
    async with serve_app(build_fake_engine(engine)) as engine_url:
        app = build_app(make_settings(**({"engines": (engine_url,)} | settings)))
        async with serve_app(app) as url, httpx.AsyncClient(base_url=url, timeout=20) as client:
            served = Served(url, client, app, engine, engine_url)
            if wait_ready:
                await until(lambda: _is_ready(client))
                engine.calls.clear()
                engine.headers.clear()
            yield served


async def _is_ready(client: httpx.AsyncClient) -> bool:
    return (await client.get("/readyz")).status_code == 200


async def until(condition: Callable[[], Any], timeout_s: float = 10.0) -> None:
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
