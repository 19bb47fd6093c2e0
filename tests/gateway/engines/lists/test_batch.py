"""The batch is cut, put together and halved without losing, doubling or mixing up an answer."""

from __future__ import annotations

import asyncio

import aiohttp
import orjson
import pytest
from aiohttp import web
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.engines.connections import build_connector
from gateway.engines.engine import Engine, EngineState
from gateway.engines.lists.batch import BatchGenerator
from gateway.engines.pool import EnginePool
from gateway.errors import GatewayError
from gateway.observability.metrics import Metrics
from gateway.observability.request_record import RequestRecord
from gateway.request_context import RequestContext
from gateway.schemas.predict import default_sampling
from gateway.schemas.vllm import Completion, CompletionStream
from tests.fake_engine import serve_app
from tests.gateway.conftest import make_settings


class PickyEngine:
    """An engine that refuses a call with a bad prompt in it, as vLLM does."""

    def __init__(self, bad: set[str]) -> None:
        self.bad = bad
        self.answered: list[str] = []
        self.calls = 0

    def build(self) -> web.Application:
        app = web.Application(client_max_size=2**24)
        app.router.add_post("/v1/completions", self._complete)
        return app

    async def _complete(self, request: web.Request) -> web.Response:
        self.calls += 1
        prompts = orjson.loads(await request.read())["prompt"]
        if self.bad.intersection(prompts):
            return web.json_response({"error": {"message": "no"}}, status=400)
        self.answered += prompts
        choices = [
            {"index": place, "text": f"to {prompt}", "finish_reason": "stop"}
            for place, prompt in enumerate(prompts)
        ]
        return web.json_response({"choices": choices, "usage": {"prompt_tokens": 1}})


async def _generate(picky: PickyEngine, prompts: list[str], per_call: int) -> Completion:
    options, metrics = make_settings(max_prompts_per_call=per_call), Metrics()
    async with serve_app(picky.build()) as url:
        connector = build_connector(options)
        async with aiohttp.ClientSession(connector=connector):
            engine = Engine(url, options, connector, metrics)
            engine.enter_state(EngineState.READY, "")
            generator = BatchGenerator(EnginePool([engine], options, metrics), options, metrics)
            context = RequestContext("id", RequestRecord("/predict"))
            whole = await generator.generate(prompts, default_sampling(options), context)
            assert engine.running == 0
            return whole


@settings(max_examples=60, deadline=None)
@given(
    count=st.integers(1, 120),
    bad=st.sets(st.integers(0, 119), max_size=6),
    per_call=st.integers(1, 64),
)
def test_generate_answers_each_prompt_once_in_order(
    count: int, bad: set[int], per_call: int
) -> None:
    prompts = [f"p{number}" for number in range(count)]
    picky = PickyEngine({f"p{number}" for number in bad})

    whole = asyncio.run(_generate(picky, prompts, per_call))

    texts = [answer if isinstance(answer, str) else None for answer in whole.answers]
    assert texts == [None if prompt in picky.bad else f"to {prompt}" for prompt in prompts]
    assert sorted(picky.answered) == sorted(set(prompts) - picky.bad)
    pieces = -(-count // per_call)
    assert picky.calls <= pieces + 2 * len(bad) * max(1, per_call.bit_length())


def _event(**fields: object) -> bytes:
    choice = {"index": 0, "text": "a", "finish_reason": None} | fields
    usage = {"prompt_tokens": 3, "completion_tokens": 2}
    return b"data: " + orjson.dumps({"choices": [choice], "usage": usage}) + b"\n\n"


def test_stream_is_put_together_however_it_is_cut() -> None:
    whole = _event() + _event(index=1, text="b", finish_reason="length")
    whole += _event(text="c", finish_reason="stop") + b"data: [DONE]\n\n"
    for cut_at in range(len(whole)):
        stream = CompletionStream(2)
        ended = [*stream.read(whole[:cut_at]), *stream.read(whole[cut_at:])]
        assert ended == [
            (1, "b", 3, 2),
            (0, "ac", 3, 2),
        ]


@pytest.mark.parametrize(
    ("events", "code"),
    [
        (_event(finish_reason="stop") * 2, "engine_garbled"),  # it ends twice
        (_event(index=1), "engine_garbled"),
        (_event(index=-1), "engine_garbled"),
        (_event(text=None, finish_reason="stop"), "engine_garbled"),
        (b"data: {\n\n", "engine_garbled"),
        (b"data: []\n\n", "engine_garbled"),
        (b'data: {"error": {"message": "no", "code": 400}}\n\n', "engine_refused"),
        (b'data: {"error": {"message": "no", "code": 500}}\n\n', "engine_failed"),
    ],
)
def test_stream_that_makes_no_sense_or_tells_an_error_is_one(events: bytes, code: str) -> None:
    with pytest.raises(GatewayError) as raised:
        list(CompletionStream(1).read(events))
    assert raised.value.error_code == code
