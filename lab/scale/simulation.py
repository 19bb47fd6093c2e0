"""Many engines and thousands of callers in virtual time: the gateway's own pool, queue, attempts,
capacity, warm-up and limits before engines that only take the time they would take.

A third of the way through, a tenth of the engines die as killed processes do; two thirds through,
they are back. What the gateway itself costs is not in here: no CPU is spent in virtual time.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import aiohttp
import structlog
from aiohttp import web

from gateway.admission.keys import Caller
from gateway.admission.limits import LocalLimits
from gateway.admission.served_models import MODELS, ServedModel
from gateway.admission.tickets import Claims, LaneName, Ticket, explain_refusal, open_claim
from gateway.app import build_prompts, run_engines
from gateway.config import SETTINGS, Settings
from gateway.engines.attempt import EngineCall
from gateway.engines.engine import Engine, EngineState
from gateway.engines.pool import POOL
from gateway.errors import GatewayError
from gateway.observability.metrics import METRICS, Metrics
from gateway.observability.request_record import RequestRecord
from gateway.request_context import RequestContext
from lab.scale.service_times import ServiceTimes
from lab.scale.simulated_engine import WHOLE, SimulatedClient, SimulatedEngine
from lab.scale.virtual_time import VirtualTimeLoop, virtual_clocks

_ROUTE = "/v1/chat/completions"
_POLL_S = 0.01
_SHARE_OF_BATCHES, _SHARE_OF_SESSIONS, _SHARE_OF_LIMITED = 0.1, 0.5, 0.02
_LIMITED_PER_MINUTE = 60


@dataclass(frozen=True)
class Scenario:
    """What is simulated."""

    engines: int
    clients: int
    sequences: int = 64  # that an engine runs at once
    tokens: float = 128  # of an answer, on the mean
    think_s: float = 1.0  # between a caller's answer and their next question, on the mean
    seconds: float = 30.0
    seed: int = 1
    is_told: bool = False  # the gateway, how many sequences an engine runs

    @property
    def fails_at(self) -> float:
        return self.seconds / 3

    @property
    def returns_at(self) -> float:
        return self.seconds * 2 / 3


@dataclass
class Outcome:
    """What came of it; times in seconds."""

    scenario: Scenario
    first_token_s: list[float] = field(default_factory=list)  # of callers who wait
    queue_s: dict[LaneName, list[float]] = field(
        default_factory=lambda: {"interactive": [], "batch": []}
    )
    answered: int = 0
    tokens: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # by code
    lost: Counter[str] = field(default_factory=Counter)
    sent_again: int = 0
    limited: int = 0  # calls of the limited key that were let in
    sessions_kept: int = 0  # calls that came to the engine of their session's last one
    sessions_moved: int = 0
    known_after_s: float | None = None  # until the gateway knew what the engines run, if ever
    most_over_mean: list[float] = field(default_factory=list)  # of engines' loads
    lost_at_once: int = 0  # running on the failed ones when they failed
    out_after_s: float = 0.0  # until nothing was sent to any of them
    back_after_s: float = 0.0  # until each of them had work again
    cpu_s: float = 0.0  # of this process, for all of it


def simulate(scenario: Scenario, times: ServiceTimes) -> Outcome:
    """Always the same for the same scenario."""
    with quiet_logs(), asyncio.Runner(loop_factory=VirtualTimeLoop) as runner:
        loop = runner.get_loop()
        began = time.process_time()
        with virtual_clocks(loop):
            outcome = runner.run(Simulation(scenario, times).run())
        outcome.cpu_s = time.process_time() - began
    return outcome


@contextlib.contextmanager
def quiet_logs() -> Iterator[None]:
    """An engine that is lost is a line in the gateway's log, and here a hundred are."""
    before = structlog.get_config()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    try:
        yield
    finally:
        structlog.configure(**before)


def build_settings(scenario: Scenario) -> Settings:
    places = scenario.engines * scenario.sequences
    return Settings(
        engines=tuple(f"http://engine-{n:04}:8000" for n in range(scenario.engines)),
        prompt_style="raw",
        warmup_prompts=1,
        routing="session",
        engine_sequences=scenario.sequences if scenario.is_told else 0,
        max_running=max(4096, places * 2),
        max_waiting=max(4096, scenario.clients),
    )


class Simulation:
    """One run of a scenario."""

    def __init__(self, scenario: Scenario, times: ServiceTimes) -> None:
        self._scenario, self._times = scenario, times
        self._settings = build_settings(scenario)
        self._limits = LocalLimits()
        self._claims = Claims(self._limits)
        self._engines: dict[str, SimulatedEngine] = {}
        self._limited = Caller(name="limited", requests_per_minute=_LIMITED_PER_MINUTE)
        self._free = Caller(name="free")
        self.outcome = Outcome(scenario)

    async def run(self) -> Outcome:
        app, scenario = web.Application(), self._scenario
        app[SETTINGS], app[METRICS] = self._settings, Metrics()
        self._loop = asyncio.get_running_loop()
        prompts = build_prompts(self._settings)
        lifetime = contextlib.asynccontextmanager(run_engines)(
            app, prompts, self._limits, lambda: self._settings, self._build_engine
        )
        async with lifetime:
            pool = app[POOL]
            await pool.wait_until(lambda: all(map(_is_ready, pool.engines)), 60.0)
            self._pool, self._served = pool, app[MODELS].all[0]
            self._began = self._loop.time()
            self._ends = self._began + scenario.seconds
            watching = [
                asyncio.create_task(watch)
                for watch in (self._watch_load(), self._watch_capacity(), self._break_some())
            ]
            clients = [asyncio.create_task(self._act(n)) for n in range(scenario.clients)]
            await asyncio.gather(*clients, *watching)
        (retried,) = app[METRICS].retried_calls.collect()
        self.outcome.sent_again = int(sum(sample.value for sample in retried.samples))
        return self.outcome

    def _build_engine(
        self, url: str, settings: Settings, connector: aiohttp.BaseConnector, metrics: Metrics
    ) -> Engine:
        engine = Engine(url, settings, connector, metrics)
        simulated = SimulatedEngine(self._times, self._scenario.sequences)
        self._engines[engine.url] = simulated
        engine.client = SimulatedClient(simulated)
        return engine

    async def _act(self, number: int) -> None:
        """A caller: thinks, asks, reads, and again."""
        scenario = self._scenario
        chance = random.Random(scenario.seed * 1_000_003 + number)
        place = number / scenario.clients
        is_batch = chance.random() < _SHARE_OF_BATCHES
        is_limited = place < _SHARE_OF_LIMITED
        session = f"session {number}" if chance.random() < _SHARE_OF_SESSIONS else ""
        client = _Client(
            self._limited if is_limited else self._free,
            "batch" if is_batch else "interactive",
            session,
            is_greedy=chance.random() < 0.5,
            is_whole=chance.random() < 0.5,
        )
        await asyncio.sleep(chance.random() * scenario.think_s)
        while self._loop.time() < self._ends:
            tokens = 1 + int(chance.expovariate(1 / scenario.tokens))
            pause_s = await self._ask(client, tokens)
            await asyncio.sleep(pause_s + chance.expovariate(1 / scenario.think_s))

    async def _ask(self, client: _Client, tokens: int) -> float:
        """Seconds that the caller is told to wait before they come again."""
        outcome, served = self.outcome, self._served
        context = RequestContext("simulated", RequestRecord(_ROUTE))
        call = EngineCall(
            context,
            "POST",
            _ROUTE,
            self._settings.max_attempts,
            body=b"%d%s" % (tokens, WHOLE if client.is_whole else b""),
            is_repeatable=client.is_greedy,
            affinity=client.session,
            is_relayed=True,
        )
        has_entered = False
        try:
            with self._admitted(client) as ticket:
                if ticket.claim and (refusal := await self._limits.count(ticket.claim)):
                    raise explain_refusal(refusal, ticket.claim)
                asked_at = self._loop.time()
                async with served.queue.enter(ticket):
                    has_entered = True
                    outcome.limited += ticket.claim is not None
                    outcome.queue_s[client.lane].append(self._loop.time() - asked_at)
                    await self._read(served, call, client, asked_at)
        except GatewayError as error:
            (outcome.lost if has_entered else outcome.refused)[error.error_code] += 1
            return error.retry_after_s or 0.0
        outcome.answered += 1
        outcome.tokens += tokens
        self._note_session(client, call.asked)
        return 0.0

    @contextlib.contextmanager
    def _admitted(self, client: _Client) -> Iterator[Ticket]:
        claim = open_claim(client.caller) if client.caller.has_limits else None
        try:
            yield Ticket(1, client.lane, claim)
        finally:
            if claim is not None:
                self._claims.close(claim)

    async def _read(
        self, served: ServedModel, call: EngineCall, client: _Client, asked_at: float
    ) -> None:
        async with served.pool.attempt(call) as answer:
            if answer.body is not None:
                return
            await answer.read_chunk()
            if client.lane == "interactive":
                self.outcome.first_token_s.append(self._loop.time() - asked_at)
            while await answer.read_chunk():
                pass

    def _note_session(self, client: _Client, engine: Engine | None) -> None:
        if client.session and client.engine is not None:
            self.outcome.sessions_kept += client.engine is engine
            self.outcome.sessions_moved += client.engine is not engine
        client.engine = engine

    async def _break_some(self) -> None:
        scenario, outcome, count = self._scenario, self.outcome, len(self._engines)
        tenth = list(self._engines.values())[:: 10 if count >= 10 else 1][: max(1, count // 10)]
        of_pool = [one for one in self._pool.engines if self._engines[one.url] in tenth]
        await asyncio.sleep(scenario.fails_at)
        outcome.lost_at_once = sum(one.running for one in of_pool)
        for engine in tenth:
            engine.fail()
        failed_at = self._loop.time()
        await self._wait(lambda: not any(map(_is_ready, of_pool)))
        outcome.out_after_s = self._loop.time() - failed_at
        await asyncio.sleep(failed_at + scenario.returns_at - scenario.fails_at - self._loop.time())
        for engine in tenth:
            engine.come_back()
        returned_at = self._loop.time()
        # The first call of each is the warm-up's.
        await self._wait(lambda: all(engine.calls > 1 for engine in tenth))
        outcome.back_after_s = self._loop.time() - returned_at

    async def _watch_capacity(self) -> None:
        known = self._scenario.sequences
        await self._wait(lambda: all(one.sequences == known for one in self._pool.engines))
        if self._loop.time() < self._ends:  # else none of them was ever full
            self.outcome.known_after_s = self._loop.time() - self._began

    async def _wait(self, holds: Callable[[], bool]) -> None:
        """Or until the run is over."""
        while not holds() and self._loop.time() < self._ends:  # noqa: ASYNC110 — virtual time
            await asyncio.sleep(_POLL_S)

    async def _watch_load(self) -> None:
        """How evenly calls are spread while all is well, twice a second."""
        while self._loop.time() < self._began + self._scenario.fails_at:
            await asyncio.sleep(0.5)
            loads = [one.running for one in self._pool.engines]
            mean = sum(loads) / len(loads)
            if mean:
                self.outcome.most_over_mean.append(max(loads) / mean)


@dataclass
class _Client:
    caller: Caller
    lane: LaneName
    session: str
    is_greedy: bool  # so its calls may be sent again
    is_whole: bool  # else its answers are streams
    engine: Engine | None = None  # of the last answer


def _is_ready(engine: Engine) -> bool:
    return engine.state is EngineState.READY
