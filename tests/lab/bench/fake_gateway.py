"""A gateway of the tests' own before the fake engine, and a benchmark of both that is soon done."""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from aiohttp import web

from common.questions import read_questions
from lab.bench import vllm_bench as outside
from lab.bench.bench_options import PARTS, QUICK, parse_arguments
from lab.bench.run_bench import BenchRun
from lab.reports.console import ProgressLine
from tests.fake_engine import MODEL_FOLDER, serve_app

TINY = replace(
    QUICK,
    seconds=dict.fromkeys(PARTS, 60.0),
    fewest=6,
    most=6,
    prompts=12,
    streams=(1, 8),
    outside=outside.VllmBenchLoad(prompts=4, output_tokens=8),
)


def build_bench(gateway: str, engine: str, *options: str, **scale: Any) -> BenchRun:
    fixed = ["--url", gateway, "--direct-url", engine, "--tokenizer", str(MODEL_FOLDER)]
    fixed += ["--status-url", "http://127.0.0.1:9"]  # nobody's
    arguments = parse_arguments([*fixed, *options])
    arguments.scale = replace(TINY, **scale)
    asked = read_questions(Path(arguments.questions)).take(24)
    return BenchRun(arguments, asked, ProgressLine(0, 1, io.StringIO()))


@dataclass
class FakeGateway:
    """A gateway of the tests' own, and how it goes wrong."""

    delay_s: float = 0.005
    mixes: bool = False
    status: int = 200
    timing: str = "engine;dur=1"
    cuts_streams: bool = False
    places: int | None = None
    calls: int = 0
    before: str = ""
    at_work: asyncio.Semaphore | None = None


@contextlib.asynccontextmanager
async def serve_fake(fake: FakeGateway) -> AsyncIterator[str]:
    """It answers as the fake engine does, without asking it."""
    fake.at_work = asyncio.Semaphore(fake.places) if fake.places else None
    app = web.Application()

    async def root(_request: web.Request) -> web.Response:
        return web.json_response({"status": "batch"})

    async def predict(request: web.Request) -> web.Response:
        prompt = (await request.json())["prompt"]
        questions = prompt if isinstance(prompt, list) else [prompt]
        texts = [await _answer(fake, question) for question in questions]
        if fake.mixes and len(texts) > 1:
            texts[0], texts[-1] = texts[-1], texts[0]
        response = texts if isinstance(prompt, list) else texts[0]
        return _reply(fake, {"response": response})

    async def chat(request: web.Request) -> web.StreamResponse:
        body = await request.json()
        return await _stream(fake, request, await _answer(fake, body["messages"][0]["content"]))

    app.router.add_get("/", root)
    app.router.add_post("/predict", predict)
    app.router.add_post("/v1/chat/completions", chat)
    async with serve_app(app) as url:
        yield url


def _reply(fake: FakeGateway, body: Any) -> web.Response:
    return web.json_response(body, status=fake.status, headers={"Server-Timing": fake.timing})


async def _answer(fake: FakeGateway, question: str) -> str:
    """When it mixes, the answer to the question before."""
    fake.calls += 1
    async with fake.at_work or contextlib.nullcontext():
        await asyncio.sleep(fake.delay_s)
    other = fake.before if fake.mixes and fake.before else question
    fake.before = question
    return f"answer:{other}"


async def _stream(fake: FakeGateway, request: web.Request, text: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for piece in (text[:4], text[4:]):
        choices = [{"index": 0, "delta": {"content": piece}}]
        await response.write(b"data: " + json.dumps({"choices": choices}).encode() + b"\n\n")
    if not fake.cuts_streams:
        await response.write(b"data: [DONE]\n\n")
    return response
