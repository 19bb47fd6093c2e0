"""Callers of the fault table: each kind of bad answer has its name."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import aiohttp
import pytest
from aiohttp import web

from lab.faults.callers import JobCaller
from lab.load.answers import KnownModel, judge
from lab.load.traffic import SoakClient, Tally
from tests.fake_engine import serve_app

MODEL = KnownModel("demo", [(f"q{number}", f"answer {number}.") for number in range(12)])
RIGHT = dict(MODEL.pairs)

Answer = Callable[[web.Request, str], Any]
Change = Callable[[list[dict[str, Any]]], list[dict[str, Any]]]


@pytest.fixture
async def session() -> AsyncIterator[aiohttp.ClientSession]:
    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=5)) as one:
        yield one


async def ask_stream(session: aiohttp.ClientSession, answer: Answer) -> str:
    """The verdict on a chat stream whose question `answer` gets."""

    async def handle(request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(request)
        question = (await request.json())["messages"][0]["content"]
        for piece in answer(request, question):
            await response.write(piece)
        return response

    app = web.Application()
    app.router.add_post("/v1/chat/completions", handle)
    async with serve_app(app) as url:
        return (await judge(SoakClient(session, url, MODEL, Tally(), 1).chat_stream())).outcome


def event(text: str) -> bytes:
    return b"data: " + json.dumps({"choices": [{"delta": {"content": text}}]}).encode() + b"\n\n"


DONE = b"data: [DONE]\n\n"
FAILED = b'data: {"error": {"message": "the engine died"}}\n\n'


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        (lambda _, asked: [event(RIGHT[asked]), DONE], "right"),
        (lambda _, asked: [event(RIGHT[asked]), event(RIGHT[asked]), DONE], "doubled"),
        (lambda _, asked: [event(next(a for q, a in MODEL.pairs if q != asked)), DONE], "swapped"),
        (lambda _, asked: [event(RIGHT[asked][:4]), DONE], "wrong"),
        (lambda _, asked: [event(RIGHT[asked])], "lost"),
        (lambda _, asked: [event(RIGHT[asked][:4]), FAILED, DONE], "told"),
        (lambda request, _: request.transport.abort() or [event("…")], "cut"),
    ],
    ids=["right", "doubled", "swapped", "wrong", "lost", "told", "cut"],
)
async def test_stream_has_a_verdict(
    session: aiohttp.ClientSession, answer: Answer, outcome: str
) -> None:
    assert await ask_stream(session, answer) == outcome


async def test_call_of_nobody_is_refused(session: aiohttp.ClientSession) -> None:
    client = SoakClient(session, "http://127.0.0.1:9", MODEL, Tally(), 1)
    assert (await judge(client.predict_one())).outcome == "refused"


async def test_call_that_is_never_answered_is_lost() -> None:
    async def hang(_: web.Request) -> web.Response:
        await asyncio.Event().wait()
        return web.Response()

    app = web.Application()
    app.router.add_post("/predict", hang)
    timeout = aiohttp.ClientTimeout(total=0.1)
    async with serve_app(app) as url, aiohttp.ClientSession(timeout=timeout) as session:
        client = SoakClient(session, url, MODEL, Tally(), 1)
        assert (await judge(client.predict_one())).outcome == "lost"


def build_batches(change: Change, losses: int = 0) -> web.Application:
    """What answers a job's lines right, and is away for so many looks at it."""
    lines: list[dict[str, Any]] = []
    left = losses

    async def upload(request: web.Request) -> web.Response:
        form = await request.post()
        file = form["file"]
        assert isinstance(file, web.FileField)
        lines[:] = map(json.loads, file.file.read().decode().splitlines())
        return web.json_response({"id": "file-1"})

    async def create(_: web.Request) -> web.Response:
        return web.json_response({"id": "batch-1"})

    async def tell(_: web.Request) -> web.Response:
        nonlocal left
        left -= 1
        if left >= 0:
            return web.json_response({}, status=503)
        ended = {"id": "batch-1", "status": "completed", "error_file_id": None}
        return web.json_response({**ended, "output_file_id": "file-2"})

    async def read(_: web.Request) -> web.Response:
        rows = change([{"custom_id": one["custom_id"], "response": answer(one)} for one in lines])
        return web.Response(text="\n".join(map(json.dumps, rows)))

    def answer(line: dict[str, Any]) -> dict[str, Any]:
        text = RIGHT[line["body"]["messages"][0]["content"]]
        return {"status_code": 200, "body": {"choices": [{"message": {"content": text}}]}}

    app = web.Application()
    app.router.add_post("/v1/files", upload)
    app.router.add_post("/v1/batches", create)
    app.router.add_get("/v1/batches/batch-1", tell)
    app.router.add_get("/v1/files/file-2/content", read)
    return app


def swap(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    texts = [row["response"] for row in rows]
    return [row | {"response": text} for row, text in zip(rows, texts[1:] + texts[:1], strict=True)]


def fail_one(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [rows[0] | {"response": {"status_code": 502, "body": {}}}, *rows[1:]]


@pytest.mark.parametrize(
    ("change", "outcome"),
    [
        (lambda rows: rows, "right"),
        (lambda rows: [*rows, rows[0]], "doubled"),
        (lambda rows: rows[1:], "lost"),
        (swap, "swapped"),
        (fail_one, "told"),
    ],
    ids=["right", "doubled", "lost", "swapped", "told"],
)
async def test_job_has_a_verdict(
    session: aiohttp.ClientSession, change: Change, outcome: str
) -> None:
    async with serve_app(build_batches(change, losses=1)) as url:
        verdict = await judge(JobCaller(session, [url], MODEL, limit_s=10).run())

    assert verdict.outcome == outcome, verdict.detail


async def test_job_that_never_ends_is_lost(session: aiohttp.ClientSession) -> None:
    async with serve_app(build_batches(lambda rows: rows, losses=10**9)) as url:
        verdict = await judge(JobCaller(session, [url], MODEL, limit_s=0.5).run())

    assert verdict.outcome == "lost"
    assert "has not ended" in verdict.detail
