"""A stand-in for vLLM's HTTP face that can misbehave on demand; real ports, real sockets.

It answers a prompt with `answer:` and the question it finds in it, so that a test can tell whose
answer it got. Run as a program it serves on a port: `python -m tests.fake_engine --port 8001`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson
from aiohttp import web
from tokenizers import Tokenizer

MODEL_FOLDER = Path(__file__).parent.parent / "demo" / "model"
_USER_TURN = re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", re.DOTALL)


@dataclass
class Behaviour:
    """What the engine does; tests change it while it runs."""

    model: str = "fake"
    max_model_len: int = 512
    is_healthy: bool = True
    delay_s: float = 0.0
    refuses: Callable[[str], bool] = lambda question: False
    refused_field: str | None = None
    aborts: Callable[[str], bool] = lambda question: False
    status: int = 200
    body: bytes | None = None
    cuts_connection: bool = False
    drops_last_choice: bool = False
    stream_cut_after: int | None = None
    stream_gap_s: float = 0.0
    calls: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    running: int = 0
    cancelled: int = 0


BEHAVIOUR = web.AppKey("behaviour", Behaviour)
TOKENIZER = web.AppKey("tokenizer", Tokenizer)


def build_fake_engine(behaviour: Behaviour) -> web.Application:
    app = web.Application(client_max_size=2**30)
    app[BEHAVIOUR] = behaviour
    app[TOKENIZER] = Tokenizer.from_file(str(MODEL_FOLDER / "tokenizer.json"))
    app.router.add_get("/health", _health)
    app.router.add_get("/v1/models", _models)
    app.router.add_post("/v1/completions", _completions)
    app.router.add_post("/v1/chat/completions", _chat)
    app.router.add_post("/tokenize", _tokenize)
    app.router.add_post("/collective_rpc", _admin)
    return app


@contextlib.asynccontextmanager
async def serve_app(app: web.Application, port: int = 0) -> AsyncIterator[str]:
    """Any app on a free port of the loopback, as the programs run theirs."""
    runner = web.AppRunner(app, handler_cancellation=True, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", port).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def _health(request: web.Request) -> web.Response:
    return web.Response(status=200 if request.app[BEHAVIOUR].is_healthy else 503)


async def _models(request: web.Request) -> web.Response:
    behaviour = request.app[BEHAVIOUR]
    card = {"id": behaviour.model, "object": "model", "max_model_len": behaviour.max_model_len}
    return _json({"object": "list", "data": [card]})


async def _completions(request: web.Request) -> web.StreamResponse:
    behaviour = request.app[BEHAVIOUR]
    call = orjson.loads(await request.read())
    behaviour.calls.append(call)
    behaviour.headers.append(dict(request.headers))
    prompts = call["prompt"]
    if isinstance(prompts, str) or (prompts and isinstance(prompts[0], int)):
        prompts = [prompts]
    questions = [_question(prompt, request.app[TOKENIZER]) for prompt in prompts]
    async with _working(behaviour, len(questions)):
        await asyncio.sleep(behaviour.delay_s)
    if behaviour.cuts_connection:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()
    if behaviour.status != 200 or behaviour.body is not None:
        body = behaviour.body or orjson.dumps({"error": {"message": "broken", "code": 500}})
        return web.Response(status=behaviour.status, body=body, content_type="application/json")
    if any(behaviour.refuses(question) for question in questions):
        return _refusal("this is not to my taste", behaviour.refused_field)
    if call.get("stream"):
        return await _stream(request, questions)
    choices = [
        {
            "index": index,
            "text": f" answer:{question} ",
            "finish_reason": "abort" if behaviour.aborts(question) else "stop",
        }
        for index, question in enumerate(questions)
    ]
    if behaviour.drops_last_choice:
        choices.pop()
    usage = {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": 2 * len(questions)}
    # Order is the field `index`, not the place in the list.
    return _json({"id": "cmpl-1", "model": call["model"], "choices": choices[::-1], "usage": usage})


async def _chat(request: web.Request) -> web.StreamResponse:
    behaviour = request.app[BEHAVIOUR]
    call = orjson.loads(await request.read())
    behaviour.calls.append(call)
    question = call["messages"][-1]["content"]
    async with _working(behaviour, 1):
        await asyncio.sleep(behaviour.delay_s)
    if behaviour.cuts_connection:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()
    if behaviour.status != 200:
        return _json({"error": {"message": "broken", "code": behaviour.status}}, behaviour.status)
    if call.get("model") != behaviour.model:
        body = {
            "error": {"message": f"The model `{call.get('model')}` does not exist.", "code": 404}
        }
        return _json(body, status=404)
    if call.get("stream"):
        return await _stream(request, [question])
    message = {"role": "assistant", "content": f"answer:{question}"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "prompt_tokens_details": {"cached": 1}}
    return _json({"id": "chat-1", "choices": [choice], "usage": usage})


async def _stream(request: web.Request, questions: list[str]) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    behaviour = request.app[BEHAVIOUR]
    text = "answer:" + questions[0]
    async with _working(behaviour, 1):
        for number, character in enumerate(text):
            if number == behaviour.stream_cut_after:
                assert request.transport is not None
                request.transport.abort()
                return response
            choice = {"index": 0, "text": character, "delta": {"content": character}}
            await response.write(b"data: " + orjson.dumps({"choices": [choice]}) + b"\n\n")
            await asyncio.sleep(behaviour.stream_gap_s)
    if behaviour.calls[-1].get("stream_options", {}).get("include_usage"):
        usage = {"prompt_tokens": 5, "completion_tokens": len(text), "total_tokens": 5 + len(text)}
        event = {"choices": [], "usage": usage}
        await response.write(b"data: " + orjson.dumps(event) + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


async def _tokenize(request: web.Request) -> web.Response:
    text = orjson.loads(await request.read())["prompt"]
    return _json({"tokens": request.app[TOKENIZER].encode(text).ids})


async def _admin(_request: web.Request) -> web.Response:
    return _json({"danger": True})


@contextlib.asynccontextmanager
async def _working(behaviour: Behaviour, sequences: int) -> AsyncIterator[None]:
    behaviour.running += sequences
    try:
        yield
    except asyncio.CancelledError:
        behaviour.cancelled += sequences
        raise
    finally:
        behaviour.running -= sequences


def _question(prompt: str | list[int], tokenizer: Tokenizer) -> str:
    text = prompt
    if not isinstance(text, str):
        text = tokenizer.decode(text, skip_special_tokens=False)
    turn = _USER_TURN.search(text)
    return turn.group(1) if turn else text


def _refusal(message: str, param: str | None) -> web.Response:
    error = {"message": message, "type": "BadRequestError", "param": param, "code": 400}
    return _json({"error": error}, 400)


def _json(data: object, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(data), status=status, content_type="application/json")


def main() -> None:
    parser = argparse.ArgumentParser(description="A stand-in for vLLM's HTTP face.")
    parser.add_argument("--port", type=int, default=8001)
    parser.add_argument("--host", default="127.0.0.1")
    arguments = parser.parse_args()
    app = build_fake_engine(Behaviour())
    web.run_app(app, host=arguments.host, port=arguments.port, access_log=None, print=None)


if __name__ == "__main__":
    main()
