"""One request of a batch: the way of any other one, with its checks and its place in the queue, in
the lane `batch`.
"""

from __future__ import annotations

from dataclasses import dataclass

from gateway.admission.accounts import Accounts, Spent
from gateway.admission.calls import bound_answer, check_call, expect_tokens, parse_call
from gateway.admission.keys import Caller
from gateway.admission.media_hosts import MediaHosts
from gateway.admission.queue import AdmissionQueue
from gateway.admission.tickets import build_ticket
from gateway.config import Settings
from gateway.engines.attempt import EngineCall
from gateway.engines.engine import BUSY_STATUSES
from gateway.engines.pool import EnginePool
from gateway.errors import EngineBusy, EngineError, InvalidRequest
from gateway.observability.request_record import RequestRecord
from gateway.request_context import RequestContext
from gateway.schemas.openai import OpenAIRequest, name_engine_error, parse_usage
from gateway.schemas.vllm import parse_engine_error


@dataclass(slots=True)
class Answer:
    """An engine's word on one request: its answer, or its refusal."""

    status: int
    body: bytes
    queue_s: float


class BatchCaller:
    """What /v1 routes do for a caller who waits, for one who does not."""

    def __init__(
        self,
        settings: Settings,
        pool: EnginePool,
        queue: AdmissionQueue,
        accounts: Accounts,
        media_hosts: MediaHosts,
    ) -> None:
        self._settings, self._pool, self._queue = settings, pool, queue
        self._accounts, self._media_hosts = accounts, media_hosts

    async def ask(self, caller: Caller, path: str, body: bytes, request_id: str) -> Answer:
        """A `GatewayError` is what a caller would be told."""
        caller.check_route(path)
        call = await parse_call(path, body, self._settings, self._pool, None)
        if call.is_stream:
            raise InvalidRequest("nobody reads a stream in a batch; leave it out", param="stream")
        await check_call(call, caller, self._settings, self._media_hosts)
        await self._accounts.take_request(caller)
        context = RequestContext(request_id, RequestRecord(path))
        ticket = build_ticket({}, caller, call.sequences, "batch", None)
        ticket.lane = "batch"  # whatever the key's own requests are
        if ticket.tokens_per_minute:
            bound = bound_answer(path, call, self._settings, self._pool)
            ticket.tokens = expect_tokens(call, bound, caller, self._accounts)
        context.record.note_queued()
        async with self._queue.enter(ticket):
            context.record.note_entered()
            return await self._send(caller, path, call, context)

    async def _send(
        self, caller: Caller, path: str, call: OpenAIRequest, context: RequestContext
    ) -> Answer:
        engine_call = EngineCall(
            context,
            "POST",
            path,
            self._settings.max_attempts,
            body=call.body,
            sequences=call.sequences,
            is_repeatable=True,  # nobody has seen what it answered before
            affinity=call.affinity,
            is_relayed=True,
        )
        async with self._pool.attempt(engine_call) as answer:
            if answer.body is None:
                raise EngineError("the engine answered with a stream", code="engine_garbled")
            status, body = answer.status, answer.body
        if status in BUSY_STATUSES:
            raise EngineBusy(parse_engine_error(body)[0], retry_after_s=1)
        if status >= 500:
            message, _ = parse_engine_error(body)
            raise EngineError(f"the engine answered {status}: {message}")
        if status >= 400:
            return Answer(status, name_engine_error(status, body), context.record.queue_s)
        if (usage := parse_usage(body)) is not None:
            spent = Spent(*usage, context.running_s(), call.sequences)
            await self._accounts.count_tokens(caller, spent)
        return Answer(status, body, context.record.queue_s)
