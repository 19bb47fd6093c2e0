"""/v1/* and what else an engine serves to callers: its answers and streams, passed on as they come.

A list of paths, not a prefix: nothing administrative of the engine can be reached. A caller who
hangs up cancels the engine's work.
"""

from __future__ import annotations

import asyncio
from functools import partial

from aiohttp import web

from gateway.admission.accounts import ACCOUNTS, Spent
from gateway.admission.calls import (
    BYTES_A_TOKEN,
    bound_answer,
    check_call,
    expect_tokens,
    parse_call,
)
from gateway.admission.keys import CALLER
from gateway.admission.limits import CLAIM
from gateway.admission.media_hosts import MEDIA_HOSTS
from gateway.admission.served_models import MODELS, SERVED_MODEL
from gateway.admission.tickets import LaneName, build_ticket, open_claim, parse_deadline
from gateway.admission.unattended import UnattendedCall
from gateway.config import SETTINGS
from gateway.engines.attempt import EngineCall
from gateway.engines.client import EngineAnswer
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
from gateway.schemas.transcription import FORMS, parse_form
from gateway.streaming import STORED_STREAM, EventStream, StoredStream, Usage, open_stream

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
    ticket = build_ticket(
        request.headers,
        caller,
        call.sequences,
        lane,
        context.deadline,
        claim=request.get(CLAIM),
    )
    if caller.counts_tokens and request.path in _USING_TOKENS:
        ticket.tokens = _expect_tokens(request, call)
    context.record.note_queued()
    if turn is not None and is_background:
        return await _start(request, call, turn, ticket.lane)
    async with served.queue.enter(ticket):
        context.record.note_entered()
        response = await _pass_on(request, call)
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
) -> web.Response:
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
    body = await find_responses(request.app).start(turn, one, asking)
    return web.Response(body=body, content_type="application/json")


async def _store(
    request: web.Request, turn: Turn, answer: web.StreamResponse
) -> web.StreamResponse:
    responses = find_responses(request.app)
    stream: StoredStream | None = request.get(STORED_STREAM)
    if stream is not None and stream.is_waiting:
        try:
            await responses.keep_stream(turn)
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
        request[SERVED_MODEL] = models.all[0]
        return await _pass_on(request, OpenAIRequest(b"", is_greedy=True))
    body = build_model_list(models.list_cards(caller), request.match_info.get("model"))
    return web.Response(body=body, content_type="application/json")


async def _tell_tokenizer(request: web.Request) -> web.StreamResponse:
    """That of the model that the query names, else of the default one."""
    models, caller, name = request.app[MODELS], request[CALLER], request.query.get("model") or None
    name = request.app[SETTINGS].alias_map.get(name or "", name)
    if caller.models and (name is not None or models.is_several):
        caller.check_model(name)
    request[SERVED_MODEL] = await models.find(name, caller, request[CONTEXT].deadline)
    return await _pass_on(request, OpenAIRequest(b"", is_greedy=True))


async def _pass_on(request: web.Request, call: OpenAIRequest) -> web.StreamResponse:
    stream: EventStream | None = None
    lines, _ = request[SERVED_MODEL].queue.count("batch")
    try:
        engine_call = _build_call(request, call)
        async with request[SERVED_MODEL].pool.attempt(engine_call) as answer:
            # It is not sent again, and a stream may last.
            engine_call.body, call.body = None, b""
            _release_body(request)
            if answer.body is not None:
                return await _answer_whole(request, call, answer)
            stream = open_stream(
                request,
                hides_usage=call.hides_usage,
                hides_chunk_usage=call.hides_chunk_usage,
                fingerprint=engine_call.asked.fingerprint if engine_call.asked else "",
                turn=request.get(TURN),
            )
            await stream.start(answer.status, _pick_headers(answer))
            await stream.copy(answer)
    except GatewayError as error:
        if isinstance(error, DeadlinePassed | EngineTimeout):
            await _charge(request, call, stream)
        if stream is None or not stream.has_started:
            raise
        if isinstance(error, EngineError) and not isinstance(error, EngineTimeout):
            await _count(request, call, stream.usage)
        return await stream.end(error)
    except (asyncio.CancelledError, ConnectionError):
        await _charge(request, call, stream)
        if stream is None or not stream.has_started:
            raise
        end = request[CONTEXT].take_end()
        if end is None:
            raise
        return await stream.end(end)
    _learn_first_token(request, call, stream, lines)
    usage = stream.usage
    if usage is None and request.path in FORMS:
        usage = 0, stream.told_tokens
    await _count(request, call, usage)
    return await stream.end()


def _learn_first_token(
    request: web.Request, call: OpenAIRequest, stream: EventStream, lines: int
) -> None:
    """With so many lines of batches beside it at its start."""
    if stream.timing.chunks and call.sequences == 1:
        first_s = stream.timing.first_chunk_at - request[CONTEXT].sent_at
        request[SERVED_MODEL].first_tokens.learn(first_s, lines)


def _release_body(request: web.Request) -> None:
    """But for the items that are stored at the end."""
    context, turn = request[CONTEXT], request.get(TURN)
    kept = 0 if turn is None else len(turn.input)
    request.app[BODIES].release(context, max(0, context.held_bytes - kept))


def _build_call(request: web.Request, call: OpenAIRequest) -> EngineCall:
    context, settings = request[CONTEXT], request.app[SETTINGS]
    context.carry(request.headers, _SENT)
    if call.content_type:
        context.carried = {**context.carried, "Content-Type": call.content_type}
    affinity = call.affinity
    if settings.routing == "session":
        affinity = request.headers.get("X-Session-Id") or affinity
    return EngineCall(
        context,
        request.method,
        _name_path(request),
        settings.max_attempts,
        body=call.body or None,
        sequences=call.sequences,
        is_repeatable=call.is_greedy,
        affinity=affinity,
        parse=partial(_read_models, request) if _asks_for_models(request) else None,
        is_relayed=True,
    )


def _name_path(request: web.Request) -> str:
    if _asks_for_models(request):
        return _MODELS  # one is picked from the list here: vLLM has no route for it
    return _ENGINES_NAMES.get(request.path) or request.rel_url.raw_path_qs


def _asks_for_models(request: web.Request) -> bool:
    return request.method == "GET" and request.path.startswith(_MODELS)


async def _answer_whole(
    request: web.Request, call: OpenAIRequest, answer: EngineAnswer
) -> web.Response:
    headers, body, status = _pick_headers(answer), answer.body or b"", answer.status
    if status == 200:
        if _asks_for_models(request):
            body = answer.value
        await _count(request, call, _read_usage(request, call, answer))
    elif lacks_previous_response(request.path, status, body):
        status, body = 400, build_no_previous_response()
    elif status >= 400:
        body = name_engine_error(status, body, request.path)
        headers["Content-Type"] = "application/json"
        if status == 501:
            headers["x-should-retry"] = "false"  # what it does not know it will not learn
        if status in {429, 503}:
            headers.setdefault("Retry-After", _RETRY_AFTER_S)  # vLLM does not say
    return web.Response(status=status, headers=headers, body=body)


def _read_usage(request: web.Request, call: OpenAIRequest, answer: EngineAnswer) -> Usage | None:
    body = answer.body or b""
    if request.path in FORMS:  # the engine counts seconds of sound, if anything
        return 0, len(body) // BYTES_A_TOKEN
    told = parse_usage(body)
    if told is None and request.path in POOLING:
        # Vectors as bytes: a header may tell, or nothing does.
        told = parse_usage(answer.headers.get("metadata", "").encode("utf-8", "surrogateescape"))
        return told or (_guess_prompt(request, call), 0)
    return told


def _read_models(request: web.Request, status: int, body: bytes) -> bytes:
    aliases, wanted = request.app[SETTINGS].alias_map, request.match_info.get("model")
    return build_models(body, aliases, wanted) if status == 200 else body


def _pick_headers(answer: EngineAnswer) -> dict[str, str]:
    return {name: answer.headers[name] for name in _PASSED_ON if name in answer.headers}


async def _charge(request: web.Request, call: OpenAIRequest, stream: EventStream | None) -> None:
    """For what was left in the middle the engine tells no figures, or only the first; for the
    prompt it is a token for four bytes then. Else hanging up would be free.
    """
    if request.path not in _USING_TOKENS or not request[CONTEXT].is_running:
        return
    told = stream.usage[0] if stream and stream.usage else 0
    taken = told if told and call.sequences == 1 else _guess_prompt(request, call)
    given = stream.told_tokens if stream else 0
    name = request[SERVED_MODEL].name
    spent = Spent(taken, given, request[CONTEXT].running_s(), call.sequences, name)
    caller, most = request[CALLER], _bound_answer(request, call)
    await request.app[ACCOUNTS].charge_left(caller, spent, most, claim=request.get(CLAIM))


async def _count(request: web.Request, call: OpenAIRequest, usage: Usage | None) -> None:
    if usage is None:
        return
    context = request[CONTEXT]
    context.record.prompt_tokens, context.record.completion_tokens = usage
    request[SERVED_MODEL].count_tokens(*usage)
    timing, running_s = context.record.stream, context.running_s()
    if timing is not None and timing.held_s > running_s * _HELD_SHARE:
        running_s = 0.0  # that tells how fast its caller reads, and nothing of the engine
    spent = Spent(*usage, running_s, call.sequences, request[SERVED_MODEL].name)
    await request.app[ACCOUNTS].count_tokens(request[CALLER], spent, request.get(CLAIM))


def _bound_answer(request: web.Request, call: OpenAIRequest) -> int:
    """The most new tokens of a sequence, by the caller's word and by the model's context."""
    if request.path not in _WRITING:
        return 0
    return bound_answer(call, request.app[SETTINGS], request[SERVED_MODEL].pool)


def _expect_tokens(request: web.Request, call: OpenAIRequest) -> int:
    bound, taken = _bound_answer(request, call), _guess_prompt(request, call)
    return expect_tokens(call, taken, bound, request[CALLER], request.app[ACCOUNTS])


def _guess_prompt(request: web.Request, call: OpenAIRequest) -> int:
    """Its tokens, by its size; a sound is no text."""
    return 0 if request.path in FORMS else call.size // BYTES_A_TOKEN
