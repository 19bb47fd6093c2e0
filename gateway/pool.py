"""Several engines as one: chooses an engine, cuts a batch into calls, sets one bad prompt apart.

Nobody above this room knows that a batch is cut or that a call was refused and halved.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

from aiohttp import web

from gateway.config import Settings
from gateway.engine import Engine, EngineState
from gateway.errors import EngineError, GatewayError, InvalidRequest, PromptRefused, Unavailable
from gateway.wire import SAMPLING_FIELDS, Answer, Completion, Prompt, Sampling


class Pool:
    """The engines behind this gateway."""

    def __init__(self, engines: Sequence[Engine], settings: Settings) -> None:
        self.engines = tuple(engines)
        self.draining = False
        self._max_prompts_per_call = settings.max_prompts_per_call
        self._changed = asyncio.Condition()

    @property
    def is_ready(self) -> bool:
        return not self.draining and any(
            engine.state is EngineState.READY for engine in self.engines
        )

    def describe(self) -> str:
        """One line for people: why there is no engine to be had."""
        if self.draining:
            return "the gateway is stopping"
        return "; ".join(
            f"{engine.url} is {engine.state}: {engine.reason}" for engine in self.engines
        )

    async def set_state(self, engine: Engine, state: EngineState, reason: str = "") -> None:
        async with self._changed:
            engine.state, engine.reason = state, reason
            self._changed.notify_all()

    async def wait_ready(self, timeout_s: float) -> bool:
        try:
            async with asyncio.timeout(timeout_s), self._changed:
                await self._changed.wait_for(lambda: self.is_ready)
        except TimeoutError:
            return False
        return True

    def choose(self) -> Engine:
        """The ready engine with the fewest sequences."""
        ready = [engine for engine in self.engines if engine.state is EngineState.READY]
        if not ready or self.draining:
            raise Unavailable(f"no engine is ready: {self.describe()}", retry_after_s=5)
        return min(ready, key=lambda engine: engine.running)

    async def generate(
        self, prompts: Sequence[Prompt], sampling: Sampling, engine: Engine | None = None
    ) -> Completion:
        """An answer or an error for each prompt, in order.

        Raises only when nothing at all was answered and the engine is to blame.
        """
        size = self._max_prompts_per_call
        pieces = [prompts[start : start + size] for start in range(0, len(prompts), size)]
        chosen = [engine or self.choose() for _ in pieces]
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._answer_piece(piece, sampling, one))
                    for piece, one in zip(pieces, chosen, strict=True)
                ]
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None  # one reason is enough for one caller
        whole = _merge([task.result() for task in tasks])
        if not any(isinstance(answer, Answer) for answer in whole.answers):
            _raise_engine_failure(whole.answers)
        return whole

    async def _answer_piece(
        self, piece: Sequence[Prompt], sampling: Sampling, engine: Engine
    ) -> Completion:
        try:
            return await engine.complete(piece, sampling)
        except InvalidRequest as error:
            # vLLM refuses a whole list for one bad prompt and does not say which.
            if error.param in SAMPLING_FIELDS:
                raise  # nothing to be halved: it refuses how it was asked, not a prompt
            if len(piece) == 1:
                refusal = PromptRefused(error.message, param=error.param, code=error.error_code)
                return Completion([refusal])
            middle = len(piece) // 2
            halves = [
                await self._answer_piece(half, sampling, engine)
                for half in (piece[:middle], piece[middle:])
            ]
            return _merge(halves)
        except (EngineError, Unavailable) as error:
            return Completion([error] * len(piece))


POOL = web.AppKey("pool", Pool)


def _merge(parts: Sequence[Completion]) -> Completion:
    return Completion(
        answers=[answer for part in parts for answer in part.answers],
        prompt_tokens=sum(part.prompt_tokens for part in parts),
        completion_tokens=sum(part.completion_tokens for part in parts),
    )


def _raise_engine_failure(answers: Sequence[Answer | GatewayError]) -> None:
    for answer in answers:
        if isinstance(answer, EngineError | Unavailable):
            raise answer
