"""One engine over HTTP: the only module that talks to one, and the only border at which the client
library's exceptions become this project's.

aiohttp's client serves (a relay over it did sixteen times the requests of one over httpx). Its own
limit of 100 connections is off: the Gate alone limits.
"""

from __future__ import annotations

import asyncio
import errno
import math
import time
from collections.abc import Mapping, Sequence
from enum import StrEnum

import aiohttp
from yarl import URL

from gateway.config import Settings
from gateway.engines.connector import EngineConnector
from gateway.engines.timeouts import Watch
from gateway.engines.upstream import Answer, Upstream
from gateway.errors import (
    EngineError,
    EngineTimeout,
    EngineUnreachable,
    InvalidRequest,
    OutOfFiles,
    Unavailable,
)
from gateway.observability.metrics import Metrics
from gateway.schemas.wire import (
    Completion,
    EngineLoad,
    ModelCard,
    Prompt,
    Sampling,
    build_completion_call,
    parse_completion,
    parse_engine_error,
    parse_engine_load,
    parse_models,
)

_BUSY_S = 1.0
_JSON = {"Content-Type": "application/json"}


def hide_password(url: str) -> str:
    """Labels, logs and messages are for everybody."""
    return str(URL(url).with_user(None)).rstrip("/") if "@" in url else url


class EngineState(StrEnum):
    """What the gateway may send an engine: nothing, its warm-up, everything."""

    DOWN = "down"
    WARMING = "warming"
    READY = "ready"


class Engine:
    """A vLLM server at `url`. Its state is written by the warm-up alone."""

    def __init__(
        self, url: str, settings: Settings, connector: aiohttp.BaseConnector, metrics: Metrics
    ) -> None:
        self.url = hide_password(url)  # the name by which all speak of it
        self.state = EngineState.DOWN
        self.reason = "not looked at yet"
        self.card: ModelCard | None = None
        self.running = 0
        self.down_since = time.monotonic()
        self.typical_start_s: float | None = None
        self.suspect = asyncio.Event()
        self._busy_until = 0.0
        self._failures = 0
        self.tripped_until = 0.0
        self._watch = Watch()
        self._connector = connector
        self._upstream = Upstream(url, connector, settings.connect_timeout_s)
        self._settings = settings
        self._metrics = metrics
        for known in (metrics.engine_failures, metrics.breaker_trips):
            known.labels(self.url)  # counted from nought, not from the first failure

    def change_password(self, url: str) -> None:
        """The same engine, by a URL with another user and password; calls from now on send them."""
        self._upstream = Upstream(url, self._connector, self._settings.connect_timeout_s)
        if self.state is not EngineState.READY:
            self.suspect.set()  # it may have been refused for the old one: looked at again at once

    @property
    def is_usable(self) -> bool:
        """Ready, not just seen failing, and its breaker is closed."""
        return (
            self.state is EngineState.READY
            and not self.suspect.is_set()
            and self.tripped_until <= time.monotonic()
        )

    @property
    def breaker_left_s(self) -> float:
        """How long an engine that is ready stays out of use; no event marks the end of that."""
        if self.state is not EngineState.READY or self.suspect.is_set():
            return math.inf
        return max(0.0, self.tripped_until - time.monotonic())

    @property
    def is_busy(self) -> bool:
        return self._busy_until > time.monotonic()

    def expected_start_s(self, usual_s: float) -> float:
        """How long until it should be back, by what its past starts took; `usual_s` without any."""
        if self.state is EngineState.READY:
            return max(0.0, self.tripped_until - time.monotonic())
        if self.state is EngineState.WARMING:
            return 0.0  # it answers already; how long that batch takes is not known
        took_s = usual_s if self.typical_start_s is None else self.typical_start_s
        return max(0.0, took_s - (time.monotonic() - self.down_since))

    def enter_state(self, state: EngineState, reason: str) -> None:
        now = time.monotonic()
        if self.state is EngineState.READY and state is not EngineState.READY:
            self.down_since = now
        elif self.state is not EngineState.READY and state is EngineState.READY:
            self._failures, self.tripped_until = 0, 0.0  # a warm-up has just been answered
            took_s = now - self.down_since
            known_s = self.typical_start_s
            self.typical_start_s = took_s if known_s is None else (known_s + took_s) / 2
        self.state, self.reason = state, reason
        self.suspect.clear()

    def note_busy(self) -> None:
        self._busy_until = time.monotonic() + _BUSY_S

    def note_success(self) -> None:
        self._failures = 0

    def note_failure(self) -> None:
        """The breaker: after several failures in a row it leaves the engine alone for a while.

        Then the first request is the test; it fails again, and the breaker opens at once.
        """
        self._failures += 1
        self._metrics.engine_failures.labels(self.url).inc()
        self.suspect.set()
        if self._failures < self._settings.breaker_failures:
            return
        now = time.monotonic()
        if self.tripped_until <= now:  # calls that were on their way open it no second time
            self._metrics.breaker_trips.labels(self.url).inc()
        self.tripped_until = now + self._settings.breaker_pause_s

    @property
    def max_model_len(self) -> int | None:
        return self.card.max_model_len if self.card else None

    async def complete(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        headers: Mapping[str, str] | None = None,
    ) -> Completion:
        """Answers in prompt order, from one list-prompt call; `headers` say for which request."""
        model = self.card.name if self.card else ""
        body = build_completion_call(model, prompts, sampling)
        self.running += len(prompts)
        try:
            status, answer = await self._exchange(
                "POST", "/v1/completions", body, {**_JSON, **(headers or {})}
            )
        except EngineError:
            self.note_failure()  # here, not for probes: an engine that is down fails those for long
            raise
        finally:
            self.running -= len(prompts)
        if status != 200:
            raise self._error(status, answer)
        try:
            completion = parse_completion(answer, len(prompts))
        except EngineError:
            self.note_failure()
            raise
        self.note_success()
        return completion

    async def is_healthy(self) -> bool:
        """Whether it says so itself; a look, not a test of its work."""
        try:
            async with asyncio.timeout(self._settings.probe_timeout_s):
                status, _ = await self._exchange("GET", "/health")
        except OutOfFiles:
            return self.state is not EngineState.DOWN  # nobody could ask: all stays as it was
        except (EngineError, TimeoutError):
            return False
        return status == 200

    async def read_model_cards(self) -> list[ModelCard]:
        async with asyncio.timeout(self._settings.probe_timeout_s):
            status, answer = await self._exchange("GET", "/v1/models")
        if status != 200:
            raise self._error(status, answer)
        return parse_models(answer)

    async def read_load(self) -> EngineLoad | None:
        """Its own figures; `None` when it has none to give."""
        try:
            async with asyncio.timeout(self._settings.probe_timeout_s):
                status, answer = await self._exchange("GET", "/metrics")
            return parse_engine_load(answer) if status == 200 else None
        except (EngineError, OutOfFiles, TimeoutError, ValueError):
            return None

    async def ask(
        self, method: str, path: str, headers: Mapping[str, str], body: bytes | None
    ) -> tuple[Answer, bytes | None]:
        """An answer for passing on: with its body, or without it when it is a stream, which the
        caller reads and leaves.
        """
        try:
            with self._watch.call(self._settings.engine_timeout_s):
                answer = await self._upstream.send(method, path, headers, body)
                text = None
                if not answer.is_stream:
                    with answer:
                        text = await answer.content.read()
        except (aiohttp.ClientError, OSError) as error:
            translated = self.translate(error)
            if isinstance(translated, EngineError):
                self.note_failure()
            raise translated from error
        if answer.status < 500:
            if text is not None:
                self.note_success()  # of a stream this is only the beginning
        elif answer.status != 503:
            self.note_failure()
        return answer, text

    async def _exchange(
        self,
        method: str,
        path: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
    ) -> tuple[int, bytes]:
        try:
            with (
                self._watch.call(self._settings.engine_timeout_s),
                await self._upstream.send(method, path, headers or {}, body) as answer,
            ):
                return answer.status, await answer.content.read()
        except (aiohttp.ClientError, OSError) as error:
            raise self.translate(error) from error

    @staticmethod
    def translate(error: Exception) -> EngineError | OutOfFiles:
        if isinstance(error, OSError) and error.errno in {errno.EMFILE, errno.ENFILE}:
            return OutOfFiles(
                "the gateway may not open more connections; raise its limit of open files "
                "(ulimit -n) or lower GATEWAY_MAX_RUNNING",
                retry_after_s=1,
            )
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
            # Back-pressure, not a failure: others are asked first for a moment.
            self.note_busy()
            return Unavailable(message, code="engine_busy", retry_after_s=1)
        if status in {400, 422}:
            return InvalidRequest(message, param=param, code="engine_refused")
        # Any other refusal is not about the prompts: a model that is gone, a key it wants.
        self.note_failure()
        return EngineError(f"the engine answered {status}: {message}")


def build_connector(settings: Settings) -> aiohttp.TCPConnector:
    """The connections to all engines."""
    return EngineConnector(limit=0, keepalive_timeout=settings.engine_keepalive_s)


def build_session(settings: Settings, connector: aiohttp.TCPConnector) -> aiohttp.ClientSession:
    """The same connections for what is asked seldom: a launcher's status. It closes them, too."""
    return aiohttp.ClientSession(
        connector=connector,
        timeout=aiohttp.ClientTimeout(
            total=settings.engine_timeout_s, sock_connect=settings.connect_timeout_s
        ),
        cookie_jar=aiohttp.DummyCookieJar(),
        trust_env=False,
    )
