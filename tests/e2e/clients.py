"""The OpenAI SDK's two clients behind one way of asking, so that each promise is kept by both."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any, Literal

import openai

from tests.plain_http import NO_TLS

Kind = Literal["sync", "async"]
KINDS: tuple[Kind, ...] = ("sync", "async")


@dataclass(frozen=True)
class Sdk:
    """One client; `ask` runs a call of it without holding up the test's event loop."""

    client: Any

    @property
    def is_sync(self) -> bool:
        return isinstance(self.client, openai.OpenAI)

    async def ask(self, call: Callable[[Any], Any]) -> Any:
        if self.is_sync:
            return await asyncio.to_thread(call, self.client)
        return await call(self.client)

    async def collect(self, call: Callable[[Any], Any]) -> list[Any]:
        """Every event of a stream."""
        stream = await self.ask(call)
        if self.is_sync:
            return await asyncio.to_thread(list, stream)
        return [event async for event in stream]


@contextlib.asynccontextmanager
async def open_sdk(
    kind: Kind, url: str, key: str = "none", timeout_s: float = 60
) -> AsyncIterator[Sdk]:
    """No retries: one layer alone may retry, and here each answer is looked at."""
    options: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": key, "timeout": timeout_s}
    if kind == "sync":
        plain = openai.DefaultHttpxClient(verify=NO_TLS)
        with openai.OpenAI(http_client=plain, max_retries=0, **options) as client:
            yield Sdk(client)
    else:
        unblocking = openai.DefaultAsyncHttpxClient(verify=NO_TLS)
        async with openai.AsyncOpenAI(http_client=unblocking, max_retries=0, **options) as client:
            yield Sdk(client)
