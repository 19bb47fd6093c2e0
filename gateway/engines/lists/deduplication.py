"""Identical greedy prompts are generated once: of one batch, or on their way for another one."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Self, TypeAlias

from gateway.config import Settings
from gateway.engines.lists.batch import BatchGenerator
from gateway.engines.lists.feeding import Gate
from gateway.engines.timeouts import Deadline
from gateway.errors import EngineError, Unavailable
from gateway.observability.metrics import Metrics
from gateway.request_context import RequestContext
from gateway.schemas.fields import are_texts
from gateway.schemas.vllm import Answer, Completion, Prompt, Sampling

# Texts and bytes keep their hash, tuples do not. A gateway's prompts are all texts or all tokens.
_Key: TypeAlias = "str | bytes"
_BYTES_AT_ONCE = 2**21  # between two looks at the event loop
_LARGEST_ITEM = 4  # bytes of a character, or of a token's id


class Deduplicator:
    """What /predict asks for its answers."""

    def __init__(self, generator: BatchGenerator, settings: Settings, metrics: Metrics) -> None:
        self._generator = generator
        self._is_on = settings.dedup
        self._metrics = metrics
        # By how they are drawn, then by prompt: whose they are.
        self._in_flight: dict[Sampling, dict[_Key, _Shares]] = {}

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
        if not any(isinstance(answer, str) for answer in whole.answers):
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
        keys = await _build_keys(prompts)
        wanted = dict(zip(keys, prompts, strict=True))
        in_flight = self._in_flight.setdefault(sampling, {})
        others = {key: in_flight[key].wait(key) for key in in_flight.keys() & wanted.keys()}
        own = {key: one for key, one in wanted.items() if key not in others} if others else wanted
        whole = Completion([])
        try:
            if own:
                with _Shares(in_flight, list(own)) as shares:
                    whole = await self._generator.generate(
                        list(own.values()), sampling, context, gate=gate, on_answers=shares.settle
                    )
                    shares.settle_rest(whole.answers)
        finally:
            if not in_flight and self._in_flight.get(sampling) is in_flight:
                del self._in_flight[sampling]
        if len(own) == len(prompts):
            return whole
        known: dict[_Key, Answer] = dict(zip(own, whole.answers, strict=True))
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

    def __init__(self, in_flight: dict[_Key, _Shares], keys: Sequence[_Key]) -> None:
        self._in_flight, self._keys = in_flight, keys
        self._awaited: dict[_Key, asyncio.Future[Answer]] = {}  # those that somebody waits for
        self._is_settled = False  # as a whole
        in_flight.update(dict.fromkeys(keys, self))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        """Whoever still waits asks for themselves."""
        if not self._is_settled:
            self._forget(self._keys)
        for future in self._awaited.values():
            future.cancel()

    def wait(self, key: _Key) -> asyncio.Future[Answer]:
        """The same for all who wait for it."""
        if key not in self._awaited:
            self._awaited[key] = asyncio.get_running_loop().create_future()
        return self._awaited[key]

    def settle(self, places: Sequence[int], answers: Sequence[Answer]) -> None:
        """The good ones: others may be asked again."""
        if len(answers) == len(self._keys) and are_texts(answers):
            self.settle_rest(answers)
            return
        for place, answer in zip(places, answers, strict=True):
            if isinstance(answer, str):
                self._tell(self._keys[place], answer)
                self._forget((self._keys[place],))

    def settle_rest(self, answers: Sequence[Answer]) -> None:
        """All of them, as far as they are not settled yet."""
        if self._is_settled:
            return
        self._is_settled = True
        self._forget(self._keys)
        if self._awaited:
            for key, answer in zip(self._keys, answers, strict=True):
                self._tell(key, answer)

    def _tell(self, key: _Key, answer: Answer) -> None:
        future = self._awaited.pop(key, None)
        if future is not None:
            future.set_result(answer)

    def _forget(self, keys: Sequence[_Key]) -> None:
        """Once settled, a key in flight may be another request's."""
        in_flight = self._in_flight
        for key in keys:
            if in_flight.get(key) is self:
                del in_flight[key]


async def _build_keys(prompts: Sequence[Prompt]) -> list[_Key]:
    if sum(map(len, prompts)) * _LARGEST_ITEM <= _BYTES_AT_ONCE:
        return [one if isinstance(one, str) else one.tobytes() for one in prompts]
    keys: list[_Key] = []
    size = 0
    for one in prompts:
        key = one if isinstance(one, str) else one.tobytes()
        hash(key)  # which it keeps: of megabytes that takes as long as the rest
        keys.append(key)
        size += len(key)
        if size > _BYTES_AT_ONCE:
            size = 0
            await asyncio.sleep(0)
    return keys


async def _collect(others: Mapping[_Key, asyncio.Future[Answer]]) -> dict[_Key, str]:
    """The good answers among them, once all are there."""
    if others:
        await asyncio.wait(others.values())
    return {
        key: answer
        for key, future in others.items()
        if not future.cancelled() and isinstance(answer := future.result(), str)
    }
