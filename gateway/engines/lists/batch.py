"""A batch of prompts over the engines: cut into calls, put together, a bad prompt set apart.

Nobody above knows that a batch is cut, that a call was refused and halved, or that an engine died
under it. A batch for which there is room at once is one call an engine, which answers it whole:
nothing is cheaper. What is larger, or shares the engines with other batches, is fed to them as
places come free: such calls are streams, since only these tell the end of each sequence.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial

from gateway.config import Settings
from gateway.engines.attempt import Attempt, EngineCall, may_run_again
from gateway.engines.client import EngineAnswer
from gateway.engines.engine import Engine
from gateway.engines.lists.feeding import Gate, Piece, open_group, take_places
from gateway.engines.pool import ModelPool
from gateway.errors import (
    EngineError,
    EngineTimeout,
    GatewayError,
    InvalidRequest,
    PromptRefused,
    Unavailable,
)
from gateway.observability.metrics import Metrics
from gateway.request_context import CutPiece, RequestContext
from gateway.schemas.fields import are_texts
from gateway.schemas.predict import SAMPLING_FIELDS
from gateway.schemas.vllm import (
    Answer,
    Completion,
    CompletionStream,
    Prompt,
    Sampling,
    build_completion_call,
    estimate_tokens,
    parse_completion_answer,
)

# Fewer prompts than this are not worth a call of their own on a second engine.
_SMALLEST_SHARE = 16
# A sequence's first token and the rest of it; more, and the engine does not know `stream_interval`
# (vLLM before 0.32): its calls are no streams from then on.
_MOST_CHUNKS = 4

OnAnswers = Callable[[Sequence[int], Sequence[Answer]], None]


@dataclass(slots=True)
class _Batch:
    """The answers so far, by place."""

    prompts: Sequence[Prompt]
    sampling: Sampling
    context: RequestContext
    engine: Engine | None
    on_answers: OnAnswers
    answers: list[Answer | None]
    cost: Completion = field(default_factory=lambda: Completion([]))

    @property
    def is_repeatable(self) -> bool:
        return self.sampling.temperature == 0

    def take_prompts(self, places: Sequence[int]) -> Sequence[Prompt]:
        if isinstance(places, range):
            return self.prompts[places.start : places.stop]
        return [self.prompts[place] for place in places]

    def put(self, places: Sequence[int], completion: Completion) -> None:
        if isinstance(places, range):
            self.answers[places.start : places.stop] = completion.answers
        else:
            for place, answer in zip(places, completion.answers, strict=True):
                self.answers[place] = answer
        self.on_answers(places, completion.answers)
        self.count(completion.prompt_tokens, completion.completion_tokens)
        self.cost.fingerprint = completion.fingerprint

    def put_one(self, place: int, answer: Answer) -> None:
        self.answers[place] = answer
        self.on_answers((place,), (answer,))

    def count(self, taken: int, given: int) -> None:
        self.cost.prompt_tokens += taken
        self.cost.completion_tokens += given
        before = self.context.told_tokens
        self.context.told_tokens = before[0] + taken, before[1] + given

    @contextlib.contextmanager
    def note_cut(self, call: EngineCall, places: Sequence[int]) -> Iterator[None]:
        """What ran of this call where it took too long, or where the batch breaks off."""
        try:
            yield
        except EngineTimeout:
            self._note_cut(call, places)
            raise
        except (InvalidRequest, EngineError, Unavailable):
            raise  # the batch goes on without it
        except BaseException:
            self._note_cut(call, places)
            raise

    def _note_cut(self, call: EngineCall, places: Sequence[int]) -> None:
        """It is charged by its own start."""
        if call.sent_at:
            left = [place for place in places if self.answers[place] is None]
            tokens = sum(map(estimate_tokens, self.take_prompts(left)))
            seconds = time.perf_counter() - call.sent_at
            self.context.cut_pieces += (CutPiece(0, seconds, call.sequences, tokens),)


class BatchGenerator:
    """Has every prompt of a batch answered, or says why it is not."""

    def __init__(self, pool: ModelPool, settings: Settings, metrics: Metrics) -> None:
        self._pool = pool
        self._settings = settings
        self._metrics = metrics

    async def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        context: RequestContext,
        *,
        gate: Gate | None = None,
        engine: Engine | None = None,
        on_answers: OnAnswers = lambda _places, _answers: None,
    ) -> Completion:
        """An answer or an error for each prompt, in order. With `engine` given, by that one alone,
        as a warm-up must; without a gate, all at once.
        """
        batch = _Batch(prompts, sampling, context, engine, on_answers, [None] * len(prompts))
        tries = self._settings.max_attempts
        async with open_group() as group:
            async for piece in self._cut(batch, gate):
                task = group.create_task(self._answer(batch, piece, piece.places, tries))
                task.add_done_callback(piece.leave)
        batch.cost.answers = [answer for answer in batch.answers if answer is not None]
        return batch.cost

    def _name_model(self, engine: Engine) -> str:
        """As its engine calls it: an adapter by its own name."""
        if self._pool.base:
            return self._pool.name
        return engine.card.name if engine.card else ""

    async def _cut(self, batch: _Batch, gate: Gate | None) -> AsyncIterator[Piece]:
        """The pieces, each when there is room for it."""
        prompts, most = batch.prompts, self._settings.max_prompts_per_call
        async for places, room in take_places(gate, len(prompts)):
            is_whole = len(places) == len(prompts)
            is_stream = gate is not None and len(prompts) > 1 and not (is_whole and gate.is_alone)
            # What came free did so at one engine, and that one has the least to do.
            shares = 1
            if places.start == 0 and batch.engine is None:
                shares = self._pool.count_usable(len(places) // _SMALLEST_SHARE)
            few = prompts[places.start : places.stop]
            for one in cut(few, batch.sampling, shares, most):
                moved = range(one.start + places.start, one.stop + places.start)
                yield Piece(moved, room, len(moved), is_stream)

    async def _answer(
        self,
        batch: _Batch,
        piece: Piece,
        places: Sequence[int],
        tries: int,
        avoid: Engine | None = None,
    ) -> None:
        """Asks until each place has an answer, or an error that another try would not mend."""
        prompts = batch.take_prompts(places)
        call = EngineCall(
            batch.context,
            "POST",
            "/v1/completions",
            tries,
            body=lambda engine: build_completion_call(
                self._name_model(engine),
                prompts,
                batch.sampling,
                is_stream=piece.is_stream and engine.knows_stream_interval,
            ),
            sequences=len(prompts),
            is_stream=piece.is_stream,
            is_repeatable=batch.is_repeatable,
            engine=batch.engine,
            avoid=avoid,
            parse=partial(parse_completion_answer, n_prompts=len(prompts)),
            n_prompts=len(prompts),
        )
        attempt = self._pool.attempt(call)
        has_begun = False
        try:
            with batch.note_cut(call, places):
                async with attempt as answer:
                    if answer.body is None:
                        has_begun = True
                        await self._read_stream(batch, piece, places, attempt, answer)
                    else:
                        batch.put(places, answer.value)
        except InvalidRequest as refusal:
            left = [place for place in places if batch.answers[place] is None]
            if left:
                await self._set_apart(batch, piece, left, refusal, call.tries_left + 1)
        except (EngineError, Unavailable) as error:
            for place in places:
                batch.answers[place] = batch.answers[place] or error
            if has_begun:  # what is lost before that has been asked again already
                await self._run_lost_again(batch, piece, places, call)
        else:
            await self._run_lost_again(batch, piece, places, call)

    async def _read_stream(
        self,
        batch: _Batch,
        piece: Piece,
        places: Sequence[int],
        attempt: Attempt,
        answer: EngineAnswer,
    ) -> None:
        """Each sequence makes room for another as soon as it has ended."""
        stream = CompletionStream(len(places))
        try:
            async with asyncio.timeout(self._settings.engine_timeout_s):
                while chunk := await answer.read_chunk():
                    for index, text, taken, given in stream.read(chunk):
                        batch.put_one(places[index], text)
                        batch.count(taken, given)
                        attempt.note_ended(1)
                        piece.give_back(1)
        except TimeoutError:
            raise EngineTimeout("the engine did not answer in time") from None
        except EngineError:
            answer.is_at_fault = stream.is_at_fault or None
            raise
        if attempt.engine is not None and stream.chunks > _MOST_CHUNKS * len(places):
            attempt.engine.knows_stream_interval = False
        n_missing = sum(batch.answers[place] is None for place in places)
        if n_missing:
            answer.is_at_fault = True
            raise EngineError(
                f"the engine answered {len(places) - n_missing} of {len(places)} prompts",
                code="engine_garbled",
            )

    async def _set_apart(
        self,
        batch: _Batch,
        piece: Piece,
        places: Sequence[int],
        refusal: InvalidRequest,
        tries: int,
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
        await self._answer(batch, piece, places[:middle], tries)
        await self._answer(batch, piece, places[middle:], tries)

    async def _run_lost_again(
        self, batch: _Batch, piece: Piece, places: Sequence[int], call: EngineCall
    ) -> None:
        """What an engine gave up within a call that it answered."""
        if batch.engine is not None or call.tries_left <= 0:
            return
        answers = [batch.answers[place] for place in places]
        if are_texts(answers):
            return
        lost = [
            place
            for place, answer in zip(places, answers, strict=True)
            if may_run_again(answer, is_repeatable=batch.is_repeatable)
        ]
        if not lost:
            return
        reason = batch.answers[lost[0]]
        if isinstance(reason, GatewayError):
            self._metrics.retried_calls.labels(reason.error_code).inc()
        self._metrics.retried.inc(len(lost))
        for place in lost:
            batch.answers[place] = None
        await self._answer(batch, piece, lost, call.tries_left, call.asked)


def cut(prompts: Sequence[Prompt], sampling: Sampling, n_engines: int, most: int) -> list[range]:
    """Pieces of about equal work, as many as there are engines, none longer than `most`."""
    shares = max(1, min(n_engines, len(prompts) // _SMALLEST_SHARE))
    if shares == 1 and 0 < len(prompts) <= most:
        return [range(len(prompts))]
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
