"""Whether gateway and engine are as they were: asked after each slice of cases."""

from __future__ import annotations

import asyncio
import contextlib
import json
import re
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp
import psutil

from common.processes import find_session, read_resident_bytes
from common.prometheus_text import Samples, parse_samples, sum_samples
from lab.fuzz.loop_watch import LONGEST_S, read_blocks
from lab.load.answers import MISSHAPEN, PREDICT, KnownModel, WrongAnswer
from lab.load.counter_sums import count_inside
from lab.service import open_http, read_launcher

MOST_GROWTH_MB = {"gateway": 200.0, "engine": 1000.0}  # vLLM keeps 512 MB of compiled grammars
_MIB = 2**20
_SETTLE_S = 180.0
_CALL_S = 120.0
_READY_S = 240.0
_POLL_S = 0.1
_PROMPT = re.compile(rb"#\d{6,}#")
_CRASHES = (b'"request_crashed"', b'"connection_crashed"', b"Traceback (most recent call last)")
_COUNTED = ("gateway_breaker_trips_total", "gateway_engine_failures_total", "gateway_warmups_total")


@dataclass(frozen=True)
class Watched:
    """Where to look; what is empty is not looked at."""

    url: str
    status_url: str = ""
    gateway_pid: int = 0  # where no launcher names it
    log: Path | None = None  # the gateway's
    blocks: Path | None = None  # what `loop_watch` notes


@dataclass(frozen=True)
class Vitals:
    """What must not change, and what may grow a little."""

    pids: dict[str, int]
    restarts: int
    counts: dict[str, float]
    memory_mb: dict[str, float]


@dataclass
class Survival:
    """One service, asked again and again."""

    session: aiohttp.ClientSession
    watched: Watched
    model: KnownModel
    calls: int = 0
    right: int = 0  # of them
    longest_block_s: float = 0.0
    vitals: list[Vitals] = field(default_factory=list)  # at first, and after each slice
    _log_read: int = 0
    _blocks_read: int = 0

    async def begin(self) -> None:
        self.vitals.append(await self._look(await self._read_samples()))
        list(self._read_log())
        list(self._read_blocks())  # a start may take its time
        self.longest_block_s = 0.0

    async def check(self) -> list[str]:
        """What does not hold any more. What has changed is the measure for the next time."""
        problems = [one async for one in self._check_calls()]
        try:
            after = await self._look(await self._read_samples())
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            return [*problems, f"the gateway tells no figures: {error!r}"]
        problems += find_changes(self.vitals[0], self.vitals[-1], after)
        problems += [*self._read_log(), *self._read_blocks()]
        self.vitals.append(after)
        return problems

    async def wait_well(self) -> None:
        """After an engine has died: until there is one again."""
        deadline = time.monotonic() + _READY_S
        while time.monotonic() < deadline:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError):
                async with self.session.get(f"{self.watched.url}/readyz") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(_POLL_S)

    def growth_mb(self) -> dict[str, float]:
        first, last = self.vitals[0].memory_mb, self.vitals[-1].memory_mb
        return {name: last[name] - first[name] for name in first if name in last}

    async def _check_calls(self) -> AsyncIterator[str]:
        """Nothing runs any more, and whoever asks is answered rightly."""
        inside = await self._settle()
        if inside:
            yield f"{inside} sequences still run or wait {_SETTLE_S:.0f} s later"
        for call in (self._ask_number, self._ask_question):
            try:
                async with asyncio.timeout(_CALL_S):
                    await call()
                self.right += 1
            except WrongAnswer as error:
                yield f"an honest call got a wrong answer: {error}"
            except (aiohttp.ClientError, TimeoutError, *MISSHAPEN) as error:
                yield f"an honest call got no answer: {error!r}"

    async def _settle(self) -> int:
        deadline = time.monotonic() + _SETTLE_S
        inside = 1
        while inside and time.monotonic() < deadline:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
                inside = count_inside(await self._read_samples())
            await asyncio.sleep(_POLL_S if inside else 0)
        return inside

    async def _ask_number(self) -> None:
        self.calls += 1
        text = f"number-{self.calls}."
        body = {"model": self.model.name, "prompt": text, "echo": True, "max_tokens": 1}
        reply = await self._post("/v1/completions", {**body, "temperature": 0})
        if not reply["choices"][0]["text"].startswith(text):
            raise WrongAnswer(f"asked {text}, got {reply['choices'][0]['text']!r}")

    async def _ask_question(self) -> None:
        self.calls += 1
        question, wanted = self.model.pairs[self.calls % len(self.model.pairs)]
        reply = await self._post(PREDICT, {"prompt": question})
        self.model.check(reply["response"], wanted, question)

    async def _post(self, path: str, body: dict[str, Any]) -> Any:
        async with self.session.post(self.watched.url + path, json=body) as answer:
            text = await answer.text()
        if answer.status != 200:
            raise WrongAnswer(f"{path}: {answer.status}: {text[:300]}")
        return json.loads(text)

    async def _read_samples(self) -> Samples:
        async with self.session.get(self.watched.url + "/metrics") as answer:
            return parse_samples(await answer.text())

    async def _look(self, samples: Samples) -> Vitals:
        pids, restarts = {"gateway": self.watched.gateway_pid}, 0
        if self.watched.status_url:
            async with open_http() as client:
                launcher = await read_launcher(self.watched.status_url, client)
            told = {name: launcher.pid(name) or 0 for name in ("engine", "gateway")}
            pids |= {name: pid for name, pid in told.items() if pid}
            engine = launcher.status.get("engine") or {}
            restarts = sum((engine.get("restarts") or {}).values())
        counts = {name: sum_samples(samples, name) for name in _COUNTED}
        present = {name: pid for name, pid in pids.items() if pid}
        return Vitals(present, restarts, counts, {n: sum_memory_mb(p) for n, p in present.items()})

    def _read_log(self) -> Iterator[str]:
        """What the gateway logged since the last time and should not have."""
        if self.watched.log is None:
            return
        with self.watched.log.open("rb") as file:
            file.seek(self._log_read)
            new = file.read()
        self._log_read += len(new)
        yield from judge_log(new)

    def _read_blocks(self) -> Iterator[str]:
        if self.watched.blocks is None:
            return
        new = read_blocks(self.watched.blocks)[self._blocks_read :]
        self._blocks_read += len(new)
        self.longest_block_s = max([self.longest_block_s, *(cpu_s for cpu_s, _ in new)])
        for cpu_s, what in new:
            if cpu_s > LONGEST_S:
                yield f"the event loop was blocked for {cpu_s * 1e3:.0f} ms: {what}"


def judge_log(text: bytes) -> Iterator[str]:
    """What no gateway may log: crashes, prompts, lines that are no events."""
    for line in text.splitlines():
        shown = line[:500].decode("utf-8", "replace")
        if any(word in line for word in _CRASHES):
            yield f"the gateway's log tells of a crash: {shown}"
        elif not line.startswith(b"{"):
            yield f"a line of the gateway's log is no event: {shown}"
        elif _PROMPT.search(line):
            yield f"a prompt is in the gateway's log: {shown}"


def find_changes(first: Vitals, before: Vitals, after: Vitals) -> Iterator[str]:
    for name, pid in before.pids.items():
        if after.pids.get(name) != pid:
            yield f"the {name} is another process: {pid} has become {after.pids.get(name, 'none')}"
    if after.restarts != before.restarts:
        yield f"the engine was restarted {after.restarts - before.restarts} times"
    for name, count in after.counts.items():
        if count != before.counts[name]:
            yield f"{name} rose by {count - before.counts[name]:g}"
    for name, most in MOST_GROWTH_MB.items():
        grown = after.memory_mb.get(name, 0.0) - first.memory_mb.get(name, 0.0)
        if grown > most and name in first.memory_mb:
            yield f"the {name} has grown by {grown:.0f} MB"


def sum_memory_mb(leader: int) -> float:
    """Of a process and what it has started."""
    total = 0.0
    for one in find_session(leader):
        with contextlib.suppress(psutil.Error):  # it has just ended
            total += read_resident_bytes(one.pid) / _MIB
    return total
