"""The figures that the page shows: of the gateway, its engines and their launchers."""

from __future__ import annotations

import asyncio
import time
from dataclasses import asdict
from typing import Any

from aiohttp import web

from common.chat_templates import DEFAULT, read_chat_templates
from gateway.admission.accounts import ACCOUNTS
from gateway.admission.served_models import MODELS
from gateway.admission.tickets import LANES
from gateway.config import SETTINGS
from gateway.engines.engine import Engine, EngineState
from gateway.engines.pool import POOL
from gateway.page.launchers import LAUNCHERS

_FRESH_S = 1.0


class PageFigures:
    """What all pages show, read at most once a second, however many look."""

    def __init__(self, app: web.Application) -> None:
        self._app = app
        folder = app[SETTINGS].tokenizer
        self._chats = folder is None or DEFAULT in read_chat_templates(folder)
        self._read_at = 0.0
        self._last: dict[str, Any] = {}
        self._reading: asyncio.Task[None] | None = None

    async def read(self) -> dict[str, Any]:
        if time.monotonic() - self._read_at >= _FRESH_S:
            if self._reading is None or self._reading.done():
                self._reading = asyncio.create_task(self._refresh())
            # Who hangs up must not take the reading away from the others.
            await asyncio.shield(self._reading)
        return self._last

    async def close(self) -> None:
        if self._reading is not None:
            self._reading.cancel()
            await asyncio.gather(self._reading, return_exceptions=True)

    async def _refresh(self) -> None:
        engines = self._app[POOL].engines
        described = await asyncio.gather(*map(_describe_engine, engines))
        self._last = {
            "at": time.time(),
            "gateway": {"state": self._name_state()},
            "queue": self._describe_queue(),
            "used": asdict(self._app[ACCOUNTS].sum_usage()),
            "limits": self._describe_limits(),
            "engines": described,
            "launchers": await self._app[LAUNCHERS].read(engines),
        }
        self._read_at = time.monotonic()

    def _name_state(self) -> str:
        pool = self._app[POOL]
        return "stopping" if pool.draining else "ready" if pool.is_ready else "waiting"

    def _describe_queue(self) -> dict[str, Any]:
        models = self._app[MODELS]
        lanes = {name: models.count(name) for name in LANES}
        return {
            "running": sum(running for running, _ in lanes.values()),
            "waiting": sum(waiting for _, waiting in lanes.values()),
        }

    def _describe_limits(self) -> dict[str, Any]:
        settings = self._app[SETTINGS]
        return {
            "prompts": settings.max_prompts,
            "body_bytes": settings.max_body_bytes,
            "max_tokens": settings.max_tokens,
            "temperature": settings.temperature,
            "shares_answers": settings.dedup,
            "chats": self._chats,  # else a conversation is refused by the engine
        }


PAGE_FIGURES = web.AppKey("page_figures", PageFigures)


async def _describe_engine(engine: Engine) -> dict[str, Any]:
    load = None if engine.state is EngineState.DOWN else await engine.read_load()
    return {
        "state": engine.state,
        "reason": engine.reason,
        "model": engine.card.name if engine.card else None,
        "max_model_len": engine.max_model_len,
        "load": asdict(load) if load else None,
    }
