"""The soak itself: clients, faults and samples side by side, and what did not hold at the end."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import statistics
import time

import aiohttp

from common.prometheus_text import Samples, parse_samples, sum_samples
from common.questions import QuestionPair
from lab.failures import NoService
from lab.load.answers import MISSHAPEN, learn_model
from lab.load.counter_sums import count_inside, find_mismatches
from lab.load.process_faults import (
    FAULTS,
    ProcessSample,
    find_pid,
    find_programs,
    strike,
    take_sample,
)
from lab.load.soak_slices import Samples as HeldSamples
from lab.load.traffic import SoakClient, Tally

_SAMPLE_EVERY_S = 2.0
_SHOW_EVERY_S = 10.0
_MOST_GROWTH_MB = 16.0
_SETTLE_TIMEOUT_S = 60.0
# The engine's own noticing of a fault, and what was under way in it ending in an error.
_NOTICE_S, _AFTERMATH_S = 1.0, 2.0


class Soak:
    """One run."""

    def __init__(self, arguments: argparse.Namespace, session: aiohttp.ClientSession) -> None:
        self._arguments, self._session = arguments, session
        self._url: str = arguments.url
        self._started = self.lasted_s = 0.0
        self._until = 0.0
        self._in_fault = False
        self.samples: list[ProcessSample] = []
        self.held = HeldSamples()
        self.recoveries: list[tuple[str, float]] = []
        self.tally = Tally()
        self.problems: list[str] = []

    async def run(self, pairs: list[QuestionPair]) -> None:
        try:
            model = await learn_model(self._session, self._url, pairs)
            before = await self._read_samples()
        except aiohttp.ClientConnectorError as error:
            raise NoService(f"{error}; is the gateway running? `make serve`") from None
        except (aiohttp.ClientError, TimeoutError, *MISSHAPEN) as error:
            text = f"{self._url} does not answer as a gateway ({type(error).__name__}: {error})"
            raise NoService(text) from None
        self._started = time.monotonic()
        self._until = self._started + self._arguments.duration
        seeds = range(self._arguments.seed, self._arguments.seed + self._arguments.callers)
        pause_s = self._arguments.pause
        clients = [
            SoakClient(self._session, self._url, model, self.tally, seed, pause_s=pause_s)
            for seed in seeds
        ]
        beside = [asyncio.create_task(self._watch()), asyncio.create_task(self._disturb())]
        try:
            runs = (client.run(self._until, lambda: self._in_fault) for client in clients)
            await asyncio.gather(*runs)
        finally:
            for task in beside:
                task.cancel()
            await asyncio.gather(*beside, return_exceptions=True)
        self.lasted_s = time.monotonic() - self._started
        try:
            await self._add_up(before)
        except (aiohttp.ClientError, TimeoutError, ValueError) as error:
            self.problems.append(f"the gateway's counters cannot be read at the end: {error!r}")
        self._judge()

    async def _read_samples(self) -> Samples:
        async with self._session.get(self._url + "/metrics") as answer:
            return parse_samples(await answer.text())

    async def _watch(self) -> None:
        shown = 0.0
        while True:
            samples = await self._sample()
            sample = samples.get("gateway")
            if sample:
                self.samples.append(sample)
            if time.monotonic() - shown > _SHOW_EVERY_S:
                shown = time.monotonic()
                self._show(shown, sample)
            await asyncio.sleep(_SAMPLE_EVERY_S)

    async def _sample(self) -> dict[str, ProcessSample]:
        pids = await find_programs(self._arguments.status_url)
        taken = {name: take_sample(pid) for name, pid in pids.items()}
        now = time.monotonic() - self._started
        for name, one in taken.items():
            for what in ("memory_mb", "sockets", "files", "threads") if one else ():
                self.held.add(f"{name}: {what}", pids[name], now, getattr(one, what))
        if "gateway" in pids:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError):
                tasks = sum_samples(await self._read_samples(), "gateway_event_loop_tasks")
                self.held.add("gateway: tasks", pids["gateway"], now, tasks)
        return {name: one for name, one in taken.items() if one}

    def _show(self, now: float, sample: ProcessSample | None) -> None:
        tally = self.tally
        memory = f", gateway {sample.memory_mb:.0f} MB" if sample else ""
        print(
            f"{now - self._started:5.0f} s, {max(0.0, self._until - now):.0f} left: "
            f"{sum(tally.outcomes.values())} requests, {tally.count('wrong')} wrong, "
            f"{tally.count('failed')} failed{memory}",
            flush=True,
        )

    async def _disturb(self) -> None:
        """One fault after another, each once the last one has been got over; with `--endless` they
        begin again after the last.
        """
        faults = self._arguments.fault
        for fault in itertools.cycle(faults) if self._arguments.endless else faults:
            await asyncio.sleep(self._arguments.fault_pause)
            if time.monotonic() > self._until:
                return
            await self._strike(fault)

    async def _strike(self, fault: str) -> None:
        target = FAULTS[fault][0]
        pid = await find_pid(self._arguments.status_url, target)
        if pid is None:
            said = f"no {target} found; is --status the launcher's address?"
            self.problems.append(f"{fault}: {said}")
            return
        self._in_fault = True
        struck = time.monotonic()
        print(f"fault: {fault} (process {pid})", flush=True)
        await strike(pid, fault)
        await asyncio.sleep(_NOTICE_S)
        await self._wait_recovered(struck + self._arguments.recovery_limit)
        took_s = time.monotonic() - struck
        if took_s > self._arguments.recovery_limit:
            self.problems.append(f"{fault}: not over after {took_s:.0f} s")
        self.recoveries.append((fault, took_s))
        await asyncio.sleep(_AFTERMATH_S)
        self._in_fault = False
        print(f"fault: {fault} got over after {took_s:.1f} s", flush=True)

    async def _wait_recovered(self, deadline: float) -> None:
        while time.monotonic() < deadline:
            with contextlib.suppress(aiohttp.ClientError, TimeoutError, ValueError, KeyError):
                async with asyncio.timeout(5), self._session.get(self._url + "/readyz") as answer:
                    if answer.status == 200:
                        return
            await asyncio.sleep(0.5)

    async def _add_up(self, before: Samples) -> None:
        """Nothing runs any more; then the counters must add up."""
        deadline = time.monotonic() + _SETTLE_TIMEOUT_S
        inside = 1
        while inside and time.monotonic() < deadline:
            await asyncio.sleep(0.3)
            after = await self._read_samples()
            inside = count_inside(after)
        if inside:
            self.problems.append(f"{inside} sequences are still counted as running or waiting")
        if self._was_gateway_killed:
            print("counters are not compared: the gateway was killed, and with it its counters")
        else:
            self.problems += find_mismatches(self.tally, before, after)

    @property
    def _was_gateway_killed(self) -> bool:
        return any(fault == "kill-gateway" for fault, _ in self.recoveries)

    def _judge(self) -> None:
        for outcome in ("wrong", "failed"):
            if number := self.tally.count(outcome):
                self.problems.append(f"{number} requests {outcome}")
        if not self.tally.count("good"):
            self.problems.append("nothing was answered")
        growth = self.find_growth_mb()
        if growth is not None and growth > _MOST_GROWTH_MB:
            self.problems.append(f"the gateway grew by {growth:.1f} MB")
        if self.samples and self.samples[-1].sockets > 4 * self._arguments.callers + 40:
            self.problems.append(f"{self.samples[-1].sockets} sockets are open")

    def find_growth_mb(self) -> float | None:
        """From the second tenth of the run to its last: the first fills caches and pools."""
        if len(self.samples) < 20 or self._was_gateway_killed:
            return None
        tenth = len(self.samples) // 10
        early = statistics.median(one.memory_mb for one in self.samples[tenth : 2 * tenth])
        return statistics.median(one.memory_mb for one in self.samples[-tenth:]) - early
