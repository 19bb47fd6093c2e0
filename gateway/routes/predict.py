"""POST /predict: the course's door. Parse the questions, enter the gate, generate, answer."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import replace

from aiohttp import web

from gateway.admission.keys import CALLER, KEYRING
from gateway.admission.queue import GATE, LaneName, Visit, build_visit, within
from gateway.config import SETTINGS
from gateway.engines.pool import POOL
from gateway.errors import DeadlinePassed, GatewayError, InvalidRequest
from gateway.observability.metrics import METRICS
from gateway.observability.trace import CONTEXT_HEADERS, TRACE
from gateway.prompts.builder import PROMPTS
from gateway.request_body import read_body
from gateway.schemas.wire import (
    Answer,
    PredictRequest,
    Prompt,
    Sampling,
    build_predict_response,
    parse_predict,
)

_CHARACTERS_A_TOKEN = 4


async def handle_predict(request: web.Request) -> web.Response:
    settings, trace = request.app[SETTINGS], request[TRACE]
    asked = parse_predict(await read_body(request), settings)
    trace.n_prompts = len(asked.questions)
    trace.carried = {
        name: request.headers[name] for name in CONTEXT_HEADERS if name in request.headers
    }
    metrics = request.app[METRICS]
    metrics.predict_prompts.observe(len(asked.questions))
    count = len(asked.questions)
    lane: LaneName = "batch" if count > 1 else "interactive"
    visit = build_visit(request.headers, request[CALLER], count, lane)  # its deadline runs from now
    answers = await _answer(request, asked, visit) if asked.questions else []
    metrics.count_answers(trace, sum(len(one) for one in answers if isinstance(one, str)))
    body = build_predict_response(asked, answers, single_as_list=settings.single_as_list)
    response = web.Response(body=body, content_type="application/json")
    if asked.ignored_fields:
        response.headers["X-Ignored-Fields"] = ", ".join(asked.ignored_fields)
    return response


async def _answer(
    request: web.Request, asked: PredictRequest, visit: Visit
) -> list[str | GatewayError]:
    app = request.app
    builder, deadline = app[PROMPTS], visit.loop_deadline()
    # Says 503 before any work is done.
    card = (await within(deadline, app[POOL].acquire(deadline=deadline))).card
    max_model_len = card.max_model_len if card else None
    if card is not None:
        request[CALLER].check_model(card.name)
    sampling = builder.complete(asked.sampling)
    if max_model_len is not None and sampling.max_tokens > max_model_len:
        if not asked.is_length_asked:  # the setting's length, for models with a longer context
            sampling = replace(sampling, max_tokens=max(1, max_model_len - 1))
        else:
            raise InvalidRequest(
                f"max_tokens must be at most {max_model_len}, all that the model takes",
                param="max_tokens",
            )
    prompts = await within(deadline, builder.build(asked.questions, asked.system, max_model_len))
    good = [prompt for prompt in prompts if not isinstance(prompt, GatewayError)]
    visit = replace(visit, sequences=len(good))
    generated = await _generate(request, good, sampling, visit) if good else ()
    answers = _put_in_order(prompts, generated)
    for answer in answers:
        if isinstance(answer, GatewayError):
            app[METRICS].prompts_failed.labels(answer.error_code).inc()
    return [builder.clean(one.text) if isinstance(one, Answer) else one for one in answers]


async def _generate(
    request: web.Request, prompts: Sequence[Prompt], sampling: Sampling, visit: Visit
) -> Sequence[Answer | GatewayError]:
    app, trace = request.app, request[TRACE]
    trace.note_queued()
    async with app[GATE].enter(visit):
        trace.note_entered()
        entered = time.perf_counter()
        try:
            work = app[POOL].generate(prompts, sampling, trace=trace)
            done = await within(visit.loop_deadline(), work)
        except (asyncio.CancelledError, DeadlinePassed):
            # The engine will not tell what it has done; hanging up is not free all the same.
            app[KEYRING].charge_tokens(request[CALLER], sum(map(_estimate_tokens, prompts)), 0)
            raise
        finally:
            trace.engine_s = time.perf_counter() - entered
    trace.prompt_tokens, trace.completion_tokens = done.prompt_tokens, done.completion_tokens
    trace.shared = done.shared
    app[KEYRING].count_tokens(request[CALLER], done.prompt_tokens, done.completion_tokens)
    return done.answers


def _estimate_tokens(prompt: Prompt) -> int:
    return len(prompt) // _CHARACTERS_A_TOKEN if isinstance(prompt, str) else len(prompt)


def _put_in_order(
    prompts: Sequence[Prompt | GatewayError], generated: Sequence[Answer | GatewayError]
) -> list[Answer | GatewayError]:
    """The engine's answers, with each refused prompt's refusal back in its place."""
    following = iter(generated)
    return [prompt if isinstance(prompt, GatewayError) else next(following) for prompt in prompts]
