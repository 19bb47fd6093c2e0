"""A batch of prompts over the engines: cut into calls, put together, a bad prompt set apart.

Nobody above knows that a batch is cut, that a call was refused and halved, or that an engine died
under it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

from gateway.config import Settings
from gateway.engines.attempt import EngineCall, may_run_again
from gateway.engines.engine import Engine
from gateway.engines.pool import EnginePool
from gateway.errors import EngineError, GatewayError, InvalidRequest, PromptRefused, Unavailable
from gateway.observability.metrics import Metrics
from gateway.request_context import RequestContext
from gateway.schemas.predict import SAMPLING_FIELDS
from gateway.schemas.vllm import (
    Completion,
    GeneratedText,
    Prompt,
    Sampling,
    build_completion_call,
    parse_completion_answer,
)

# Fewer prompts than this are not worth a call of their own on a second engine.
_SMALLEST_SHARE = 16

OnAnswer = Callable[[int, GeneratedText], None]


@dataclass(slots=True)
class _Batch:
    """The answers so far, by place."""

    prompts: Sequence[Prompt]
    sampling: Sampling
    context: RequestContext
    engine: Engine | None
    on_answer: OnAnswer
    answers: list[GeneratedText | GatewayError | None]
    cost: Completion = field(default_factory=lambda: Completion([]))

    @property
    def is_repeatable(self) -> bool:
        return self.sampling.temperature == 0

    def put(self, places: Sequence[int], completion: Completion) -> None:
        for place, answer in zip(places, completion.answers, strict=True):
            self.answers[place] = answer
            if isinstance(answer, GeneratedText):
                self.on_answer(place, answer)
        self.cost.prompt_tokens += completion.prompt_tokens
        self.cost.completion_tokens += completion.completion_tokens


class BatchGenerator:
    """Has every prompt of a batch answered, or says why it is not."""

    def __init__(self, pool: EnginePool, settings: Settings, metrics: Metrics) -> None:
        self._pool = pool
        self._settings = settings
        self._metrics = metrics

    async def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        context: RequestContext,
        *,
        engine: Engine | None = None,
        on_answer: OnAnswer = lambda _place, _answer: None,
    ) -> Completion:
        """An answer or an error for each prompt, in order. With `engine` given, by that one alone,
        as a warm-up must.
        """
        batch = _Batch(prompts, sampling, context, engine, on_answer, [None] * len(prompts))
        n_engines = 1 if engine else sum(one.is_usable for one in self._pool.engines)
        pieces = cut(prompts, sampling, n_engines, self._settings.max_prompts_per_call)
        tries = self._settings.max_attempts
        try:
            async with asyncio.TaskGroup() as group:
                for piece in pieces:
                    group.create_task(self._answer(batch, piece, tries))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None  # one reason is enough for one caller
        answers = [answer for answer in batch.answers if answer is not None]
        return Completion(answers, batch.cost.prompt_tokens, batch.cost.completion_tokens)

    async def _answer(
        self, batch: _Batch, places: Sequence[int], tries: int, avoid: Engine | None = None
    ) -> None:
        """Asks until each place has an answer, or an error that another try would not mend."""
        prompts = [batch.prompts[place] for place in places]
        call = EngineCall(
            batch.context,
            "POST",
            "/v1/completions",
            tries,
            body=lambda engine: build_completion_call(_model_of(engine), prompts, batch.sampling),
            sequences=len(prompts),
            is_repeatable=batch.is_repeatable,
            engine=batch.engine,
            avoid=avoid,
            parse=partial(parse_completion_answer, n_prompts=len(prompts)),
            n_prompts=len(prompts),
        )
        try:
            async with self._pool.attempt(call) as answer:
                completion: Completion = answer.value
        except InvalidRequest as refusal:
            await self._set_apart(batch, places, refusal, call.tries_left + 1)
        except (EngineError, Unavailable) as error:
            for place in places:
                batch.answers[place] = error
        else:
            batch.put(places, completion)
            await self._run_lost_again(batch, places, call)

    async def _set_apart(
        self, batch: _Batch, places: Sequence[int], refusal: InvalidRequest, tries: int
    ) -> None:
        """vLLM refuses a whole list for one bad prompt and does not say which."""
        if refusal.param in SAMPLING_FIELDS:
            raise refusal  # nothing to be halved: it refuses how it was asked, not a prompt
        if len(places) == 1:
            batch.answers[places[0]] = PromptRefused(
                refusal.message, param=refusal.param, code=refusal.error_code
            )
            return
        middle = len(places) // 2
        await self._answer(batch, places[:middle], tries)
        await self._answer(batch, places[middle:], tries)

    async def _run_lost_again(self, batch: _Batch, places: Sequence[int], call: EngineCall) -> None:
        """What an engine gave up within a call that it answered."""
        if batch.engine is not None or call.tries_left <= 0:
            return
        lost = [
            place
            for place in places
            if may_run_again(batch.answers[place], is_repeatable=batch.is_repeatable)
        ]
        if not lost:
            return
        reason = batch.answers[lost[0]]
        if isinstance(reason, GatewayError):
            self._metrics.retried_calls.labels(reason.error_code).inc()
        self._metrics.retried.inc(len(lost))
        await self._answer(batch, lost, call.tries_left, call.asked)


def _model_of(engine: Engine) -> str:
    return engine.card.name if engine.card else ""


def cut(prompts: Sequence[Prompt], sampling: Sampling, n_engines: int, most: int) -> list[range]:
    """Pieces of about equal work, as many as there are engines, none longer than `most`."""
    shares = max(1, min(n_engines, len(prompts) // _SMALLEST_SHARE))
    weights = [len(prompt) + sampling.max_tokens for prompt in prompts]
    share = sum(weights) / shares
    pieces: list[range] = []
    start, weight = 0, 0.0
    for place, one in enumerate(weights):
        weight += one
        is_full = weight >= share - one / 2 and len(pieces) + 1 < shares
        if is_full or place + 1 - start == most or place + 1 == len(prompts):
            pieces.append(range(start, place + 1))
            start, weight = place + 1, 0.0
    return pieces
