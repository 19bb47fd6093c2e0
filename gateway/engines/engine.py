"""One engine: its state, how it has done lately, and what it says of itself.

A call that generates goes through `attempt.py`, which alone counts here what runs and what failed.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import time
from enum import StrEnum

import aiohttp
from yarl import URL

from gateway.config import Settings
from gateway.engines.client import EngineClient
from gateway.errors import EngineBusy, EngineError, OutOfFiles
from gateway.observability.metrics import Metrics
from gateway.schemas.vllm import (
    EngineLoad,
    ModelCard,
    parse_engine_error,
    parse_engine_load,
    parse_models,
)

BUSY_STATUSES = frozenset((429, 503))
_BUSY_S = 1.0


def hide_password(url: str) -> str:
    """Labels, logs and messages are for everybody."""
    return str(URL(url).with_user(None)).rstrip("/") if "@" in url else url


def hash_text(text: str) -> int:
    """An odd number of 64 bits, the same in every gateway."""
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest, "big") | 1


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
        self.number = hash_text(self.url)  # for the choice by affinity
        self.state = EngineState.DOWN
        self.reason = "not looked at yet"
        self.cards: tuple[ModelCard, ...] = ()  # its model by all its names, and its adapters
        self.running = 0  # sequences
        self.sequences: int | None = None  # that it runs at once, where that is known
        self.is_capacity_told = False  # not only learnt
        self.knows_stream_interval = True
        self.fingerprint = ""  # that it puts on its answers
        self.pools_at = ""  # the route by which it is warmed, where its model makes no text
        self.starts = 0  # times that it became ready
        self.ailment = ""  # why it is not healthy, where it was found to be so
        self.down_since = time.monotonic()
        self.typical_start_s: float | None = None
        self.suspect = asyncio.Event()
        self.breaker_open_until = 0.0
        self.client = EngineClient(url, connector, settings)
        self._busy_until = 0.0
        self._failures = 0  # in a row: connections lost or refused
        self._errors = 0  # in a row: answers that were errors of its own, or came too late
        self._broken_streams = 0  # with no stream between them that came to its end
        self._was_silent = False
        self._goes_on = False  # while it is suspect
        self._connector = connector
        self._settings = settings
        self._metrics = metrics
        for known in (metrics.engine_failures, metrics.engine_errors, metrics.breaker_trips):
            known.labels(self.url)  # counted from zero, not from the first failure

    def change_password(self, url: str) -> None:
        """The same engine, by a URL with another user and password; calls from now on send them."""
        self.client = EngineClient(url, self._connector, self._settings)
        if self.state is not EngineState.READY:
            self.suspect.set()  # it may have been refused for the old one: looked at again at once

    @property
    def card(self) -> ModelCard | None:
        """Its model."""
        return self.cards[0] if self.cards else None

    @property
    def is_usable(self) -> bool:
        """Ready, not just seen failing, and its breaker is closed."""
        return (
            self.state is EngineState.READY
            and (self._goes_on or not self.suspect.is_set())
            and self.breaker_open_until <= time.monotonic()
        )

    @property
    def is_on_trial(self) -> bool:
        """So many errors in a row that a question of ours has to tell whose fault they are."""
        return max(self._errors, self._broken_streams) >= self._settings.breaker_failures

    @property
    def has_broken_streams(self) -> bool:
        """Then a whole answer does not clear it."""
        return self._broken_streams > 0

    @property
    def is_avoided(self) -> bool:
        """Just seen breaking a stream, and not looked at since. One that breaks all of them is
        idle: by its load alone it would draw whatever comes.
        """
        return self._broken_streams > 0 and self.suspect.is_set()

    @property
    def breaker_left_s(self) -> float:
        """How long an engine that is ready stays out of use; no event marks the end of that."""
        if self.state is not EngineState.READY or (self.suspect.is_set() and not self._goes_on):
            return math.inf
        return max(0.0, self.breaker_open_until - time.monotonic())

    @property
    def is_busy(self) -> bool:
        return self._busy_until > time.monotonic()

    @property
    def max_model_len(self) -> int | None:
        return self.cards[0].max_model_len if self.cards else None

    def expected_start_s(self, usual_s: float) -> float:
        """How long until it should be back, by what its past starts took; `usual_s` without any."""
        if self.state is EngineState.READY:
            return max(0.0, self.breaker_open_until - time.monotonic())
        if self.state is EngineState.WARMING:
            return 0.0  # it answers already; how long that batch takes is not known
        took_s = usual_s if self.typical_start_s is None else self.typical_start_s
        return max(0.0, took_s - (time.monotonic() - self.down_since))

    def enter_state(self, state: EngineState, reason: str) -> None:
        now = time.monotonic()
        if self.state is EngineState.READY and state is not EngineState.READY:
            self.down_since = now
        elif self.state is not EngineState.READY and state is EngineState.READY:
            self.note_success(is_stream=True)  # it has just answered its warm-up
            self.breaker_open_until = 0.0
            self.starts += 1
            took_s = now - self.down_since
            known_s = self.typical_start_s
            self.typical_start_s = took_s if known_s is None else (known_s + took_s) / 2
        self.state, self.reason = state, reason
        self._goes_on = False
        self.suspect.clear()

    def note_busy(self) -> None:
        self._busy_until = time.monotonic() + _BUSY_S

    def note_success(self, *, is_stream: bool = False) -> None:
        """A whole answer does not tell that streams come to their end."""
        self._failures = self._errors = 0
        self._was_silent = False
        if is_stream:
            self._broken_streams = 0

    def note_failure(self) -> None:
        """It lost a call or did not take it, which no request brings about: it is left out until it
        has been looked at, and after several in a row the breaker opens.
        """
        self._failures += 1
        self._metrics.engine_failures.labels(self.url).inc()
        self._goes_on = False
        self.suspect.set()
        if self._failures >= self._settings.breaker_failures:
            self._open_breaker()

    def note_error(self, *, is_silent: bool = False, is_stream: bool = False) -> None:
        """It answered with an error of its own, not in time, or not to a stream's end, and each may
        be the request's doing: vLLM says 500 to some that it cannot take, and breaks streams off at
        others. It is looked at, but others are still sent to it, or one caller could keep them all
        waiting.
        """
        self._errors += 1
        self._broken_streams += is_stream
        self._was_silent |= is_silent
        self._metrics.engine_errors.labels(self.url).inc()
        if not self.suspect.is_set():
            self._goes_on = True
            self.suspect.set()

    def note_trial(self, *, has_failed: bool | None) -> None:
        """What became of the question that decides; `None`: no answer in time. A busy engine may
        owe that, but hardly one that has let calls run into their time-out.
        """
        if has_failed or (has_failed is None and self._was_silent):
            self._metrics.engine_failures.labels(self.url).inc()
            self._open_breaker()
        else:
            self._errors = self._broken_streams = 0
            self._was_silent = False

    def _open_breaker(self) -> None:
        """It is left alone for a while; then the first request is the test, and if that fails
        again, the breaker opens at once.
        """
        now = time.monotonic()
        if self.breaker_open_until <= now:  # calls that were on their way open it no second time
            self._metrics.breaker_trips.labels(self.url).inc()
        self.breaker_open_until = now + self._settings.breaker_pause_s

    async def is_healthy(self) -> bool:
        """Whether it says so itself; a look, not a test of its work."""
        try:
            status, _ = await self._look("/health")
        except OutOfFiles:
            return self.state is not EngineState.DOWN  # nobody could ask: all stays as it was
        except (EngineError, TimeoutError) as error:
            self.ailment = f"it does not answer GET /health: {error or 'no answer in time'}"
            return False
        self.ailment = f"GET /health is answered with {status}"
        return status == 200

    async def read_model_cards(self) -> list[ModelCard]:
        status, body = await self._look("/v1/models")
        if status == 200:
            return parse_models(body)
        message, _ = parse_engine_error(body)
        if status in BUSY_STATUSES:
            raise EngineBusy(message, retry_after_s=1)
        self.note_failure()
        raise EngineError(f"the engine answered {status}: {message}")

    async def change_adapter(self, path: str, body: bytes) -> tuple[int, bytes]:
        """Has it load or drop one; its answer, whatever that is."""
        headers = {"Content-Type": "application/json"}
        answer = await self.client.send("POST", path, headers, body)
        if answer.body is None:
            answer.close()
            raise EngineError(f"the engine answered {path} with a stream", code="engine_garbled")
        return answer.status, answer.body

    async def read_load(self) -> EngineLoad | None:
        """Its own figures; `None` when it has none to give."""
        try:
            status, body = await self._look("/metrics")
            return parse_engine_load(body) if status == 200 else None
        except (EngineError, OutOfFiles, TimeoutError, ValueError):
            return None

    async def _look(self, path: str) -> tuple[int, bytes]:
        async with asyncio.timeout(self._settings.probe_timeout_s):
            answer = await self.client.send("GET", path)
        if answer.body is None:
            answer.close()
            raise EngineError(f"the engine answered {path} with a stream", code="engine_garbled")
        return answer.status, answer.body
