"""A server under judgement that can go wrong in every way the grader must see; real sockets.

It knows its references and answers each question with its own. Run as a program it can die for
good: `python -m tests.lab.judged --port 8000 --dies_after 2`.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web
from tokenizers import Tokenizer

from common.project import DEMO_MODEL
from common.questions import QuestionPair

MODEL_FOLDER = DEMO_MODEL
_QUESTIONS = MODEL_FOLDER.parent / "questions.jsonl"


def read_pairs(count: int | None = None) -> list[QuestionPair]:
    lines = _QUESTIONS.read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines[:count]]
    return [QuestionPair(row["question"], row["answer"]) for row in rows]


@dataclass
class Judged:
    """How the server behaves; `reply` gets the right answers and the call's number."""

    root: Any = field(default_factory=lambda: {"status": "batch"})
    root_status: int = 200
    warming_calls: int = 0
    reply: Callable[[list[str], int], Any] = lambda answers, _call: answers
    errors: dict[str, Any] | None = None
    body: Callable[[int], bytes | None] = lambda _call: None
    status: Callable[[int], int] = lambda _call: 200
    delay_s: Callable[[int], float] = lambda _call: 0.0
    cuts: Callable[[int], bool] = lambda _call: False
    dies_after: int | None = None
    model: str = ""
    location: str = ""
    calls: list[Any] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)


JUDGED = web.AppKey("judged", Judged)


def build_judged(judged: Judged, others: Mapping[str, Any] | None = None) -> web.Application:
    """`others` answer in the place of its own handlers."""
    app = web.Application(client_max_size=2**28)
    app[JUDGED] = judged
    for path, own in (
        ("/", _root),
        ("/predict", _predict),
        ("/v1/models", _models),
        ("/tokenize", _tokenize),
    ):
        app.router.add_route("*", path, (others or {}).get(path, own))
    return app


async def _root(request: web.Request) -> web.Response:
    judged = request.app[JUDGED]
    judged.warming_calls -= 1
    if judged.warming_calls >= 0:
        return web.json_response({"status": "warming"}, status=503)
    return web.json_response(judged.root, status=judged.root_status)


async def _predict(request: web.Request) -> web.Response:
    judged = request.app[JUDGED]
    number = len(judged.calls)
    prompt = (await request.json())["prompt"]
    judged.calls.append(prompt)
    judged.headers.append(dict(request.headers))
    if judged.dies_after is not None and number >= judged.dies_after:
        os._exit(1)
    await asyncio.sleep(judged.delay_s(number))
    if judged.cuts(number):
        assert request.transport is not None
        request.transport.abort()
    body = judged.body(number)
    if body is not None:
        headers = {"Location": judged.location} if judged.location else {}
        return web.Response(body=body, status=judged.status(number), headers=headers)
    return web.json_response(_answer(judged, prompt, number), status=judged.status(number))


def _answer(judged: Judged, prompt: str | list[str], number: int) -> dict[str, Any]:
    questions = [prompt] if isinstance(prompt, str) else prompt
    right = [_references().get(question, "") for question in questions]
    response = judged.reply(right, number)
    if isinstance(prompt, str) and response == right:
        response = response[0]
    errors = {} if judged.errors is None else {"errors": judged.errors}
    return {"response": response, **errors}


@functools.lru_cache
def _references() -> dict[str, str]:
    return {pair.question: pair.reference for pair in read_pairs()}


async def _models(request: web.Request) -> web.Response:
    judged = request.app[JUDGED]
    if not judged.model:
        raise web.HTTPNotFound
    return web.json_response({"data": [{"id": judged.model}]})


async def _tokenize(request: web.Request) -> web.Response:
    if not request.app[JUDGED].model:
        raise web.HTTPNotFound
    body = await request.json()
    assert body["add_special_tokens"] is False
    return web.json_response({"tokens": _tokenizer().encode(body["prompt"]).ids})


@functools.lru_cache
def _tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(MODEL_FOLDER / "tokenizer.json"))


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A server under judgement.")
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dies_after", type=int)
    parser.add_argument("--mode", default="batch")
    parser.add_argument("--host", default="127.0.0.1")
    arguments = parser.parse_args(words)
    judged = Judged(root={"status": arguments.mode}, dies_after=arguments.dies_after)
    app = build_judged(judged)
    web.run_app(app, host=arguments.host, port=arguments.port, access_log=None, print=None)


if __name__ == "__main__":
    main()
