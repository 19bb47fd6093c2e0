"""POST /predict: the course's door. Parse the questions, enter the gate, generate, answer."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace

from aiohttp import web

from gateway.admission import GATE
from gateway.config import SETTINGS
from gateway.errors import GatewayError, InvalidRequest
from gateway.metrics import METRICS
from gateway.pool import POOL
from gateway.prompts import PROMPTS
from gateway.trace import TRACE, Trace
from gateway.wire import (
    Answer,
    PredictRequest,
    Prompt,
    build_predict_response,
    parse_predict,
)


async def handle_predict(request: web.Request) -> web.Response:
    settings, trace = request.app[SETTINGS], request[TRACE]
    asked = parse_predict(await request.read(), settings)
    trace.n_prompts = len(asked.questions)
    request.app[METRICS].predict_prompts.observe(len(asked.questions))
    answers = await _answer(request.app, asked, trace) if asked.questions else []
    body = build_predict_response(asked, answers, single_as_list=settings.single_as_list)
    response = web.Response(body=body, content_type="application/json")
    if asked.ignored_fields:
        response.headers["X-Ignored-Fields"] = ", ".join(asked.ignored_fields)
    return response


async def _answer(
    app: web.Application, asked: PredictRequest, trace: Trace
) -> list[str | GatewayError]:
    pool, builder, metrics = app[POOL], app[PROMPTS], app[METRICS]
    max_model_len = pool.choose().max_model_len  # says 503 before any work is done
    if max_model_len is not None and asked.sampling.max_tokens > max_model_len:
        raise InvalidRequest(
            f"max_tokens must be at most {max_model_len}, all that the model takes",
            param="max_tokens",
        )
    prompts = await builder.build(asked.questions, asked.system, max_model_len)
    good = [prompt for prompt in prompts if not isinstance(prompt, GatewayError)]
    sampling = replace(
        asked.sampling,
        stop=(*asked.sampling.stop, *builder.stop),
        stop_token_ids=builder.stop_token_ids,
    )
    generated: Sequence[Answer | GatewayError] = ()
    if good:
        queued = time.perf_counter()
        async with app[GATE].enter(len(good)):
            entered = time.perf_counter()
            trace.queue_s = entered - queued
            completion = await pool.generate(good, sampling)
            trace.engine_s = time.perf_counter() - entered
        generated = completion.answers
        trace.prompt_tokens = completion.prompt_tokens
        trace.completion_tokens = completion.completion_tokens
        metrics.tokens.labels("in").inc(completion.prompt_tokens)
        metrics.tokens.labels("out").inc(completion.completion_tokens)
        metrics.queue_seconds.labels(trace.route).observe(trace.queue_s)
    answers = _put_in_order(prompts, generated)
    for answer in answers:
        if isinstance(answer, GatewayError):
            metrics.prompts_failed.labels(answer.error_code).inc()
    return [
        builder.clean(answer.text) if isinstance(answer, Answer) else answer for answer in answers
    ]


def _put_in_order(
    prompts: Sequence[Prompt | GatewayError], generated: Sequence[Answer | GatewayError]
) -> list[Answer | GatewayError]:
    """The engine's answers, with each refused prompt's refusal back in its place."""
    following = iter(generated)
    return [prompt if isinstance(prompt, GatewayError) else next(following) for prompt in prompts]
