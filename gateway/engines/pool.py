"""Several engines as one: chooses one, cuts a batch into calls, sets one bad prompt apart, runs
again elsewhere what an engine lost, and generates identical greedy prompts once.

Nobody above this room knows that a batch is cut, that a call was refused and halved, or that an
engine died under it.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

import structlog
from aiohttp import web

from gateway.config import Settings, SettingsError
from gateway.engines.engine import Engine, EngineState
from gateway.errors import (
    DeadlineUnreachable,
    EngineError,
    EngineTimeout,
    EngineUnreachable,
    GatewayError,
    InvalidRequest,
    PromptRefused,
    Unavailable,
)
from gateway.observability.metrics import Metrics
from gateway.observability.trace import Trace
from gateway.schemas.wire import SAMPLING_FIELDS, Answer, Completion, Prompt, Sampling

log = structlog.get_logger("gateway")

# Fewer prompts than this are not worth a call of their own on a second engine.
_SMALLEST_SHARE = 16
# An affinity gives way when its engine has this much more than its share.
_AFFINITY_SLACK = 1.25
_SHORTEST_RETRY_AFTER_S = 1.0
# An engine that has been away for less may just not have answered one look at it.
_BLIP_S = 3.0
_BREAKER_MARGIN_S = 0.01


_PromptKey = tuple[str | tuple[int, ...], Sampling]


@dataclass(slots=True)
class _Work:
    """One batch on its way: the answers so far, by place."""

    prompts: Sequence[Prompt]
    sampling: Sampling
    answers: list[Answer | GatewayError | None]
    trace: Trace | None = None
    tell: Callable[[int, Answer], None] = lambda _place, _answer: None
    cost: Completion = field(default_factory=lambda: Completion([]))

    def put(self, places: Sequence[int], completion: Completion) -> None:
        for place, answer in zip(places, completion.answers, strict=True):
            self.answers[place] = answer
            if isinstance(answer, Answer):
                self.tell(place, answer)
        self.cost.prompt_tokens += completion.prompt_tokens
        self.cost.completion_tokens += completion.completion_tokens


class Pool:
    """The engines behind this gateway."""

    def __init__(self, engines: Iterable[Engine], settings: Settings, metrics: Metrics) -> None:
        self.engines = list(engines)
        self.draining = False
        self._settings = settings
        self._metrics = metrics
        self._changed = asyncio.Condition()
        self._in_flight: dict[_PromptKey, asyncio.Future[Answer | GatewayError]] = {}

    @property
    def is_ready(self) -> bool:
        """Whether a request that comes now would be served."""
        return not self.draining and self._has_engine

    @property
    def _has_engine(self) -> bool:
        return any(engine.is_usable for engine in self.engines)

    def describe(self) -> str:
        """One line for people: why there is no engine to be had."""
        if self.draining:
            return "the gateway is stopping"
        return "; ".join(f"{one.url} is {one.state}: {one.reason}" for one in self.engines)

    async def set_state(self, engine: Engine, state: EngineState, reason: str = "") -> None:
        async with self._changed:
            engine.enter_state(state, reason)
            self._changed.notify_all()

    async def set_engines(self, engines: Iterable[Engine]) -> None:
        """Those that are gone finish what they have; nothing new is sent to them."""
        async with self._changed:
            self.engines = list(engines)
            self._changed.notify_all()

    async def wait_ready(self, timeout_s: float) -> bool:
        deadline = time.monotonic() + timeout_s
        async with self._changed:
            while not self._has_engine:
                left_s = deadline - time.monotonic()
                if left_s <= 0:
                    return False
                # A breaker that closes by itself notifies nobody.
                breaker_s = min((engine.breaker_left_s for engine in self.engines), default=left_s)
                with contextlib.suppress(TimeoutError):
                    async with asyncio.timeout(min(left_s, breaker_s + _BREAKER_MARGIN_S)):
                        await self._changed.wait()
        return True

    async def acquire(
        self,
        affinity: str = "",
        avoid: Engine | None = None,
        planned: Counter[str] | None = None,
        deadline: float | None = None,
    ) -> Engine:
        """An engine to send to: held for a while when none is ready, as during a restart.

        The deadline, on the loop's clock, is of use here for a refusal alone: who would wait in
        vain is told so at once.
        """
        if len(self.engines) == 1 and self._has_engine:
            return self.engines[0]
        if not self._has_engine:
            if deadline is not None:
                self._check_deadline(deadline)
            if not await self.wait_ready(self._settings.restart_hold_s):
                raise Unavailable(
                    f"no engine is ready: {self.describe()}", retry_after_s=self._retry_after_s()
                )
        return self._choose(affinity, avoid, planned or Counter())

    def _check_deadline(self, deadline: float) -> None:
        left_s = deadline - asyncio.get_running_loop().time()
        now = time.monotonic()
        if left_s <= 0 or any(now - one.down_since < _BLIP_S for one in self.engines):
            return  # it is over, which is said elsewhere; or a look was missed, and nothing starts
        if self._expected_start_s(usual_s=0.0) > left_s:  # by what was learnt here, or not at all
            raise DeadlineUnreachable(
                f"no engine is ready before the deadline in {max(0.0, left_s):.1f} s: "
                f"{self.describe()}",
                retry_after_s=self._retry_after_s(),
            )

    def _expected_start_s(self, usual_s: float) -> float:
        return min((one.expected_start_s(usual_s) for one in self.engines), default=usual_s)

    def _retry_after_s(self) -> float:
        return max(_SHORTEST_RETRY_AFTER_S, self._expected_start_s(self._settings.expected_start_s))

    def _choose(self, affinity: str, avoid: Engine | None, planned: Counter[str]) -> Engine:
        ready = [engine for engine in self.engines if engine.is_usable]
        # An engine that said it is busy is asked again only when all say so.
        ready = [engine for engine in ready if not engine.is_busy] or ready
        ready = [engine for engine in ready if engine is not avoid] or ready

        def load(engine: Engine) -> int:
            return engine.running + planned[engine.url]

        if not affinity:
            return min(ready, key=load)
        most = _AFFINITY_SLACK * (sum(map(load, ready)) + 1) / len(ready) + 1
        ranked = sorted(ready, key=lambda engine: _rank(affinity, engine.url))
        return next((engine for engine in ranked if load(engine) <= most), ranked[0])

    async def generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        engine: Engine | None = None,
        trace: Trace | None = None,
    ) -> Completion:
        """An answer or an error for each prompt, in order.

        Raises only when nothing at all was answered and an engine is to blame. With `engine` given,
        that one alone is asked, as a warm-up must.
        """
        if engine is not None or sampling.temperature > 0 or not self._settings.dedup:
            whole = await self._generate(prompts, sampling, engine, trace)
        else:
            whole = await self._generate_once(prompts, sampling, trace)
        if not any(isinstance(answer, Answer) for answer in whole.answers):
            _raise_engine_failure(whole.answers)
        return whole

    async def _generate_once(
        self, prompts: Sequence[Prompt], sampling: Sampling, trace: Trace | None
    ) -> Completion:
        """Identical greedy prompts, of this batch or on their way for another, share one answer."""
        keys: list[_PromptKey] = [
            (prompt if isinstance(prompt, str) else tuple(prompt), sampling) for prompt in prompts
        ]
        loop = asyncio.get_running_loop()
        own: dict[_PromptKey, Prompt] = {}
        others: dict[_PromptKey, asyncio.Future[Answer | GatewayError]] = {}
        for key, prompt in zip(keys, prompts, strict=True):
            if key in self._in_flight:
                others[key] = self._in_flight[key]
            else:
                own.setdefault(key, prompt)
        for key in own:
            self._in_flight[key] = loop.create_future()
        known: dict[_PromptKey, Answer | GatewayError] = {}
        unsettled, order = dict.fromkeys(own), list(own)

        def settle(place: int, answer: Answer) -> None:
            """As soon as it is there: who waits for one answer waits for no whole batch."""
            if order[place] in unsettled:
                del unsettled[order[place]]
                self._settle(order[place], answer)

        try:
            whole = Completion([])
            if own:
                whole = await self._generate(list(own.values()), sampling, trace=trace, tell=settle)
            known.update(zip(own, whole.answers, strict=True))
        finally:
            for key in unsettled:
                self._settle(key, known.get(key))
        again = {key for key, future in others.items() if not await _is_answered(future)}
        known.update({key: others[key].result() for key in others if key not in again})
        if again:
            lost = {key: prompt for key, prompt in zip(keys, prompts, strict=True) if key in again}
            rest = await self._generate(list(lost.values()), sampling, trace=trace)
            known.update(zip(lost, rest.answers, strict=True))
            whole.prompt_tokens += rest.prompt_tokens
            whole.completion_tokens += rest.completion_tokens
        shared = len(prompts) - len(own) - len(again)
        self._metrics.deduplicated.inc(shared)
        return Completion(
            [known[key] for key in keys], whole.prompt_tokens, whole.completion_tokens, shared
        )

    def _settle(self, key: _PromptKey, answer: Answer | GatewayError | None) -> None:
        future = self._in_flight.pop(key)
        if answer is None:
            future.cancel()  # whoever waits for it asks for himself
        else:
            future.set_result(answer)

    async def _generate(
        self,
        prompts: Sequence[Prompt],
        sampling: Sampling,
        engine: Engine | None = None,
        trace: Trace | None = None,
        tell: Callable[[int, Answer], None] = lambda _place, _answer: None,
    ) -> Completion:
        work = _Work(prompts, sampling, [None] * len(prompts), trace, tell)
        ready = [engine] if engine else [one for one in self.engines if one.is_usable]
        pieces = cut(prompts, sampling, len(ready), self._settings.max_prompts_per_call)
        planned: Counter[str] = Counter()
        try:
            async with asyncio.TaskGroup() as group:
                for piece in pieces:
                    one = engine or await self.acquire(planned=planned)
                    planned[one.url] += len(piece)
                    group.create_task(self._answer_piece(work, piece, one, is_bound=bool(engine)))
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None  # one reason is enough for one caller
        answers = [answer for answer in work.answers if answer is not None]
        return Completion(answers, work.cost.prompt_tokens, work.cost.completion_tokens)

    async def _answer_piece(
        self, work: _Work, places: Sequence[int], engine: Engine, *, is_bound: bool
    ) -> None:
        """Asks until each place has an answer, or an error that another try would not mend."""
        for attempt in range(self._settings.max_attempts):
            await self._ask(work, places, engine)
            places = [place for place in places if _may_run_again(work, place)]
            if not places or is_bound or attempt + 1 == self._settings.max_attempts:
                return
            self._metrics.retried.inc(len(places))
            lost = work.answers[places[0]]
            if isinstance(lost, GatewayError):
                self._metrics.retried_calls.labels(lost.error_code).inc()
            try:
                engine = await self.acquire(avoid=engine)
            except Unavailable as error:
                for place in places:  # it says when to come back, which the loss does not
                    work.answers[place] = error
                return

    async def _ask(self, work: _Work, places: Sequence[int], engine: Engine) -> None:
        prompts = [work.prompts[place] for place in places]
        try:
            completion = await _call(engine, prompts, work)
        except InvalidRequest as error:
            # vLLM refuses a whole list for one bad prompt and does not say which.
            if error.param in SAMPLING_FIELDS:
                raise  # nothing to be halved: it refuses how it was asked, not a prompt
            if len(places) == 1:
                refusal = PromptRefused(error.message, param=error.param, code=error.error_code)
                work.answers[places[0]] = refusal
                return
            middle = len(places) // 2
            await self._ask(work, places[:middle], engine)
            await self._ask(work, places[middle:], engine)
        except (EngineError, Unavailable) as error:
            for place in places:
                work.answers[place] = error
        else:
            work.put(places, completion)


POOL = web.AppKey("pool", Pool)


class EngineList:
    """Which engines there are by the settings file as it is now."""

    def __init__(
        self, settings: Settings, build: Callable[[str], Engine], reload: Callable[[], Settings]
    ) -> None:
        self.build = build
        self._path = settings.config
        self._reload = reload
        self._stamp = self._read_stamp()
        self._urls = settings.engines

    def read_if_changed(self) -> tuple[str, ...] | None:
        """The engines, if they are others than before; a bad file changes nothing."""
        stamp = self._read_stamp()
        if stamp == self._stamp:
            return None
        self._stamp = stamp
        try:
            urls = self._reload().engines
        except SettingsError as error:
            log.error("settings_not_reloaded", reason=str(error))  # noqa: TRY400
            return None
        log.info("settings_reloaded", note="engines take effect now, the rest at the next start")
        if urls == self._urls:
            return None
        self._urls = urls
        return urls

    def _read_stamp(self) -> tuple[int, int] | None:
        try:
            status = self._path.stat() if self._path else None
        except OSError:
            return None
        return (status.st_mtime_ns, status.st_ino) if status else None


ENGINE_LIST = web.AppKey("engine_list", EngineList)


async def _call(engine: Engine, prompts: Sequence[Prompt], work: _Work) -> Completion:
    """One call, under the request's name and, where there are spans, with one of its own."""
    if work.trace is None:
        return await engine.complete(prompts, work.sampling)
    headers, span = work.trace.open_call(engine.url, len(prompts))
    error_code: str | None = "cancelled"
    try:
        completion = await engine.complete(prompts, work.sampling, headers)
        error_code = None
    except GatewayError as error:
        error_code = error.error_code
        raise
    finally:
        if span is not None:
            span.close(error_code)
    return completion


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


def _may_run_again(work: _Work, place: int) -> bool:
    """What provably did not run, or is greedy and unanswered: the same answer would come."""
    answer = work.answers[place]
    if isinstance(answer, EngineUnreachable | Unavailable):
        return True
    is_timeout = isinstance(answer, EngineTimeout)  # a second one would double the wait
    return isinstance(answer, EngineError) and not is_timeout and work.sampling.temperature == 0


async def _is_answered(future: asyncio.Future[Answer | GatewayError]) -> bool:
    await asyncio.wait((future,))
    return not future.cancelled() and isinstance(future.result(), Answer)


def _rank(affinity: str, url: str) -> bytes:
    """Rendezvous hashing: when an engine goes, only its own sessions move."""
    # A header may hold bytes that are no text; they name a session as well as others do.
    name = f"{affinity}\0{url}".encode("utf-8", "surrogatepass")
    return hashlib.blake2b(name, digest_size=8).digest()


def _raise_engine_failure(answers: Sequence[Answer | GatewayError]) -> None:
    for answer in answers:
        if isinstance(answer, EngineError | Unavailable):
            raise answer
