"""Identical greedy prompts are generated once: of one batch, or on their way for another one."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Self

from gateway.config import Settings
from gateway.engines.batch import BatchGenerator, Gate
from gateway.engines.timeouts import Deadline
from gateway.errors import EngineError, GatewayError, Unavailable
from gateway.observability.metrics import Metrics
from gateway.request_context import RequestContext
from gateway.schemas.vllm import Completion, GeneratedText, Prompt, Sampling

# Bytes keep their hash, tuples do not. A gateway's prompts are all texts or all tokens.
_Key = bytes
_BYTES_AT_ONCE = 2**21  # between two looks at the event loop
_Shared = asyncio.Future[GeneratedText | GatewayError]


class Deduplicator:
    """What /predict asks for its answers."""

    def __init__(self, generator: BatchGenerator, settings: Settings, metrics: Metrics) -> None:
        self._generator = generator
        self._is_on = settings.dedup
        self._metrics = metrics
        self._in_flight: dict[_Key, _Shared] = {}

    async def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        context: RequestContext,
        gate: Gate | None = None,
    ) -> Completion:
        """An answer or an error for each prompt, in order, let in by the gate.

        Raises only when nothing at all was answered and an engine is to blame.
        """
        if self._is_on and sampling.temperature == 0:
            whole = await self._generate_once(prompts, sampling, context, gate)
        else:
            whole = await self._generator.generate(prompts, sampling, context, gate=gate)
        if not any(isinstance(answer, GeneratedText) for answer in whole.answers):
            for answer in whole.answers:
                if isinstance(answer, EngineError | Unavailable):
                    raise answer
        return whole

    async def _generate_once(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        context: RequestContext,
        gate: Gate | None,
    ) -> Completion:
        head = repr(sampling).encode()
        keys = await _build_keys(head, prompts)
        wanted = dict(zip(keys, prompts, strict=True))
        others = {key: self._in_flight[key] for key in wanted if key in self._in_flight}
        own = {key: prompt for key, prompt in wanted.items() if key not in others}
        known: dict[_Key, GeneratedText | GatewayError] = {}
        whole = Completion([])
        if own:
            with _Shares(self._in_flight, list(own)) as shares:
                whole = await self._generator.generate(
                    list(own.values()), sampling, context, gate=gate, on_answer=shares.settle
                )
                known.update(zip(own, whole.answers, strict=True))
                shares.settle_rest(whole.answers)
        if others and gate is not None:
            gate.give_all_back()  # or those whose answers are awaited would find no room for them
        async with Deadline(context.deadline):
            known.update(await _collect(others))
        lost = {key: prompt for key, prompt in wanted.items() if key not in known}
        if lost:  # whoever asked for them has hung up, or failed
            rest = await self._generator.generate(list(lost.values()), sampling, context, gate=gate)
            known.update(zip(lost, rest.answers, strict=True))
            whole.prompt_tokens += rest.prompt_tokens
            whole.completion_tokens += rest.completion_tokens
        whole.answers = [known[key] for key in keys]
        whole.shared = len(prompts) - len(own) - len(lost)
        self._metrics.deduplicated.inc(whole.shared)
        return whole


class _Shares:
    """A batch's prompts, for others to wait for: each is settled as soon as its answer is there."""

    def __init__(self, in_flight: dict[_Key, _Shared], keys: Sequence[_Key]) -> None:
        self._in_flight, self._keys = in_flight, keys
        loop = asyncio.get_running_loop()
        # Of its own: once settled, a key in flight may be another request's.
        self._unsettled: dict[_Key, _Shared] = {key: loop.create_future() for key in keys}
        in_flight.update(self._unsettled)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Whoever still waits asks for themselves."""
        for key, future in self._unsettled.items():
            del self._in_flight[key]
            future.cancel()

    def settle(self, place: int, answer: GeneratedText | GatewayError) -> None:
        future = self._unsettled.pop(self._keys[place], None)
        if future is not None:
            del self._in_flight[self._keys[place]]
            future.set_result(answer)

    def settle_rest(self, answers: Sequence[GeneratedText | GatewayError]) -> None:
        for place, answer in enumerate(answers):
            self.settle(place, answer)


async def _build_keys(head: bytes, prompts: Sequence[Prompt]) -> list[_Key]:
    keys, size = [], 0
    for one in prompts:
        key = head + (one.encode() if isinstance(one, str) else one.tobytes())
        hash(key)  # which bytes keep: of megabytes that takes as long as the rest
        keys.append(key)
        size += len(key)
        if size > _BYTES_AT_ONCE:
            size = 0
            await asyncio.sleep(0)
    return keys


async def _collect(others: dict[_Key, _Shared]) -> dict[_Key, GeneratedText]:
    """The good answers among them, once all are there."""
    if others:
        await asyncio.wait(others.values())
    return {
        key: answer
        for key, future in others.items()
        if not future.cancelled() and isinstance(answer := future.result(), GeneratedText)
    }
