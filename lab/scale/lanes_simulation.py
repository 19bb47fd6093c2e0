"""A batch beside callers who wait, in virtual time: the gateway's own window, queue and pool before
an engine whose steps take the longer the more sequences are in them.

For a while callers are alone; then a batch with more lines than will ever run joins them.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import aiohttp
from aiohttp import web

from gateway.admission.limits import LocalLimits
from gateway.admission.served_models import MODELS, ServedModel
from gateway.admission.tickets import LaneName, Ticket
from gateway.app import build_prompts, run_engines
from gateway.batches.window import Window, Windows
from gateway.config import SETTINGS, Settings
from gateway.engines.attempt import EngineCall
from gateway.engines.engine import Engine
from gateway.engines.pool import POOL
from gateway.observability.metrics import METRICS, Metrics
from gateway.observability.request_record import RequestRecord
from gateway.request_context import RequestContext
from lab.scale.service_times import ServiceTimes
from lab.scale.simulated_engine import SimulatedClient, SimulatedEngine
from lab.scale.simulation import quiet_logs
from lab.scale.virtual_time import VirtualTimeLoop, virtual_clocks

_PATH = "/v1/chat/completions"
_READY_S = 60.0
# Fitted to vLLM 0.32.0 on two CPU cores with the demo model, whose streams took 16 ms to the first
# token alone, 22 beside 8 lines, 33 beside 32, 38 beside 64 and 55 beside 128, in the middle.
CPU_TIMES = ServiceTimes(intake_s=0.002, first_s=0.009, step_s=0.0044, step_more_s=0.00033)


@dataclass(frozen=True)
class LaneScenario:
    """Callers alone for a third of the time; beside the batch until it is known what they bear for
    another, and for the last.
    """

    callers: int = 4
    think_s: float = 0.5
    answer_tokens: int = 32
    line_tokens: int = 128
    sequences: int = 256
    seconds: float = 300.0
    follows_first_tokens: bool = True  # else a quarter of the window, whatever that does
    seed: int = 1


@dataclass
class LaneOutcome:
    """Seconds to the first token, by third; lines of the batch in the last one."""

    first_s: tuple[list[float], list[float], list[float]] = field(
        default_factory=lambda: ([], [], [])
    )
    lines: int = 0
    most_lines: int = 0  # that ran at once in the last third


def simulate_lanes(scenario: LaneScenario, times: ServiceTimes) -> LaneOutcome:
    """Always the same for the same scenario."""
    with (
        quiet_logs(),
        asyncio.Runner(loop_factory=VirtualTimeLoop) as runner,
        virtual_clocks(runner.get_loop()),
    ):
        return runner.run(LaneSimulation(scenario, times).run())


class LaneSimulation:
    """One run of a scenario."""

    def __init__(self, scenario: LaneScenario, times: ServiceTimes) -> None:
        self._scenario, self._times = scenario, times
        self._settings = Settings(
            engines=("http://engine:8000",),
            prompt_style="raw",
            warmup_prompts=1,
            engine_sequences=scenario.sequences,
        )
        self.outcome = LaneOutcome()

    async def run(self) -> LaneOutcome:
        scenario, loop = self._scenario, asyncio.get_running_loop()
        async with self._serve() as (served, windows):
            self._served, self._began = served, loop.time()
            callers = [asyncio.create_task(self._act(n)) for n in range(scenario.callers)]
            await asyncio.sleep(scenario.seconds / 3)
            window = windows.find(served.name)
            lines = [asyncio.create_task(self._run_lines(window)) for _ in range(windows.most)]
            await asyncio.gather(*callers)
            for line in lines:
                line.cancel()
            await asyncio.gather(*lines, return_exceptions=True)
        return self.outcome

    @contextlib.asynccontextmanager
    async def _serve(self) -> AsyncIterator[tuple[ServedModel, Windows]]:
        app = web.Application()
        app[SETTINGS], app[METRICS] = self._settings, Metrics()
        lifetime = contextlib.asynccontextmanager(run_engines)(
            app,
            build_prompts(self._settings),
            LocalLimits(),
            lambda: self._settings,
            self._build_engine,
        )
        async with lifetime:
            await app[POOL].wait_ready(_READY_S)
            (served,) = app[MODELS].all
            windows = Windows(
                self._settings.batch_max_running,
                lambda: sum(served.queue.count("interactive")),
                lambda _name: served.first_tokens if self._scenario.follows_first_tokens else None,
            )
            yield served, windows

    def _build_engine(
        self, url: str, settings: Settings, connector: aiohttp.BaseConnector, metrics: Metrics
    ) -> Engine:
        engine = Engine(url, settings, connector, metrics)
        engine.client = SimulatedClient(SimulatedEngine(self._times, self._scenario.sequences))
        return engine

    @property
    def _third(self) -> int:
        now = asyncio.get_running_loop().time()
        return min(2, int((now - self._began) * 3 / self._scenario.seconds))

    async def _act(self, number: int) -> None:
        scenario, loop = self._scenario, asyncio.get_running_loop()
        chance = random.Random(scenario.seed * 1_000_003 + number)
        while loop.time() < self._began + scenario.seconds:
            await asyncio.sleep(chance.expovariate(1 / scenario.think_s))
            third, lines = self._third, self._served.queue.count("batch")[0]
            first_s = await self._ask("interactive", scenario.answer_tokens)
            self._served.first_tokens.learn(first_s, lines)  # as the relay does
            self.outcome.first_s[third].append(first_s)
            if third == 2:
                self.outcome.most_lines = max(self.outcome.most_lines, lines)

    async def _run_lines(self, window: Window) -> None:
        loop = asyncio.get_running_loop()
        while True:
            slot = await window.enter(window.clock + 1.0)
            try:
                await self._ask("batch", self._scenario.line_tokens)
            except BaseException:
                slot.leave()
                raise
            slot.leave("answered")
            self.outcome.lines += loop.time() > self._began + self._scenario.seconds * 2 / 3

    async def _ask(self, lane: LaneName, tokens: int) -> float:
        """Seconds to the first token."""
        loop, context = asyncio.get_running_loop(), RequestContext("lanes", RequestRecord(_PATH))
        call = EngineCall(context, "POST", _PATH, 1, body=b"%d" % tokens)
        async with self._served.queue.enter(Ticket(1, lane)):
            began = loop.time()
            async with self._served.pool.attempt(call) as answer:
                await answer.read_chunk()
                first_s = loop.time() - began
                while await answer.read_chunk():
                    pass
        return first_s
