"""One engine over HTTP: the only module that talks to one, and the only border at which the client
library's exceptions become this project's.

aiohttp's client serves (a relay over it did sixteen times the requests of one over httpx). Its own
limit of 100 connections is off: the Gate alone limits.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from enum import StrEnum

import aiohttp

from gateway.config import Settings
from gateway.errors import (
    EngineError,
    EngineTimeout,
    EngineUnreachable,
    InvalidRequest,
    Unavailable,
)
from gateway.wire import (
    Completion,
    ModelCard,
    Prompt,
    Sampling,
    build_completion_call,
    parse_completion,
    parse_engine_error,
    parse_models,
)

_JSON = {"Content-Type": "application/json"}


class EngineState(StrEnum):
    """What the gateway may send an engine: nothing, its warm-up, everything."""

    DOWN = "down"
    WARMING = "warming"
    READY = "ready"


class Engine:
    """A vLLM server at `url`. Its state is written by the warm-up alone."""

    def __init__(self, url: str, settings: Settings, session: aiohttp.ClientSession) -> None:
        self.url = url
        self.state = EngineState.DOWN
        self.reason = "not looked at yet"
        self.card: ModelCard | None = None
        self.running = 0
        self._session = session
        self._probe_timeout_s = settings.probe_timeout_s
        self.suspect = asyncio.Event()

    @property
    def max_model_len(self) -> int | None:
        return self.card.max_model_len if self.card else None

    async def complete(self, prompts: Sequence[Prompt], sampling: Sampling) -> Completion:
        """Answers in prompt order, from one list-prompt call."""
        model = self.card.name if self.card else ""
        body = build_completion_call(model, prompts, sampling)
        self.running += len(prompts)
        try:
            status, answer = await self._exchange("POST", "/v1/completions", body)
        finally:
            self.running -= len(prompts)
        if status != 200:
            raise self._error(status, answer)
        return parse_completion(answer, len(prompts))

    async def is_healthy(self) -> bool:
        """Whether it says so itself; a look, not a test of its work."""
        try:
            async with asyncio.timeout(self._probe_timeout_s):
                status, _ = await self._exchange("GET", "/health")
        except (EngineError, TimeoutError):
            return False
        return status == 200

    async def read_model_cards(self) -> list[ModelCard]:
        async with asyncio.timeout(self._probe_timeout_s):
            status, answer = await self._exchange("GET", "/v1/models")
        if status != 200:
            raise self._error(status, answer)
        return parse_models(answer)

    @asynccontextmanager
    async def open(
        self, method: str, path: str, *, headers: Mapping[str, str], body: bytes | None
    ) -> AsyncIterator[aiohttp.ClientResponse]:
        """An answer whose body has not been read, for passing on."""
        self.running += 1
        try:
            async with self._session.request(
                method, self.url + path, headers=headers, data=body
            ) as response:
                yield response
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._translate(error) from error
        finally:
            self.running -= 1

    async def _exchange(
        self, method: str, path: str, body: bytes | None = None
    ) -> tuple[int, bytes]:
        try:
            async with self._session.request(
                method, self.url + path, data=body, headers=_JSON if body else None
            ) as response:
                return response.status, await response.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise self._translate(error) from error

    def _translate(self, error: Exception) -> EngineError:
        self.suspect.set()
        if isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError):
            return EngineUnreachable(
                "the engine does not accept connections; it may be starting", retry_after_s=5
            )
        if isinstance(error, TimeoutError):
            return EngineTimeout("the engine did not answer in time")
        return EngineError(f"the engine broke the connection off ({type(error).__name__})")

    def _error(self, status: int, body: bytes) -> InvalidRequest | EngineError | Unavailable:
        message, param = parse_engine_error(body)
        if status in {429, 503}:
            return Unavailable(message, code="engine_busy", retry_after_s=1)
        if status in {400, 422}:
            return InvalidRequest(message, param=param, code="engine_refused")
        # Any other refusal is not about the prompts: a model that is gone, a key it wants.
        self.suspect.set()
        return EngineError(f"the engine answered {status}: {message}")


def build_session(settings: Settings) -> aiohttp.ClientSession:
    """The one client of the process."""
    return aiohttp.ClientSession(
        connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=settings.engine_keepalive_s),
        timeout=aiohttp.ClientTimeout(
            total=settings.engine_timeout_s, connect=settings.connect_timeout_s
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        auto_decompress=False,
        trust_env=False,
    )
