"""Ready means warm: watches each engine and lets it serve only after it has answered a batch of the
shape it will serve: completions, or what its model makes of texts instead. An engine that went away
is warmed again when it is back.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import time
import uuid
from dataclasses import replace
from functools import partial

import structlog

from common.questions import BadQuestions, read_questions
from gateway.config import Settings, SettingsError
from gateway.engines.attempt import EngineCall
from gateway.engines.capacity import EngineCapacity
from gateway.engines.engine import Engine, EngineState
from gateway.engines.lists.batch import BatchGenerator
from gateway.engines.pool import EnginePool
from gateway.errors import (
    EngineError,
    EngineTimeout,
    GatewayError,
    InvalidRequest,
    RouteNotServed,
    Unavailable,
)
from gateway.observability.metrics import Metrics
from gateway.observability.request_record import RequestRecord
from gateway.prompts.builders import PromptBuilders
from gateway.request_context import RequestContext
from gateway.schemas.predict import default_sampling
from gateway.schemas.vllm import (
    CompletionStream,
    Prompt,
    Sampling,
    build_completion_call,
    parse_completion_answer,
)
from gateway.schemas.warmup import WARMUP_ROUTES, build_warmup_call, parse_warmup_answer

log = structlog.get_logger("gateway")
_SHORTEST_PAUSE_S = 0.02
_STREAMED_TOKENS = 2  # a stream has a first event and a second one


class Warmup:
    """One watch an engine; the only writer of engine states."""

    def __init__(
        self,
        settings: Settings,
        pool: EnginePool,
        generator: BatchGenerator,
        prompts: PromptBuilders,
        metrics: Metrics,
        *,
        capacity: EngineCapacity,
    ) -> None:
        self._settings = settings
        self._pool = pool
        self._capacity = capacity
        self._generator = generator
        self._prompts = prompts
        self._metrics = metrics
        self._questions = read_warmup_questions(settings)

    async def watch(self, engine: Engine) -> None:
        """Keeps `engine.state` true for as long as the engine is one of the pool's."""
        failures = 0
        self._metrics.warmups.labels(engine.url, "failed")  # counted from zero
        while engine in self._pool.engines:
            try:
                await self._look(engine)
                failures = 0
            except (GatewayError, TimeoutError) as error:
                failures += 1
                reason = str(error) or "it did not answer in time"
                self._metrics.warmups.labels(engine.url, "failed").inc()
                await self._pool.set_state(engine, EngineState.DOWN, f"warm-up failed: {reason}")
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
                log.warning("engine_lost", engine=engine.url, reason=engine.ailment)
            await self._pool.set_state(engine, EngineState.DOWN, engine.ailment)
        elif engine.state is not EngineState.READY:
            await self._warm(engine)
        elif engine.suspect.is_set():
            if engine.is_on_trial:
                await self._try(engine)
            await self._pool.set_state(engine, EngineState.READY)
        else:
            await self._capacity.look(engine)

    async def _warm(self, engine: Engine) -> None:
        await self._pool.set_state(engine, EngineState.WARMING, "answering its warm-up")
        cards = await engine.read_model_cards()
        if not cards:
            raise EngineError("it serves no model", code="no_model")
        await self._pool.set_cards(engine, cards)
        engine.pools_at = ""
        await self._capacity.ask(engine)
        started = time.perf_counter()
        async with asyncio.timeout(self._settings.warmup_timeout_s):
            tokens = await self._ask(
                engine, self._settings.warmup_prompts, self._settings.max_tokens
            )
        took_s = time.perf_counter() - started
        self._metrics.warmup_seconds.labels(engine.url).set(took_s)
        self._metrics.warmups.labels(engine.url, "done").inc()
        log.info(
            "warmup_done",
            engine=engine.url,
            model=cards[0].name,
            n_prompts=self._settings.warmup_prompts,
            tokens=tokens,
            pools_at=engine.pools_at or None,
            duration_s=round(took_s, 3),
        )
        await self._pool.set_state(engine, EngineState.READY)

    async def _try(self, engine: Engine) -> None:
        """A question of our own tells whether the engine is at fault or those who asked it; where
        streams broke off, a second one that is answered as a stream.
        """
        has_failed: bool | None = False
        try:
            async with asyncio.timeout(self._settings.probe_timeout_s):
                await self._ask(engine, n_prompts=1, max_tokens=1)
                if engine.has_broken_streams and not engine.pools_at:
                    await self._read_stream(engine)
        except (TimeoutError, EngineTimeout, Unavailable):
            has_failed = None
        except GatewayError as error:
            has_failed = True
            log.warning("engine_failed_trial", engine=engine.url, reason=str(error))
        engine.note_trial(has_failed=has_failed)

    async def _ask(self, engine: Engine, n_prompts: int, max_tokens: int) -> int:
        """By what it serves; the tokens of that. An engine says nowhere what its model is for, but
        it has no other routes.
        """
        questions = list(itertools.islice(itertools.cycle(self._questions), n_prompts))
        if not engine.pools_at:
            try:
                return await self._generate(engine, questions, max_tokens)
            except RouteNotServed:
                log.info("engine_makes_no_text", engine=engine.url)
        return await self._pool_texts(engine, questions)

    async def _pool_texts(self, engine: Engine, texts: list[str]) -> int:
        texts = texts[: self._settings.max_prompts_per_call]
        refusal: InvalidRequest | None = None
        for path in (engine.pools_at,) if engine.pools_at else WARMUP_ROUTES:
            try:
                async with self._pool.attempt(_build_call(engine, path, texts)) as answer:
                    engine.pools_at = path
                    return int(answer.value)
            except RouteNotServed:
                continue
            except InvalidRequest as error:
                refusal = error
        if refusal is not None:
            # It answers, but takes no texts alone: pictures, say. Its callers know what it takes.
            log.warning("warmup_refused", engine=engine.url, reason=refusal.message)
            return 0
        raise EngineError(
            "it has none of the routes by which engines are warmed: /v1/completions, "
            + ", ".join(WARMUP_ROUTES),
            code="no_route",
        )

    async def _read_stream(self, engine: Engine) -> None:
        """To its end, or it is the engine that breaks them off."""
        prompts, sampling = await self._build(engine, self._questions[:1], _STREAMED_TOKENS)
        call = EngineCall(
            _make_context(),
            "POST",
            "/v1/completions",
            tries_left=1,
            body=build_completion_call(_name_model(engine), prompts, sampling, is_stream=True),
            is_stream=True,
            engine=engine,
            parse=partial(parse_completion_answer, n_prompts=1),
        )
        with contextlib.suppress(InvalidRequest):  # no streams for this question: none is broken
            async with self._pool.attempt(call) as answer:
                stream, has_ended = CompletionStream(1), answer.body is not None
                while answer.body is None and (chunk := await answer.read_chunk()):
                    for _sequence in stream.read(chunk):
                        has_ended = True
                if not has_ended:
                    raise EngineError("its stream ended too early", code="engine_garbled")

    async def _build(
        self, engine: Engine, questions: list[str], max_tokens: int
    ) -> tuple[list[Prompt], Sampling]:
        builder = self._prompts.find(_name_model(engine))
        prompts = await builder.build(questions, None, engine.max_model_len)
        good = [prompt for prompt in prompts if not isinstance(prompt, GatewayError)]
        if not good:
            raise next(prompt for prompt in prompts if isinstance(prompt, GatewayError))
        if engine.max_model_len is not None:
            # A model with a short context still warms up; asked for more than it has, it refuses.
            max_tokens = min(max_tokens, engine.max_model_len - 1)
        sampling = replace(default_sampling(self._settings), max_tokens=max_tokens)
        return good, builder.complete(sampling)

    async def _generate(self, engine: Engine, questions: list[str], max_tokens: int) -> int:
        prompts, sampling = await self._build(engine, questions, max_tokens)
        completion = await self._generator.generate(
            prompts, sampling, _make_context(), engine=engine
        )
        for answer in completion.answers:
            if isinstance(answer, GatewayError):
                raise answer
        engine.fingerprint = completion.fingerprint
        return completion.completion_tokens


def _name_model(engine: Engine) -> str:
    return engine.card.name if engine.card else ""


def _build_call(engine: Engine, path: str, texts: list[str]) -> EngineCall:
    context = _make_context()
    body, kind = build_warmup_call(path, _name_model(engine), texts)
    context.carried = {"Content-Type": kind}
    return EngineCall(
        context,
        "POST",
        path,
        tries_left=1,
        body=body,
        sequences=len(texts),
        engine=engine,
        parse=partial(parse_warmup_answer, path=path, n_texts=len(texts)),
    )


def _make_context() -> RequestContext:
    return RequestContext(f"warmup-{uuid.uuid4().hex[:12]}", RequestRecord("warmup"))


def read_warmup_questions(settings: Settings) -> list[str]:
    """A bad file stops the start."""
    try:
        read = read_questions(settings.warmup_file, needs_answers=False)
    except BadQuestions as error:
        raise SettingsError(f"GATEWAY_WARMUP_FILE: {error}") from None
    return [pair.question for pair in read.pairs]
