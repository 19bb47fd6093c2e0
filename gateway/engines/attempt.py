"""A call of an engine is one thing: `async with pool.attempt(call) as answer`.

It owns the choice of the engine, the count of what runs there, the deadline, the span, the breaker
and the retry policy; foreign exceptions are translated below it (`client.py`). What is sent again:

- What an engine did not accept (no connection, no file left for one): it did not run.
- What an engine refused with 429 or 503 did not run either; it goes to another engine. Where there
  is none the caller is told at once: asking the same one again would only add to its load. Only a
  piece of a long list is asked again after a moment (`lists/long_lists.py`).
- What was lost on the way, or answered with nonsense, only if the same answer would come again
  (`is_repeatable`), on whichever engine is usable then: one that has just failed is looked at
  first, and one that restarts is waited for.
- What was answered with another 5xx likewise, but not by the same engine in the same life: it
  would only say the same again. vLLM answers 500 when its core has died, and to some requests that
  it cannot take.
- Nothing after a time-out, which a second one would double, and nothing of whose answer a part has
  been passed on.
"""

from __future__ import annotations

import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol, cast

from gateway.engines.client import EngineAnswer
from gateway.engines.engine import BUSY_STATUSES, Engine
from gateway.engines.timeouts import Deadline
from gateway.errors import (
    DeadlinePassed,
    EngineBusy,
    EngineError,
    EngineTimeout,
    EngineUnreachable,
    GatewayError,
    OutOfFiles,
    Unavailable,
)
from gateway.observability.metrics import Metrics
from gateway.observability.tracing import CallSpan
from gateway.request_context import RequestContext
from gateway.schemas.vllm import lacks_route, parse_engine_error


@dataclass(slots=True)
class EngineCall:
    """What is asked of an engine, and how far it may be tried again."""

    context: RequestContext
    method: str
    path: str
    tries_left: int
    body: bytes | Callable[[Engine], bytes] | None = None
    sequences: int = 1
    is_repeatable: bool = False
    affinity: str = ""
    engine: Engine | None = None  # this one alone, as a warm-up must
    asked: Engine | None = None  # the last that was
    avoid: Engine | None = None  # where it has failed before
    # Reads a body; an `EngineError` from it is a failure of the engine like any other.
    parse: Callable[[int, bytes], Any] | None = None
    # The same of a good answer that may be large, with looks at the event loop in between.
    parse_large: Callable[[bytes], Awaitable[Any]] | None = None
    is_stream: bool = False  # what is good comes as one; `parse` is for the rest
    is_relayed: bool = False  # an engine's refusals and errors are passed on in its own words
    n_prompts: int = 0  # of /predict, for the count of those that ran again
    sent_at: float = 0.0  # when an engine got it, by `time.perf_counter`; 0 while none has it


class EngineChooser(Protocol):
    """Whoever knows the engines."""

    async def acquire(
        self, affinity: str, avoid: Engine | None, deadline: float | None
    ) -> Engine: ...

    def has_other(self, engine: Engine) -> bool: ...

    async def wait_looked_at(self, engine: Engine) -> None: ...


class Attempt:
    """One call, from the choice of an engine to its answer's end."""

    __slots__ = ("_answer", "_call", "_deadline", "_engine", "_metrics", "_pool", "_span")

    def __init__(self, pool: EngineChooser, metrics: Metrics, call: EngineCall) -> None:
        self._pool, self._metrics, self._call = pool, metrics, call
        at = call.context.deadline
        self._deadline = None if at is None else Deadline(at)  # most requests have none
        self._engine: Engine | None = None
        self._answer: EngineAnswer | None = None
        self._span: CallSpan | None = None

    async def __aenter__(self) -> EngineAnswer:
        """A good answer; of a call that is relayed, one of whatever status."""
        call = self._call
        # Later, "not before the deadline" would hide what became of the first try.
        early = None if call.context.engine_calls else call.context.deadline
        answer: EngineAnswer | None = None
        failure: GatewayError | None = None
        failed_in: set[tuple[Engine, int]] = set()
        try:
            if self._deadline is not None:
                await self._deadline.__aenter__()
            while True:
                engine = call.engine or await self._pool.acquire(call.affinity, call.avoid, early)
                if failure is not None:
                    is_same_life = (engine, engine.starts) in failed_in
                    if answer is not None and answer.status >= 500 and is_same_life:
                        break
                    self._metrics.retried_calls.labels(failure.error_code).inc()
                    self._metrics.retried.inc(call.n_prompts)
                answer, failure = await self._try(engine)
                if failure is None or not self._goes_on(engine, failure):
                    break
                self._close(failure)
                call.context.is_running, call.sent_at = False, 0.0
                await self._pool.wait_looked_at(engine)
                failed_in.add((engine, engine.starts))
                call.avoid, early = engine, None
        except BaseException as error:
            await self._leave(error)
            raise
        is_told = call.is_relayed and answer is not None and answer.status >= 400
        if failure is not None and not is_told:
            await self._leave(failure)
            raise failure
        self._answer = cast("EngineAnswer", answer)
        return self._answer

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        if self._deadline is None:
            self._close(error)
        else:
            await self._leave(error)

    @property
    def engine(self) -> Engine | None:
        """Whose answer it is, while it is being read."""
        return self._engine

    def note_ended(self, sequences: int) -> None:
        """So many of a stream's run no longer: there is room for others."""
        self._call.sequences -= sequences
        if self._engine is not None:
            self._engine.running -= sequences

    async def _try(self, engine: Engine) -> tuple[EngineAnswer | None, GatewayError | None]:
        """What the engine answered, and why that is not good enough."""
        call = self._call
        call.tries_left -= 1
        call.context.is_running = True
        call.context.sent_at = call.sent_at = time.perf_counter()
        self._engine = call.asked = engine
        engine.running += call.sequences
        headers, self._span = call.context.open_call(engine.url, call.sequences)
        body = call.body(engine) if callable(call.body) else call.body
        began = time.perf_counter()
        try:
            answer = await engine.client.send(call.method, call.path, headers, body)
        except EngineTimeout as error:
            engine.note_error(is_silent=True)
            return None, error
        except EngineError as error:
            engine.note_failure()
            return None, error
        except OutOfFiles as error:
            return None, error
        finally:
            call.context.record.engine_s = time.perf_counter() - began
        garbled: EngineError | None = None
        if call.parse_large is not None and answer.body is not None and answer.status == 200:
            try:
                answer.value = await call.parse_large(answer.body)
            except EngineError as error:
                garbled = error
        return answer, self._judge(engine, answer, garbled)

    def _judge(
        self, engine: Engine, answer: EngineAnswer, failure: EngineError | None
    ) -> GatewayError | None:
        if answer.body is None:
            return self._judge_stream(engine, answer)
        if answer.status in BUSY_STATUSES:
            # Back-pressure, not a failure: others are asked first for a moment.
            engine.note_busy()
            return EngineBusy(parse_engine_error(answer.body)[0], retry_after_s=1)
        if answer.status >= 500 and not lacks_route(answer.status, answer.body):
            message, _ = parse_engine_error(answer.body)
            failure = EngineError(f"the engine answered {answer.status}: {message}")
        elif answer.status == 200 and answer.is_page:
            failure = EngineError("the engine answered with a page of HTML", code="engine_garbled")
        elif self._call.parse is not None:
            try:
                answer.value = self._call.parse(answer.status, answer.body)
            except EngineError as error:
                failure = error
        if failure is None:
            engine.note_success()
        else:
            engine.note_error()
        return failure

    def _judge_stream(self, engine: Engine, answer: EngineAnswer) -> GatewayError | None:
        """Its end will tell, where a stream can be an answer at all."""
        call = self._call
        is_read = call.parse is not None or call.parse_large is not None
        if is_read and not call.is_stream:
            answer.close()
            engine.note_error()
            return EngineError("the engine answered with a stream", code="engine_garbled")
        if answer.status >= 500 and answer.status not in BUSY_STATUSES:
            answer.is_at_fault = True
        return None

    def _goes_on(self, engine: Engine, failure: GatewayError) -> bool:
        """The retry policy; its reasons stand at the top."""
        call = self._call
        if call.engine is not None or call.tries_left <= 0:
            return False
        if isinstance(failure, EngineBusy):
            return self._pool.has_other(engine)
        return may_run_again(failure, is_repeatable=call.is_repeatable)

    async def _leave(self, error: BaseException | None) -> None:
        try:
            if self._deadline is not None:
                await self._deadline.__aexit__(type(error) if error else None, error, None)
        except DeadlinePassed as passed:
            error = passed
            raise
        finally:
            self._close(error)

    def _close(self, error: BaseException | None) -> None:
        engine, answer = self._engine, self._answer
        if engine is None:
            return
        self._engine = None
        engine.running -= self._call.sequences
        if answer is not None and answer.body is None:
            # One that takes too long may be as long as it was asked to be.
            is_broken = isinstance(error, EngineError) and not isinstance(error, EngineTimeout)
            if is_broken or answer.is_at_fault:
                engine.note_error(is_stream=True)
            elif error is None and answer.is_at_fault is None:
                engine.note_success(is_stream=True)
            answer.close()
        if self._span is not None:
            self._span.close(self._name_end(error))

    def _name_end(self, error: BaseException | None) -> str | None:
        if isinstance(error, GatewayError):
            return error.error_code
        return "cancelled" if error is not None else self._call.context.record.error_code


def may_run_again(failure: object, *, is_repeatable: bool) -> bool:
    """Whether what failed so did not run, or would give the same answer again."""
    if isinstance(failure, EngineUnreachable | Unavailable):
        return True
    return (
        is_repeatable
        and isinstance(failure, EngineError)
        and not isinstance(failure, EngineTimeout)
    )
