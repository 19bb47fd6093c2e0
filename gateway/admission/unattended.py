"""One request for whose answer nobody waits on a connection, as a batch's line and a background
response are: the way of any other one, with its checks, its limits and its place in the queue.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from functools import partial
from typing import Protocol

from gateway.admission.accounts import Accounts, Spent
from gateway.admission.calls import (
    BYTES_A_TOKEN,
    bound_answer,
    charge_cut_list,
    check_call,
    cut_long_list,
    expect_tokens,
    parse_call,
)
from gateway.admission.keys import Caller
from gateway.admission.limits import Claim
from gateway.admission.media_hosts import MediaHosts
from gateway.admission.queue import Admission
from gateway.admission.served_models import ServedModel, ServedModels
from gateway.admission.throughput import FirstTokens
from gateway.admission.tickets import LaneName, Ticket, open_claim
from gateway.config import Settings
from gateway.engines.attempt import EngineCall
from gateway.engines.client import EngineAnswer
from gateway.engines.engine import BUSY_STATUSES
from gateway.engines.lists.long_lists import LongListCall
from gateway.errors import (
    EngineBusy,
    EngineError,
    EngineTimeout,
    InvalidRequest,
    Unavailable,
)
from gateway.observability.request_record import RequestRecord
from gateway.records.ledger import Ledger
from gateway.request_context import RequestContext
from gateway.schemas.openai import OpenAIRequest, name_engine_error, parse_usage
from gateway.schemas.prompt_lists.bodies import PromptList
from gateway.schemas.vllm import parse_engine_error

ReadBody = Callable[[], Awaitable[bytes]]
Note = Callable[[], None]


@dataclass(slots=True)
class Answer:
    """An engine's word on one request: its answer, or its refusal."""

    status: int
    body: bytes
    queue_s: float


class StreamReader(Protocol):
    """Takes an engine's stream as it comes, and says what it has told so far."""

    usage: tuple[int, int] | None  # tokens in and out

    @property
    def told_tokens(self) -> int: ...

    async def read(self, answer: EngineAnswer) -> None: ...


@dataclass(slots=True)
class UnattendedCall:
    """One request on its way: who asks what of which model, in which lane, and what it claims of
    their limits.
    """

    caller: Caller
    path: str
    served: ServedModel
    call: OpenAIRequest
    context: RequestContext
    claim: Claim | None
    lane: LaneName = "batch"
    tries: int = 1  # of a batch's line: whether it is sent again is its batch's matter
    on_waiting: Note | None = None  # it waits for its turn and an engine, however long that is
    on_entered: Note | None = None
    stream: StreamReader | None = None  # of a call that asks for one


class BodyCount(Protocol):
    """The bytes of all bodies in memory."""

    def hold(self, context: RequestContext, size: int) -> None: ...

    def add(self, context: RequestContext, size: int) -> None: ...

    def release(self, context: RequestContext, size: int | None = None) -> None: ...


class UnattendedCaller:
    """What /v1 routes do for a caller who waits, for one who does not."""

    def __init__(
        self,
        *,
        settings: Settings,
        models: ServedModels,
        accounts: Accounts,
        media_hosts: MediaHosts,
        bodies: BodyCount,
        ledger: Ledger | None = None,
    ) -> None:
        self._settings, self._models = settings, models
        self._accounts, self._media_hosts, self._bodies = accounts, media_hosts, bodies
        self._ledger = ledger

    def count_interactive(self) -> int:
        """Sequences of callers who wait for their answers, here or in the engines."""
        return sum(self._models.count("interactive"))

    def find_first_tokens(self, name: str) -> FirstTokens | None:
        """Of a model's streams, where it is known."""
        served = self._models.find_known(name)
        return None if served is None else served.first_tokens

    async def ask(
        self, caller: Caller, path: str, size: int, read: ReadBody, request_id: str
    ) -> Answer:
        """A `GatewayError` is what a caller would be told. Bodies count with those of requests that
        come in: so many lines of megabytes are not in memory at once.
        """
        caller.check_route(path)
        context = RequestContext(request_id, RequestRecord(path))
        try:
            self._bodies.hold(context, size)
            body = await read()
            if self._ledger is None:
                return await self._ask(caller, path, body, context)
            entry = context.entry = self._ledger.open(caller.name, caller.text_share)
            entry.note_prompt(body)
            answer = await self._ask(caller, path, body, context)
            entry.note_answer(answer.body)
            self._ledger.close(entry, request_id, context.record, answer.status, is_line=True)
            return answer
        finally:
            self._bodies.release(context)

    async def _ask(self, caller: Caller, path: str, body: bytes, context: RequestContext) -> Answer:
        call = await parse_call(path, body, self._settings, self._models, None)
        if call.is_stream:
            raise InvalidRequest("nobody reads a stream in a batch; leave it out", param="stream")
        await check_call(call, caller, self._settings, self._media_hosts)
        served = self._models.by_name.get(call.model)
        if served is None:
            served = await self._models.find(call.model, caller, None)
        if served.pool.held and not served.pool.has_engine:
            # One line that waits is enough to have an engine started for it; many would take the
            # slots of other models' lines for as long as calls are held.
            raise Unavailable(f"no engine is ready: {served.pool.describe()}", retry_after_s=5)
        served.requests += 1
        if context.entry is not None:
            context.entry.model = served.name
        claim = open_claim(caller, may_reserve=True) if caller.has_limits else None
        line = UnattendedCall(caller, path, served, call, context, claim)
        try:
            await self._accounts.take_request(caller, claim)
            return await self.run(line)
        finally:
            if claim is not None:
                self._accounts.close_claim(claim)

    async def run(self, line: UnattendedCall) -> Answer:
        """What has been parsed and checked, and counted as a request; its claim stays open."""
        caller, call, context = line.caller, line.call, line.context
        prompts = await cut_long_list(line.path, call, line.served.queue, self._settings)
        ticket = Ticket(call.sequences, line.lane, line.claim, on_waiting=line.on_waiting)
        is_writing = line.path != "/v1/embeddings"
        bound = bound_answer(call, self._settings, line.served.pool) if is_writing else 0
        taken = call.size // BYTES_A_TOKEN
        if caller.counts_tokens:
            ticket.tokens = expect_tokens(call, taken, bound, caller, self._accounts)
        if prompts is not None:
            ticket.is_divisible, ticket.step = True, call.copies
        context.record.note_queued()
        async with line.served.queue.enter(ticket) as places:
            context.record.note_entered()
            if line.on_entered is not None:
                line.on_entered()
            try:
                if prompts is not None:
                    return await self._send_pieces(line, prompts, places, bound)
                return await self._send_patiently(line, places)
            except (asyncio.CancelledError, EngineTimeout):
                # Else what breaks off in the middle would be free.
                if context.is_running and prompts is None:
                    given = line.stream.told_tokens if line.stream is not None else 0
                    running_s, name = context.running_s(), line.served.name
                    left = Spent(taken, given, running_s, call.sequences, name)
                    await self._accounts.charge_left(caller, left, bound, claim=line.claim)
                raise

    async def _send_patiently(self, line: UnattendedCall, places: Admission) -> Answer:
        """Of what waits however long: it keeps its claim meanwhile, and gives back its place."""
        models, served = self._models, line.served
        while True:
            try:
                return await self._send(line)
            except Unavailable as error:
                if line.on_waiting is None or line.context.is_running:
                    raise
                failure = error
            places.give_all_back()
            await served.pool.wait_held(lambda: served.pool.has_engine or not models.serves(served))
            if not models.serves(served):
                raise failure
            await places.take(line.call.sequences)

    async def _send_pieces(
        self, line: UnattendedCall, prompts: PromptList, places: Admission, most_each: int
    ) -> Answer:
        """What has run is charged, whatever becomes of the rest."""
        context = line.context
        one_list = LongListCall(
            line.served.pool,
            places.gate,
            prompts,
            _build_call(line),
            copies=line.call.copies,
            hold=partial(self._bodies.add, context),
            release=partial(self._bodies.release, context),
            timeout_s=self._settings.engine_timeout_s,
        )
        try:
            async with one_list as answer:
                return await self._read(line, answer)
        finally:
            if one_list.has_failed:
                told = Spent(*context.told_tokens, model=line.served.name)
                accounts, caller, claim = self._accounts, line.caller, line.claim
                await charge_cut_list(
                    accounts, caller, one_list, told, most_each=most_each, claim=claim
                )

    async def _send(self, line: UnattendedCall) -> Answer:
        engine_call = _build_call(line)
        async with line.served.pool.attempt(engine_call) as answer:
            engine_call.body, line.call.body = None, b""
            return await self._read(line, answer)

    async def _read(self, line: UnattendedCall, answer: EngineAnswer) -> Answer:
        context, path = line.context, line.path
        self._bodies.release(context)
        status, body, usage = answer.status, answer.body, None
        if body is None:
            if line.stream is None:
                raise EngineError("the engine answered with a stream", code="engine_garbled")
            await line.stream.read(answer)
            body, usage = b"", line.stream.usage
        if status in BUSY_STATUSES:
            raise EngineBusy(parse_engine_error(body)[0], retry_after_s=1)
        if status >= 500:
            message, _ = parse_engine_error(body)
            raise EngineError(f"the engine answered {status}: {message}")
        if status >= 400:
            return Answer(status, name_engine_error(status, body, path), context.record.queue_s)
        if usage is None:
            usage = parse_usage(body)
        if usage is not None:
            await self._count(line, usage)
        return Answer(status, body, context.record.queue_s)

    async def _count(self, line: UnattendedCall, usage: tuple[int, int]) -> None:
        context = line.context
        context.record.prompt_tokens, context.record.completion_tokens = usage
        running_s = 0.0 if any(context.told_tokens) else context.running_s()
        spent = Spent(*usage, running_s, line.call.sequences, line.served.name)
        line.served.count_tokens(*usage)
        await self._accounts.count_tokens(line.caller, spent, line.claim)


def _build_call(line: UnattendedCall) -> EngineCall:
    call = line.call
    return EngineCall(
        line.context,
        "POST",
        line.path,
        line.tries,
        body=call.body or None,
        sequences=call.sequences,
        is_repeatable=line.tries > 1 and call.is_greedy,
        affinity=call.affinity,
        is_relayed=True,
    )
