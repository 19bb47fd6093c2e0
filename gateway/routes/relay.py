"""/v1/* and what else an engine serves to callers: its answers and streams, passed on as they come.

A list of paths, not a prefix: nothing administrative of the engine can be reached. A caller who
hangs up cancels the engine's work.
"""

from __future__ import annotations

import asyncio
from contextlib import AbstractAsyncContextManager as AsyncContext
from functools import partial

from aiohttp import web

from gateway.admission.accounts import ACCOUNTS, Spent
from gateway.admission.calls import (
    BYTES_A_TOKEN,
    bound_answer,
    charge_cut_list,
    check_call,
    cut_long_list,
    expect_tokens,
    parse_call,
)
from gateway.admission.keys import CALLER
from gateway.admission.limits import CLAIM
from gateway.admission.media_hosts import MEDIA_HOSTS
from gateway.admission.queue import Admission
from gateway.admission.served_models import MODELS, SERVED_MODEL, ServedModel
from gateway.admission.tickets import LaneName, build_ticket, open_claim, parse_deadline
from gateway.admission.unattended import UnattendedCall
from gateway.config import SETTINGS
from gateway.engines.attempt import EngineCall
from gateway.engines.client import EngineAnswer
from gateway.engines.lists.long_lists import LongListCall
from gateway.errors import DeadlinePassed, EngineError, EngineTimeout, GatewayError
from gateway.forms import read_form
from gateway.observability.request_record import RequestRecord
from gateway.request_body import BODIES, read_body
from gateway.request_context import CONTEXT, TRACE_HEADERS, RequestContext
from gateway.responses.access import TURN, begin_turn, find_responses
from gateway.responses.turns import Turn
from gateway.schemas.openai import (
    CHAT_BATCH,
    POOLING,
    OpenAIRequest,
    build_model_list,
    build_models,
    build_no_previous_response,
    lacks_previous_response,
    name_engine_error,
    parse_usage,
)
from gateway.schemas.prompt_lists.bodies import PromptList
from gateway.schemas.transcription import FORMS, parse_form
from gateway.streaming import (
    STORED_STREAM,
    EventStream,
    StoredStream,
    Usage,
    follow_events,
    open_stream,
)

STREAMING = ("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/messages")
_WRITING = (*STREAMING, CHAT_BATCH, *FORMS)
_USING_TOKENS = frozenset((*_WRITING, *POOLING))
# All that keeps an engine busy takes a place; cutting megabytes into tokens is work, too.
ENTERING = (*_WRITING, *POOLING, "/tokenize", "/detokenize", "/v1/messages/count_tokens")
_MODELS, _TOKENIZER = "/v1/models", "/tokenizer_info"
ROUTES = (
    ("GET", _MODELS),
    ("GET", _MODELS + "/{model:.+}"),
    ("GET", _TOKENIZER),
    *(("POST", path) for path in ENTERING),
)
GENERATING = ("/v1/embeddings", *STREAMING)
# Few engines serve these: their figures begin with their first call, all others' at zero.
SELDOM = frozenset(ENTERING) - {*GENERATING, "/tokenize", "/detokenize"}
# Names by which callers know a route that the engine has by another.
_ENGINES_NAMES = {"/v1/classify": "/classify"}
# Lists of what passes, not of what does not: who the caller is, who goes first and how the
# connection is kept are the gateway's business, and the engine needs nothing else.
_SENT = ("Accept", "X-Session-Id", "anthropic-version", *TRACE_HEADERS)
# The last of them describes vectors that come as bytes.
_PASSED_ON = ("Content-Type", "Cache-Control", "Retry-After", "metadata")
_RETRY_AFTER_S = "1"
_RESPONSES = "/v1/responses"
_HELD_SHARE = 0.25  # of a stream's time; to write takes some itself where an engine is quick


async def handle_relay(request: web.Request) -> web.StreamResponse:
    """Read, check, enter the queue, pass on."""
    if request.method == "GET":
        answer = _answer_models if _asks_for_models(request) else _tell_tokenizer
        return await answer(request)
    context, caller, models = request[CONTEXT], request[CALLER], request.app[MODELS]
    context.deadline = parse_deadline(request.headers)
    call = await _read_call(request)
    await check_call(call, caller, request.app[SETTINGS], request.app[MEDIA_HOSTS])
    served = models.by_name.get(call.model)
    if served is None:
        served = await models.find(call.model, caller, context.deadline)
    served.requests += 1
    request[SERVED_MODEL] = served
    turn = request.get(TURN)
    is_background = turn is not None and turn.is_background
    lane: LaneName = "batch" if call.sequences > 1 or is_background else "interactive"
    prompts: PromptList | None = None
    if call.sequences > 1:
        prompts = await cut_long_list(request.path, call, served.queue, request.app[SETTINGS])
    if prompts is None:
        relay = _Relay(request, call, served, turn)
    else:
        relay = _ListRelay(request, call, served, prompts)
    ticket = build_ticket(
        request.headers, caller, call.sequences, lane, context.deadline, claim=relay.claim
    )
    if prompts is not None:
        ticket.is_divisible, ticket.step = True, call.copies
    if caller.counts_tokens and request.path in _USING_TOKENS:
        ticket.tokens = relay.expect_tokens()
    context.record.note_queued()
    if turn is not None and is_background:
        return await _start(request, call, turn, ticket.lane)
    async with served.queue.enter(ticket) as places:
        context.record.note_entered()
        response = await relay.pass_on(places)
    # Without a place: a database that takes its time keeps nobody else from the engines.
    return response if turn is None else await _store(request, turn, response)


async def _read_call(request: web.Request) -> OpenAIRequest:
    if request.path in FORMS:
        return parse_form(await read_form(request), request.app[SETTINGS])
    settings, models = request.app[SETTINGS], request.app[MODELS]
    body = await read_body(request)
    if request.path == _RESPONSES:
        body = await begin_turn(request, body)
    deadline = request[CONTEXT].deadline
    return await parse_call(request.path, body, settings, models, deadline)


async def _start(
    request: web.Request, call: OpenAIRequest, turn: Turn, lane: LaneName
) -> web.StreamResponse:
    """In the background, as a call of its own that holds what it claims until it has ended."""
    asking, caller = request[CONTEXT], request[CALLER]
    context = RequestContext(asking.request_id, RequestRecord(request.path))
    context.carry(request.headers, _SENT)
    one = UnattendedCall(
        caller,
        request.path,
        request[SERVED_MODEL],
        call,
        context,
        open_claim(caller) if caller.has_limits else None,
        lane=lane,
        tries=request.app[SETTINGS].max_attempts,
    )
    responses = find_responses(request.app)
    body = await responses.start(turn, one, asking)
    if turn.is_stream:
        return await follow_events(request, responses.follow(turn.owner, turn.id))
    return web.Response(body=body, content_type="application/json")


async def _store(
    request: web.Request, turn: Turn, answer: web.StreamResponse
) -> web.StreamResponse:
    responses = find_responses(request.app)
    stream: StoredStream | None = request.get(STORED_STREAM)
    if stream is not None and stream.is_waiting:
        try:
            if stream.told is not None:
                await responses.add(turn, stream.told)
        except GatewayError as error:
            return await stream.end(error)
        return await stream.end_stored()
    if isinstance(answer, web.Response) and answer.status == 200:
        assert isinstance(answer.body, bytes)  # noqa: S101 — an engine's
        answer.body = await responses.keep(turn, answer.body)
    return answer


async def _answer_models(request: web.Request) -> web.StreamResponse:
    """Nothing is generated, so an engine may be asked again like a greedy call; of several models
    the gateway knows itself.
    """
    models, caller = request.app[MODELS], request[CALLER]
    if not models.is_several:
        served = request[SERVED_MODEL] = models.all[0]
        return await _Relay(request, OpenAIRequest(b"", is_greedy=True), served).pass_on()
    body = build_model_list(models.list_cards(caller), request.match_info.get("model"))
    return web.Response(body=body, content_type="application/json")


async def _tell_tokenizer(request: web.Request) -> web.StreamResponse:
    """That of the model that the query names, else of the default one."""
    models, caller, name = request.app[MODELS], request[CALLER], request.query.get("model") or None
    name = request.app[SETTINGS].alias_map.get(name or "", name)
    if caller.models and (name is not None or models.is_several):
        caller.check_model(name)
    served = request[SERVED_MODEL] = await models.find(name, caller, request[CONTEXT].deadline)
    return await _Relay(request, OpenAIRequest(b"", is_greedy=True), served).pass_on()


class _Relay:
    """One call on its way to an engine and back; what each step needs is looked up once."""

    __slots__ = (
        *("_accounts", "_call", "_caller", "_context", "_path", "_request", "_served"),
        *("_settings", "_turn", "claim"),
    )

    def __init__(
        self,
        request: web.Request,
        call: OpenAIRequest,
        served: ServedModel,
        turn: Turn | None = None,
    ) -> None:
        self._request, self._call, self._served, self._turn = request, call, served, turn
        self.claim = request.get(CLAIM)
        self._context, self._caller = request[CONTEXT], request[CALLER]
        self._settings, self._accounts = request.app[SETTINGS], request.app[ACCOUNTS]
        self._path = request.path

    async def pass_on(self, places: Admission | None = None) -> web.StreamResponse:
        stream: EventStream | None = None
        lines, _ = self._served.queue.count("batch")
        try:
            engine_call = self._build_call()
            async with self._ask(engine_call, places) as answer:
                # It is not sent again, and a stream may last.
                engine_call.body, self._call.body = None, b""
                self._release_body()
                if answer.body is not None:
                    return await self._answer_whole(answer, answer.body)
                stream = open_stream(
                    self._request,
                    hides_usage=self._call.hides_usage,
                    hides_chunk_usage=self._call.hides_chunk_usage,
                    fingerprint=engine_call.asked.fingerprint if engine_call.asked else "",
                    turn=self._turn,
                )
                await stream.start(answer.status, _pick_headers(answer))
                await stream.copy(answer)
        except GatewayError as error:
            if isinstance(error, DeadlinePassed | EngineTimeout):
                await self._charge(stream)
            else:
                await self._count_lost(stream, error)
            if stream is None or not stream.has_started:
                raise
            return await stream.end(error)
        except (asyncio.CancelledError, ConnectionError):
            await self._charge(stream)
            if stream is None or not stream.has_started:
                raise
            end = self._context.take_end()
            if end is None:
                raise
            return await stream.end(end)
        self._learn_first_token(stream, lines)
        await self._count_stream(stream)
        return await stream.end()

    def _ask(self, call: EngineCall, places: Admission | None) -> AsyncContext[EngineAnswer]:
        return self._served.pool.attempt(call)

    async def _count_stream(self, stream: EventStream) -> None:
        is_form = stream.usage is None and self._path in FORMS
        await self._count((0, stream.told_tokens) if is_form else stream.usage)

    async def _count_lost(self, stream: EventStream | None, error: GatewayError) -> None:
        """What an engine has told before it failed."""
        if stream is not None and stream.has_started and isinstance(error, EngineError):
            await self._count(stream.usage)

    def expect_tokens(self) -> int:
        bound, taken = self._bound_answer(), self._guess_prompt()
        return expect_tokens(self._call, taken, bound, self._caller, self._accounts)

    def _learn_first_token(self, stream: EventStream, lines: int) -> None:
        """With so many lines of batches beside it at its start."""
        if stream.timing.chunks and self._call.sequences == 1:
            first_s = stream.timing.first_chunk_at - self._context.sent_at
            self._served.first_tokens.learn(first_s, lines)

    def _release_body(self) -> None:
        """But for the items that are stored at the end."""
        kept = 0 if self._turn is None else len(self._turn.input)
        bodies, held = self._request.app[BODIES], self._context.held_bytes
        bodies.release(self._context, max(0, held - kept))

    def _build_call(self) -> EngineCall:
        request, context, call = self._request, self._context, self._call
        context.carry(request.headers, _SENT)
        if call.content_type:
            context.carried = {**context.carried, "Content-Type": call.content_type}
        affinity = call.affinity
        if self._settings.routing == "session":
            affinity = request.headers.get("X-Session-Id") or affinity
        asks_for_models = _asks_for_models(request)
        path = _ENGINES_NAMES.get(self._path) or request.rel_url.raw_path_qs
        return EngineCall(
            context,
            request.method,
            # One is picked from the list here: vLLM has no route for it.
            _MODELS if asks_for_models else path,
            self._settings.max_attempts,
            body=call.body or None,
            sequences=call.sequences,
            is_repeatable=call.is_greedy,
            affinity=affinity,
            parse=self._read_models if asks_for_models else None,
            is_relayed=True,
        )

    async def _answer_whole(self, answer: EngineAnswer, body: bytes) -> web.Response:
        headers, status = _pick_headers(answer), answer.status
        if status == 200:
            if _asks_for_models(self._request):
                body = answer.value
            await self._count(self._read_usage(answer, body))
        elif lacks_previous_response(self._path, status, body):
            status, body = 400, build_no_previous_response()
        elif status >= 400:
            await self._count_refused()
            body = name_engine_error(status, body, self._path)
            headers["Content-Type"] = "application/json"
            if status == 501:
                headers["x-should-retry"] = "false"  # what it does not know it will not learn
            if status in {429, 503}:
                headers.setdefault("Retry-After", _RETRY_AFTER_S)  # vLLM does not say
        return web.Response(status=status, headers=headers, body=body)

    def _read_usage(self, answer: EngineAnswer, body: bytes) -> Usage | None:
        if self._path in FORMS:  # the engine counts seconds of sound, if anything
            return 0, len(body) // BYTES_A_TOKEN
        told = parse_usage(body)
        if told is None and self._path in POOLING:
            # Vectors as bytes: a header may tell, or nothing does.
            metadata = answer.headers.get("metadata", "")
            told = parse_usage(metadata.encode("utf-8", "surrogateescape"))
            return told or (self._guess_prompt(), 0)
        return told

    def _read_models(self, status: int, body: bytes) -> bytes:
        wanted = self._request.match_info.get("model")
        return build_models(body, self._settings.alias_map, wanted) if status == 200 else body

    async def _charge(self, stream: EventStream | None) -> None:
        """For what was left in the middle the engine tells no figures, or only the first; for the
        prompt it is a token for four bytes then. Else hanging up would be free.
        """
        context, call = self._context, self._call
        if self._path not in _USING_TOKENS or not context.is_running:
            return
        told = stream.usage[0] if stream and stream.usage else 0
        taken = told if told and call.sequences == 1 else self._guess_prompt()
        given = stream.told_tokens if stream else 0
        spent = Spent(taken, given, context.running_s(), call.sequences, self._served.name)
        most, claim = self._bound_answer(), self.claim
        await self._accounts.charge_left(self._caller, spent, most, claim=claim)

    async def _count_refused(self) -> None:
        """Nothing of it has run."""

    async def _count(self, usage: Usage | None) -> None:
        if usage is None:
            return
        context, served = self._context, self._served
        context.record.prompt_tokens, context.record.completion_tokens = usage
        served.count_tokens(*usage)
        timing, running_s = context.record.stream, self._measure_running()
        if timing is not None and timing.held_s > running_s * _HELD_SHARE:
            running_s = 0.0  # that tells how fast its caller reads, and nothing of the engine
        spent = Spent(*usage, running_s, self._call.sequences, served.name)
        await self._accounts.count_tokens(self._caller, spent, self.claim)

    def _measure_running(self) -> float:
        return self._context.running_s()

    def _bound_answer(self) -> int:
        """The most new tokens of a sequence, by the caller's word and by the model's context."""
        if self._path not in _WRITING:
            return 0
        return bound_answer(self._call, self._settings, self._served.pool)

    def _guess_prompt(self) -> int:
        """Its tokens, by its size; a sound is no text."""
        return 0 if self._path in FORMS else self._call.size // BYTES_A_TOKEN


class _ListRelay(_Relay):
    """A list that goes to the engines by pieces. What it has used is counted by piece and charged
    once.
    """

    __slots__ = ("_list", "_prompts")

    def __init__(
        self, request: web.Request, call: OpenAIRequest, served: ServedModel, prompts: PromptList
    ) -> None:
        super().__init__(request, call, served)
        self._prompts = prompts
        self._list: LongListCall | None = None

    def _ask(self, call: EngineCall, places: Admission | None) -> AsyncContext[EngineAnswer]:
        # Engines answer conversations in one call whole, whatever is asked.
        call.is_stream = self._call.is_stream and self._path in STREAMING
        bodies = self._request.app[BODIES]
        self._list = LongListCall(
            self._served.pool,
            places.gate if places else None,
            self._prompts,
            call,
            copies=self._call.copies,
            hold=partial(bodies.add, self._context),
            release=partial(bodies.release, self._context),
            timeout_s=self._settings.engine_timeout_s,
        )
        return self._list

    def _release_body(self) -> None:
        """Each piece goes by itself."""

    def _read_usage(self, answer: EngineAnswer, body: bytes) -> Usage | None:
        return self._context.told_tokens

    async def _count_stream(self, stream: EventStream) -> None:
        """One that a piece's refusal ended was left in the middle."""
        if self._list is not None and self._list.has_failed:
            await self._charge(stream)
        else:
            await self._count(self._context.told_tokens)

    async def _count_lost(self, stream: EventStream | None, error: GatewayError) -> None:
        await self._charge(stream)

    async def _count_refused(self) -> None:
        await self._charge(None)

    async def _charge(self, stream: EventStream | None) -> None:
        """However it broke off."""
        if self._list is None:
            return
        told = Spent(*self._context.told_tokens, model=self._served.name)
        most, claim = self._bound_answer(), self.claim
        accounts, caller = self._accounts, self._caller
        await charge_cut_list(accounts, caller, self._list, told, most_each=most, claim=claim)

    def _measure_running(self) -> float:
        return 0.0  # each piece has had a time of its own


def _asks_for_models(request: web.Request) -> bool:
    return request.method == "GET" and request.path.startswith(_MODELS)


def _pick_headers(answer: EngineAnswer) -> dict[str, str]:
    return {name: answer.headers[name] for name in _PASSED_ON if name in answer.headers}
