"""POST /predict: parse the questions, be admitted with their number, generate, build the answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from aiohttp import web

from gateway.admission.accounts import ACCOUNTS, Spent
from gateway.admission.keys import CALLER
from gateway.admission.limits import CLAIM
from gateway.admission.served_models import MODELS, SERVED_MODEL, ServedModel
from gateway.admission.tickets import LaneName, build_ticket, parse_deadline
from gateway.config import SETTINGS, Settings
from gateway.engines.timeouts import Deadline
from gateway.errors import DeadlinePassed, EngineTimeout, GatewayError, InvalidRequest
from gateway.observability.metrics import METRICS
from gateway.prompts.builder import PromptBuilder
from gateway.request_body import read_body
from gateway.request_context import CONTEXT, TRACE_HEADERS
from gateway.schemas.fields import are_texts, wrong_type
from gateway.schemas.large_json import SMALL_BYTES
from gateway.schemas.predict import (
    PredictRequest,
    build_predict_response,
    parse_large_predict,
    parse_predict,
)
from gateway.schemas.vllm import (
    Answer,
    Completion,
    Prompt,
    Sampling,
    estimate_tokens,
    find_errors,
)

_ANSWERS_AT_ONCE = 1000  # between two looks at the event loop


async def handle_predict(request: web.Request) -> web.Response:
    app, context = request.app, request[CONTEXT]
    asked = await _parse(await read_body(request), app[SETTINGS])
    count = context.record.n_prompts = len(asked.questions)
    app[METRICS].predict_prompts.observe(count)
    context.carry(request.headers, TRACE_HEADERS)
    context.deadline = parse_deadline(request.headers)
    lane: LaneName = "batch" if count > 1 else "interactive"
    caller, claim = request[CALLER], request.get(CLAIM)
    ticket = build_ticket(request.headers, caller, count, lane, context.deadline, claim=claim)

    served = await _find_model(request, asked)
    prompts, sampling, builder = await _build_prompts(request, asked, served)
    good: Sequence[Prompt] = (
        prompts
        if are_texts(prompts)
        else [prompt for prompt in prompts if not isinstance(prompt, GatewayError)]
    )
    done = Completion([])
    if good:
        ticket.sequences, ticket.is_divisible = len(good), True
        if caller.counts_tokens:
            most = sampling.max_tokens * len(good)
            ticket.tokens = sum(map(estimate_tokens, good)) + most
        context.record.note_queued()
        async with served.queue.enter(ticket) as admission:
            context.record.note_entered()
            began = time.perf_counter()
            try:
                done = await served.generator.generate(good, sampling, context, admission.gate)
            except (asyncio.CancelledError, DeadlinePassed, EngineTimeout):
                await _charge_cut(request, sampling, context.told_tokens)
                raise
            finally:
                context.record.engine_s = time.perf_counter() - began
            served.count_tokens(done.prompt_tokens, done.completion_tokens)
            await _count(request, done)
            await _charge_cut(request, sampling, (0, 0))
    answers = _put_in_order(prompts, done.answers)
    return await _build_answer(request, asked, answers, builder)


async def _parse(body: bytes, settings: Settings) -> PredictRequest:
    if len(body) <= SMALL_BYTES:
        return parse_predict(body, settings)
    return await parse_large_predict(body, settings)


async def _find_model(request: web.Request, asked: PredictRequest) -> ServedModel:
    """The default one, unless the caller names another and there may be one."""
    models, name = request.app[MODELS], None
    if asked.model is not None and not models.is_only:
        if not isinstance(asked.model, str):
            raise wrong_type("model", "a string")
        name = request.app[SETTINGS].alias_map.get(asked.model, asked.model)
    served = models.by_name.get(name)
    if served is None:
        served = await models.find(name, request[CALLER], request[CONTEXT].deadline)
    served.requests += 1
    request[SERVED_MODEL] = served
    return served


async def _build_prompts(
    request: web.Request, asked: PredictRequest, served: ServedModel
) -> tuple[Sequence[Prompt | GatewayError], Sampling, PromptBuilder]:
    """What the engines are sent; 503 before any work is done where there is none."""
    pool, prompts, deadline = served.pool, request.app[MODELS].prompts, request[CONTEXT].deadline
    if not asked.questions:
        return [], asked.sampling, prompts.main
    async with Deadline(deadline):
        await pool.ensure_ready(deadline)
        card = pool.read_card()
        max_model_len = card.max_model_len if card else None
        if card is not None:
            # Rights go by the name that is asked for, as on /v1: an adapter has one of its own.
            request[CALLER].check_model(served.name if pool.base else card.name)
        # Not before: until an engine has told what it serves, nobody knows which model it is.
        builder = prompts.find(pool.base or served.name)
        sampling = _fit_length(builder.complete(asked.sampling), asked, max_model_len)
        built = await builder.build(asked.questions, asked.system, max_model_len)
        return built, sampling, builder


def _fit_length(sampling: Sampling, asked: PredictRequest, max_model_len: int | None) -> Sampling:
    if max_model_len is None or sampling.max_tokens <= max_model_len:
        return sampling
    if asked.is_length_asked:
        raise InvalidRequest(
            f"max_tokens must be at most {max_model_len}, all that the model takes",
            param="max_tokens",
        )
    # The setting's length, for models with a longer context.
    return replace(sampling, max_tokens=max(1, max_model_len - 1))


async def _count(request: web.Request, done: Completion) -> None:
    record = request[CONTEXT].record
    record.prompt_tokens, record.completion_tokens = done.prompt_tokens, done.completion_tokens
    record.shared = done.shared
    n_prompts = record.n_prompts or 1
    n_run = max(1, n_prompts - done.shared)
    name = request[SERVED_MODEL].name
    spent = Spent(done.prompt_tokens, done.completion_tokens, sequences=n_run, model=name)
    if n_prompts == 1:  # of more, each has had a time of its own
        spent.seconds = request[CONTEXT].running_s()
    await request.app[ACCOUNTS].count_tokens(request[CALLER], spent, request.get(CLAIM))


async def _charge_cut(request: web.Request, sampling: Sampling, told: tuple[int, int]) -> None:
    """An engine tells of what has ended alone. What has run without an end, because it took too
    long or nobody waits for it any more, is not free all the same.
    """
    context, accounts = request[CONTEXT], request.app[ACCOUNTS]
    taken, given = told
    taken += sum(one.prompt_tokens for one in context.cut_pieces)
    pieces = [Spent(0, 0, one.seconds, one.sequences) for one in context.cut_pieces]
    if taken or given or pieces:
        spent = Spent(taken, given, model=request[SERVED_MODEL].name)
        most, claim = sampling.max_tokens, request.get(CLAIM)
        await accounts.charge_pieces(request[CALLER], spent, pieces, most, claim)


async def _build_answer(
    request: web.Request,
    asked: PredictRequest,
    answers: Sequence[Answer],
    builder: PromptBuilder,
) -> web.Response:
    app = request.app
    texts, errors = await _clean(answers, builder)
    for error in errors.values():
        app[METRICS].prompts_failed.labels(error.error_code).inc()
    app[METRICS].count_answers(request[CONTEXT].record, sum(map(len, texts)))
    single_as_list = app[SETTINGS].single_as_list
    body = await build_predict_response(asked, texts, errors, single_as_list=single_as_list)
    if len(texts) > _ANSWERS_AT_ONCE:
        await asyncio.sleep(0)  # what follows copies all of it again
    response = web.Response(body=body, content_type="application/json")
    ignored = asked.ignored_fields
    if ignored and not app[MODELS].is_only:
        ignored = tuple(name for name in ignored if name != "model")
    if ignored:
        response.headers["X-Ignored-Fields"] = ", ".join(ignored)
    return response


async def _clean(
    answers: Sequence[Answer], builder: PromptBuilder
) -> tuple[list[str], dict[int, GatewayError]]:
    """The texts, empty where there is none, and why, by place."""
    errors = find_errors(answers)
    texts: list[str] = []
    for start in range(0, len(answers), _ANSWERS_AT_ONCE):
        if start:
            await asyncio.sleep(0)
        few = answers[start : start + _ANSWERS_AT_ONCE]
        whole = few if are_texts(few) else [one if isinstance(one, str) else "" for one in few]
        texts += builder.clean(whole)
    return texts, errors


def _put_in_order(
    prompts: Sequence[Prompt | GatewayError], generated: Sequence[Answer]
) -> Sequence[Answer]:
    """The engine's answers, with each refused prompt's refusal back in its place."""
    if len(generated) == len(prompts):
        return generated
    following = iter(generated)
    return [prompt if isinstance(prompt, GatewayError) else next(following) for prompt in prompts]
