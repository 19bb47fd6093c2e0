"""Is the engine up, does it answer, is it moving: questions over HTTP, no decisions."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass
from types import TracebackType

import httpx

from common.prometheus_text import parse_samples, sum_samples

_QUICK_TIMEOUT_S = 5.0
_STILL_S = 3.0
_IN_FLIGHT = ("vllm:num_requests_running", "vllm:num_requests_waiting")
# Prefill counts too: a long prompt is work, though it yields no token for a while.
_MOVING = (
    "vllm:generation_tokens_total",
    "vllm:prompt_tokens_total",
    "vllm:iteration_tokens_total_count",
)


@dataclass(frozen=True)
class Activity:
    """The engine's own count of what it has in hand and what it has ever done."""

    in_flight: int
    moved: float


class EngineProbe:
    def __init__(self, url: str, model: str) -> None:
        self._model = model
        # trust_env off: a proxy for the outside world must not stand between us and the loopback.
        self._client = httpx.AsyncClient(base_url=url, trust_env=False, timeout=_QUICK_TIMEOUT_S)

    async def __aenter__(self) -> EngineProbe:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self._client.aclose()

    async def is_up(self) -> bool:
        """vLLM listens only when it can serve, so the first 200 means ready, later ones little."""
        try:
            response = await self._client.get("/health")
        except httpx.HTTPError:
            return False
        return response.status_code == httpx.codes.OK

    async def ask_one_token(self, timeout_s: float) -> bool:
        """A real token through the real path; `/health` runs no forward pass."""
        body = {"model": self._model, "prompt": "1", "max_tokens": 1, "temperature": 0}
        try:
            response = await self._client.post("/v1/completions", json=body, timeout=timeout_s)
        except httpx.HTTPError:
            return False
        # An engine for embeddings has no such route; that it says so is an answer too.
        return response.status_code in (httpx.codes.OK, httpx.codes.NOT_FOUND)

    async def read_activity(self) -> Activity | None:
        """None: no answer, or no counters (`disable-log-stats`)."""
        try:
            response = await self._client.get("/metrics")
        except httpx.HTTPError:
            return None
        return parse_activity(response.text) if response.status_code == httpx.codes.OK else None

    async def fall_asleep(self, level: int, timeout_s: float) -> str:
        """Empty, or why it does not: what it had of the device may be another's then."""
        try:
            await self._order("/sleep", timeout_s, level=level)
            told = await self._client.get("/is_sleeping")
            is_asleep = told.raise_for_status().json() == {"is_sleeping": True}
        except (httpx.HTTPError, ValueError) as error:
            return str(error) or type(error).__name__
        return "" if is_asleep else "it says that it is awake"

    async def wake_up(self, level: int, timeout_s: float) -> str:
        """Empty, or why it does not."""
        try:
            if level == 2:  # its weights are nowhere
                await self._order("/wake_up", timeout_s, tags="weights")
                reload = {"method": "reload_weights"}
                await self._order("/collective_rpc", timeout_s, body=reload)
                await self._order("/wake_up", timeout_s, tags="kv_cache")
            else:
                await self._order("/wake_up", timeout_s)
        except httpx.HTTPError as error:
            return str(error) or type(error).__name__
        is_answered = await self.ask_one_token(timeout_s)
        return "" if is_answered else "it answers no request"

    async def _order(
        self, path: str, timeout_s: float, body: Mapping[str, str] | None = None, **query: str | int
    ) -> None:
        response = await self._client.post(path, params=query, json=body, timeout=timeout_s)
        response.raise_for_status()

    async def wait_idle(self, timeout_s: float) -> None:
        """Until nothing is in flight, the time is over, or the engine is gone."""
        with contextlib.suppress(TimeoutError, httpx.HTTPError):
            async with asyncio.timeout(timeout_s):
                await self._wait_idle()

    async def _wait_idle(self) -> None:
        """Its core knows nothing of requests that its server still turns into tokens, so the server
        is asked too. The server's count misses some ends of streams, hence the limit.
        """
        seen, since = 0.0, time.monotonic()
        while True:
            with contextlib.suppress(httpx.TimeoutException):  # too busy to answer is not idle
                at_server = await self._read_load()
                metrics = await self._client.get("/metrics")
                in_core = parse_activity(metrics.text) or Activity(0, 0.0)
                if in_core.in_flight or in_core.moved != seen:
                    seen, since = in_core.moved, time.monotonic()
                is_still = time.monotonic() - since > _STILL_S
                if not in_core.in_flight and (at_server <= 0 or is_still):
                    return
            await asyncio.sleep(0.1)

    async def _read_load(self) -> int:
        """Requests at its server; an engine that does not count them has none for us."""
        response = await self._client.get("/load")
        if response.status_code != httpx.codes.OK:
            return 0
        try:
            return int(response.json()["server_load"])
        except (ValueError, KeyError, TypeError):
            return 0


def parse_activity(text: str) -> Activity | None:
    # The few lines that are asked for: parsing all thousands would keep the event loop for long.
    wanted = (*_IN_FLIGHT, *_MOVING)
    lines = [line for line in text.splitlines() if line.startswith(wanted)]
    try:
        samples = parse_samples("\n".join(lines) + "\n")
    except ValueError:
        return None
    if not samples:
        return None
    in_flight = sum(sum_samples(samples, name) for name in _IN_FLIGHT)
    return Activity(int(in_flight), sum(sum_samples(samples, name) for name in _MOVING))
