"""Ordinary callers, and what they and a prober see of a gateway in one window of time."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import math
import random
import time
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any
from urllib.parse import SplitResult, urlsplit

import aiohttp
import psutil

from common import processes
from lab.load.piped_process import PipedProcess

_CALL_TIMEOUT_S = 60.0
_PAUSES_S = (0.1, 0.5)  # of a caller between two requests
_NEW_TOKENS = 16
_PROBE_EVERY_S = 0.05
_PROBE_TIMEOUT_S = 30.0
_PROBES_A_SAMPLE = 4
_MIB = 2**20


@dataclass
class Window:
    """What was seen in it."""

    latencies_s: list[float] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    health_s: list[float] = field(default_factory=list)
    memory_mb: dict[str, float] = field(default_factory=dict)  # the most, by program

    @property
    def p99_s(self) -> float:
        return find_quantile(self.latencies_s, 0.99)


def find_quantile(values: Sequence[float], share: float) -> float:
    """The least value that so many are not above; none of none."""
    return sorted(values)[math.ceil(share * len(values)) - 1] if values else math.inf


class Callers:
    """Each asks, waits a little and asks again: chats whole and streamed, small batches."""

    def __init__(self, session: aiohttp.ClientSession, url: str, model: str, count: int) -> None:
        self._session, self._url, self._model = session, url, model
        self._count = count

    async def ask(self, until: float, window: Window) -> None:
        """Each once at least; whoever has asked by then gets their answer."""
        await asyncio.gather(*(self._run(n, until, window) for n in range(self._count)))

    async def _run(self, number: int, until: float, window: Window) -> None:
        chance = random.Random(number)
        await asyncio.sleep(chance.uniform(0, _PAUSES_S[1]))
        while True:
            began = time.monotonic()
            try:
                async with asyncio.timeout(_CALL_TIMEOUT_S):
                    fault = await self._ask_once(number)
            except (aiohttp.ClientError, TimeoutError) as error:
                fault = f"{type(error).__name__}: {error}"
            window.latencies_s.append(time.monotonic() - began)
            if fault:
                window.failures.append(fault[:200])
            await asyncio.sleep(chance.uniform(*_PAUSES_S))
            if time.monotonic() >= until:
                return

    async def _ask_once(self, number: int) -> str:
        """What was wrong with the answer; empty if nothing."""
        path, body = self._build(number)
        async with self._session.post(self._url + path, json=body) as answer:
            text = await answer.text()
        if answer.status != 200:
            return f"{answer.status}: {text}"
        if path == "/predict":
            return "" if "errors" not in json.loads(text) else text
        is_whole = ("[DONE]" if body["stream"] else '"choices"') in text
        return "" if is_whole and '"error"' not in text else text

    def _build(self, number: int) -> tuple[str, dict[str, Any]]:
        if number % 5 == 4:
            return "/predict", {"prompt": ["什么是 warp？"] * 2, "max_tokens": _NEW_TOKENS}
        fields = {"model": self._model, "max_tokens": _NEW_TOKENS, "stream": number % 2 == 0}
        messages = [{"role": "user", "content": f"什么是 warp？ {number}"}]
        return "/v1/chat/completions", fields | {"messages": messages}


class Prober(PipedProcess):
    """Asks /healthz and looks at memory, from where nothing else runs: in the callers' process it
    would wait for their answers to be read.
    """

    def __init__(self, url: str) -> None:
        super().__init__(_serve_probes, url)

    @contextlib.asynccontextmanager
    async def watch(self, window: Window, programs: dict[str, list[int]]) -> AsyncIterator[None]:
        self.send(programs)
        try:
            yield
        finally:
            self.send(None)
            window.health_s, window.memory_mb = await self.receive()


def _serve_probes(pipe: Connection, url: str) -> None:
    """One window after another, until the pipe's other end is closed or gone."""
    try:
        pipe.send(None)
        while True:
            programs = pipe.recv()
            seen = Window()
            _probe(pipe, urlsplit(url), programs, seen)
            pipe.recv()
            pipe.send((seen.health_s, seen.memory_mb))
    except (EOFError, ConnectionError, KeyboardInterrupt):
        return


def _probe(
    pipe: Connection, where: SplitResult, programs: dict[str, list[int]], window: Window
) -> None:
    """Once at least, and until somebody says something."""
    host, port = where.hostname or "", where.port or 80
    connection = http.client.HTTPConnection(host, port, timeout=_PROBE_TIMEOUT_S)
    wait_s, number = 0.0, 0
    while not number or not pipe.poll(wait_s):
        began = time.monotonic()
        try:
            connection.request("GET", "/healthz")
            connection.getresponse().read()
        except (OSError, http.client.HTTPException):
            connection.close()
        window.health_s.append(time.monotonic() - began)
        if number % _PROBES_A_SAMPLE == 0:
            _sample_memory(programs, window)
        number += 1
        wait_s = max(0.0, _PROBE_EVERY_S - (time.monotonic() - began))
    connection.close()


def _sample_memory(programs: dict[str, list[int]], window: Window) -> None:
    for name, pids in programs.items():
        total = 0.0
        for pid in pids:
            with contextlib.suppress(psutil.Error):  # it has ended
                total += processes.read_resident_bytes(pid) / _MIB
        window.memory_mb[name] = max(total, window.memory_mb.get(name, 0.0))
