"""Ready means warm: watches each engine and lets it serve only after it has answered a batch of the
shape it will serve. An engine that went away is warmed again when it is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import replace

import orjson
import structlog
from aiohttp import web

from gateway.admission.ledger import LEDGER, Ledger, Row
from gateway.config import SETTINGS, Settings, SettingsError, read_worker
from gateway.engines.engine import Engine, EngineState, hide_password
from gateway.engines.pool import ENGINE_LIST, POOL, Pool
from gateway.errors import EngineError, GatewayError
from gateway.observability.metrics import METRICS, Metrics
from gateway.observability.trace import Trace
from gateway.prompts.builder import PROMPTS, PromptBuilder
from gateway.schemas.wire import default_sampling

log = structlog.get_logger("gateway")
_SHORTEST_PAUSE_S = 0.02
_IS_WARM = 1  # field of an engine's row in the ledger


class Warmup:
    """One watch an engine; the only writer of engine states."""

    def __init__(
        self,
        settings: Settings,
        pool: Pool,
        builder: PromptBuilder,
        metrics: Metrics,
        ledger: Ledger,
    ) -> None:
        self._ledger = ledger
        self._worker = read_worker()
        self._settings = settings
        self._pool = pool
        self._builder = builder
        self._metrics = metrics
        self._questions = read_questions(settings)

    async def watch(self, engine: Engine) -> None:
        """Keeps `engine.state` true for as long as the engine is one of the pool's."""
        failures = 0
        self._metrics.warmups.labels(engine.url, "failed")  # counted from nought
        while engine in self._pool.engines:
            try:
                await self._look(engine)
                failures = 0
            except (GatewayError, TimeoutError) as error:
                failures += 1
                reason = str(error) or "it did not answer in time"
                self._metrics.warmups.labels(engine.url, "failed").inc()
                await self._set(engine, EngineState.DOWN, f"warm-up failed: {reason}")
                log.warning("warmup_failed", engine=engine.url, reason=reason)
            pause_s = self._settings.probe_interval_s * min(2**failures, 30)
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(pause_s):
                    await engine.suspect.wait()
            # Traffic that saw a failure asks for a look at once, but never in a tight loop.
            await asyncio.sleep(_SHORTEST_PAUSE_S)

    async def _look(self, engine: Engine) -> None:
        if not await engine.is_healthy():
            if engine.state is not EngineState.DOWN:
                log.warning("engine_lost", engine=engine.url)
            await self._set(engine, EngineState.DOWN, "it does not answer GET /health")
        elif engine.state is not EngineState.READY:
            await self._warm(engine)
        elif engine.suspect.is_set():
            await self._set(engine, EngineState.READY)

    async def _warm(self, engine: Engine) -> None:
        await self._set(engine, EngineState.WARMING, "answering its warm-up")
        cards = await engine.read_model_cards()
        if not cards:
            raise EngineError("it serves no model", code="no_model")
        engine.card = cards[0]
        if self._worker.index > 0:
            await self._follow_first_worker(engine)
            return
        started = time.perf_counter()
        async with asyncio.timeout(self._settings.warmup_timeout_s):
            tokens = await self._run_batch(engine)
        took_s = time.perf_counter() - started
        self._metrics.warmup_seconds.labels(engine.url).set(took_s)
        self._metrics.warmups.labels(engine.url, "done").inc()
        log.info(
            "warmup_done",
            engine=engine.url,
            model=engine.card.name,
            n_prompts=self._settings.warmup_prompts,
            completion_tokens=tokens,
            duration_s=round(took_s, 3),
        )
        await self._set(engine, EngineState.READY)

    async def _run_batch(self, engine: Engine) -> int:
        questions = list(
            itertools.islice(itertools.cycle(self._questions), self._settings.warmup_prompts)
        )
        prompts = await self._builder.build(questions, None, engine.max_model_len)
        good = [prompt for prompt in prompts if not isinstance(prompt, GatewayError)]
        if not good:
            raise next(prompt for prompt in prompts if isinstance(prompt, GatewayError))
        sampling = default_sampling(self._settings)
        if engine.max_model_len is not None:
            # A model with a short context still warms up; asked for more than it has, it refuses.
            sampling = replace(
                sampling, max_tokens=min(sampling.max_tokens, engine.max_model_len - 1)
            )
        trace = Trace(f"warmup-{uuid.uuid4().hex[:12]}", "warmup")
        completion = await self._pool.generate(
            good, self._builder.complete(sampling), engine, trace
        )
        for answer in completion.answers:
            if isinstance(answer, GatewayError):
                raise answer
        return completion.completion_tokens

    async def _follow_first_worker(self, engine: Engine) -> None:
        """The first worker warms for all; the others believe it."""
        if self._row(engine)[_IS_WARM]:
            await self._set(engine, EngineState.READY)
        else:
            await self._set(engine, EngineState.WARMING, "the first worker is warming it")

    def _row(self, engine: Engine) -> Row:
        return self._ledger.row(f"engine:{engine.url}")

    async def _set(self, engine: Engine, state: EngineState, reason: str = "") -> None:
        if self._worker.index == 0:
            self._row(engine)[_IS_WARM] = state is EngineState.READY
        await self._pool.set_state(engine, state, reason)


def read_questions(settings: Settings) -> list[str]:
    """The warm-up's questions; a bad file stops the start."""
    questions = []
    path = settings.warmup_file
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            questions.append(str(orjson.loads(line)["question"]))
        except (orjson.JSONDecodeError, KeyError, TypeError):
            raise SettingsError(
                f'GATEWAY_WARMUP_FILE: line {number} of {path} is not {{"question": "…"}}'
            ) from None
    if not questions:
        raise SettingsError(f"GATEWAY_WARMUP_FILE: {path} holds no question")
    return questions


async def run_warmup(app: web.Application) -> AsyncIterator[None]:
    """The watches live as long as the app; an engine added to the settings file gets one too."""
    warmup = Warmup(app[SETTINGS], app[POOL], app[PROMPTS], app[METRICS], app[LEDGER])
    watches = {
        engine.url: asyncio.create_task(warmup.watch(engine)) for engine in app[POOL].engines
    }

    async def follow_settings() -> None:
        while True:
            await asyncio.sleep(app[SETTINGS].reload_interval_s)
            urls = app[ENGINE_LIST].read_if_changed()
            if urls is not None:
                await _change_engines(app, warmup, watches, urls)

    follower = asyncio.create_task(follow_settings())
    yield
    for task in (follower, *watches.values()):
        task.cancel()
    await asyncio.gather(follower, *watches.values(), return_exceptions=True)


async def _change_engines(
    app: web.Application,
    warmup: Warmup,
    watches: dict[str, asyncio.Task[None]],
    urls: Sequence[str],
) -> None:
    """Engines that are gone finish what they have: nothing new goes there."""
    known = {engine.url: engine for engine in app[POOL].engines}
    engines = []
    for url in urls:
        engine = known.get(hide_password(url))
        if engine is None:
            engine = app[ENGINE_LIST].build(url)
        else:
            engine.change_password(url)
        engines.append(engine)
    await app[POOL].set_engines(engines)
    for url in known.keys() - set(map(hide_password, urls)):
        watches.pop(url).cancel()
        log.info("engine_removed", engine=url)
    for engine in engines:
        if engine.url not in known:
            watches[engine.url] = asyncio.create_task(warmup.watch(engine))
            log.info("engine_added", engine=engine.url)
