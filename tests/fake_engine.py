"""A stand-in for vLLM's HTTP face that can misbehave on demand; real ports, real sockets.

It answers a prompt with `answer:` and the question it finds in it, so that a test can tell whose
answer it got. Run as a program it serves on a port: `python -m tests.fake_engine --port 8001`.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import re
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import orjson
from aiohttp import BodyPartReader, web
from aiohttp.typedefs import Handler
from tokenizers import Tokenizer

from common.project import DEMO_MODEL

FLOOD_BYTES = 256 * 2**20
_FLOOD_EVENT = b"data: " + b"x" * 2**14 + b"\n\n"
MODEL_FOLDER = DEMO_MODEL
# Where each of them finds its texts.
POOLING_ROUTES = {
    **dict.fromkeys(("/pooling", "/classify"), "input"),
    **dict.fromkeys(("/score", "/v1/score"), "text_2"),
    **dict.fromkeys(("/rerank", "/v1/rerank", "/v2/rerank"), "documents"),
    "/v2/embed": "texts",
}
_USER_TURN = re.compile(r"<\|im_start\|>user\n(.*?)<\|im_end\|>", re.DOTALL)


@dataclass
class Behaviour:
    """What the engine does; tests change it while it runs."""

    model: str = "fake"
    adapters: list[str] = field(default_factory=list)
    takes_adapters: bool = True
    adapters_answer: asyncio.Event | None = None  # a change is answered once it is set
    models_delay_s: float = 0.0
    max_model_len: int = 512
    fingerprint: str = "vllm-fake"
    routes: frozenset[str] | None = None  # where its model is for some alone
    is_healthy: bool = True
    delay_s: float = 0.0
    delays: Callable[[str], float] = lambda question: 0.0
    refuses: Callable[[str], bool] = lambda question: False
    refused_field: str | None = None
    aborts: Callable[[str], bool] = lambda question: False
    fails: Callable[[str], bool] = lambda question: False  # 500 to these, in streams after the 200
    status: int = 200
    statuses: Callable[[str], int] = lambda question: 200  # of completions, by prompt
    retry_after_s: int | None = None
    body: bytes | None = None
    cuts_connection: bool = False
    drops_last_choice: bool = False
    stream_cut_after: int | None = None
    cuts: Callable[[str], bool] = lambda question: True  # which streams that is for
    stream_gap_s: float = 0.0
    before_event: Callable[[int], Awaitable[None]] | None = None  # of a response's stream
    knows_stream_interval: bool = True
    stream_error: dict[str, Any] | None = None  # told in the stream, after the 200
    flooded_bytes: int = 0
    floods: Callable[[str], bool] = lambda question: False
    calls: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    responses: tuple[str, ...] = ()  # that it has kept
    asked_responses: list[str] = field(default_factory=list)
    describes: bool = True  # vLLM does not with --disable-fastapi-docs
    described: int = 0
    running: int = 0
    cancelled: int = 0
    unreadable: int = 0
    streamed: int = 0  # characters, in chats and completions of one prompt
    metrics: str = ""
    scrapes: int = 0
    slots: asyncio.Semaphore | None = None  # sequences that run; others wait in order of arrival


BEHAVIOUR = web.AppKey("behaviour", Behaviour)
TOKENIZER = web.AppKey("tokenizer", Tokenizer)


# Those whose answers count here are as the real engine's; of the rest it says which they are.
ECHOED_ROUTES = ("/v1/chat/completions/batch", "/v1/messages/count_tokens")


@cache
def read_tokenizer() -> Tokenizer:
    """One for all engines: a thousand tests start some."""
    return Tokenizer.from_file(str(MODEL_FOLDER / "tokenizer.json"))


def build_fake_engine(behaviour: Behaviour) -> web.Application:
    app = web.Application(client_max_size=2**30, middlewares=[_leave_routes_out])
    app[BEHAVIOUR] = behaviour
    app[TOKENIZER] = read_tokenizer()
    app.router.add_get("/health", _health)
    app.router.add_get("/metrics", _metrics)
    app.router.add_get("/openapi.json", _tell_openapi)
    app.router.add_get("/version", _version)
    app.router.add_get("/v1/models", _models)
    app.router.add_post("/v1/completions", _completions)
    app.router.add_post("/v1/chat/completions", _chat)
    app.router.add_post("/v1/responses", _responses)
    app.router.add_post("/v1/messages", _messages)
    app.router.add_post("/v1/embeddings", _embeddings)
    for path, texts in POOLING_ROUTES.items():
        app.router.add_post(path, partial(_pool_texts, name=texts))
    for path in ("/v1/audio/transcriptions", "/v1/audio/translations"):
        app.router.add_post(path, _transcribe)
    app.router.add_get("/v1/responses/{response_id}", _tell_response)
    app.router.add_post("/v1/responses/{response_id}/cancel", _tell_response)
    for path in ECHOED_ROUTES:
        app.router.add_post(path, _echo)
    app.router.add_get("/tokenizer_info", _tell_tokenizer)
    app.router.add_post("/tokenize", _tokenize)
    app.router.add_post("/detokenize", _detokenize)
    app.router.add_post("/collective_rpc", _admin)
    app.router.add_post("/v1/load_lora_adapter", _load_adapter)
    app.router.add_post("/v1/unload_lora_adapter", _unload_adapter)
    return app


@contextlib.asynccontextmanager
async def serve_app(
    app: web.Application,
    port: int = 0,
    runner: web.AppRunner | None = None,
    host: str = "127.0.0.1",
) -> AsyncIterator[str]:
    """Any app on a free port of the loopback; as aiohttp serves it, unless `runner` knows more."""
    runner = runner or web.AppRunner(
        app, handler_cancellation=True, access_log=None, shutdown_timeout=1
    )
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port).start()
        yield f"http://{host}:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


@web.middleware
async def _leave_routes_out(request: web.Request, handler: Handler) -> web.StreamResponse:
    routes = request.app[BEHAVIOUR].routes
    is_known = request.match_info.http_exception is None
    if request.method == "POST" and not (is_known and (routes is None or request.path in routes)):
        return _json({"detail": "Not Found"}, 404)
    return await handler(request)


async def _health(request: web.Request) -> web.Response:
    return web.Response(status=200 if request.app[BEHAVIOUR].is_healthy else 503)


async def _metrics(request: web.Request) -> web.Response:
    behaviour = request.app[BEHAVIOUR]
    behaviour.scrapes += 1
    return web.Response(text=behaviour.metrics, status=200 if behaviour.metrics else 404)


async def _tell_openapi(request: web.Request) -> web.Response:
    """Of every route that it has, the administrative ones included, as vLLM does."""
    behaviour = request.app[BEHAVIOUR]
    behaviour.described += 1
    if not behaviour.describes:
        return _json({"detail": "Not Found"}, 404)
    schemas = {
        "Call": {"properties": {"x": {"$ref": "#/components/schemas/Part"}}, "required": ["x"]},
        "Part": {"type": "string"},
        "Secret": {"type": "string"},
    }
    body = {"content": {"application/json": {"schema": {"$ref": "#/components/schemas/Call"}}}}
    paths: dict[str, Any] = {"/health": {"get": {}}}
    for route in request.app.router.routes():
        path = route.resource.canonical if route.resource else ""
        if behaviour.routes is None or path in behaviour.routes:
            paths.setdefault(path, {})[route.method.lower()] = {"requestBody": body}
    return _json({"paths": paths, "components": {"schemas": schemas}})


async def _version(_request: web.Request) -> web.Response:
    return _json({"version": "0.32.0"})


async def _models(request: web.Request) -> web.Response:
    behaviour = request.app[BEHAVIOUR]
    await asyncio.sleep(behaviour.models_delay_s)
    card = {"id": behaviour.model, "object": "model", "max_model_len": behaviour.max_model_len}
    cards = [card, *({"id": one, "parent": behaviour.model} for one in behaviour.adapters)]
    return _json({"object": "list", "data": cards})


async def _load_adapter(request: web.Request) -> web.Response:
    behaviour, order = request.app[BEHAVIOUR], await request.json()
    if not behaviour.takes_adapters:
        return _json({"detail": "Not Found"}, 404)
    if order["lora_path"] == "/nowhere":
        message = f"No adapter found for {order['lora_path']}"
        return _json({"error": {"message": message, "code": 404}}, 404)
    if order["lora_name"] in behaviour.adapters:
        message = f"The lora adapter '{order['lora_name']}' has already been loaded."
        return _json({"error": {"message": message, "code": 400}}, 400)
    behaviour.adapters.append(order["lora_name"])
    behaviour.calls.append(order)
    if behaviour.adapters_answer is not None:
        await behaviour.adapters_answer.wait()
    return web.Response(text="Success")


async def _unload_adapter(request: web.Request) -> web.Response:
    adapters, name = request.app[BEHAVIOUR].adapters, (await request.json())["lora_name"]
    if name not in adapters:
        message = f"The lora adapter '{name}' cannot be found."
        return _json({"error": {"message": message, "code": 404}}, 404)
    adapters.remove(name)
    return web.Response(text="Success")


async def _completions(request: web.Request) -> web.StreamResponse:
    behaviour = request.app[BEHAVIOUR]
    call = await _read(request)
    prompts = call.get("prompt")
    if isinstance(prompts, str) or (isinstance(prompts, list) and _is_ids(prompts)):
        prompts = [prompts]
    if not prompts or not isinstance(prompts, list) or not all(map(_is_prompt, prompts)):
        return _refusal("prompt is a text, token ids or a list of those", "prompt")
    copies = max(1, n) if isinstance(n := call.get("n"), int) else 1
    questions = [_question(prompt, request.app[TOKENIZER]) for prompt in prompts]
    questions = [question for question in questions for _ in range(copies)]
    is_list = isinstance(call["prompt"], list) and not _is_ids(call["prompt"])
    ends_one_by_one = bool(call.get("stream")) and is_list
    if not ends_one_by_one:
        async with _working(behaviour, len(questions)):
            await asyncio.gather(*(_run_sequence(behaviour, one) for one in questions))
    if behaviour.cuts_connection:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()
    status = _choose_status(behaviour, call, questions)
    if status != 200 or behaviour.body is not None:
        body = behaviour.body or orjson.dumps({"error": {"message": "broken", "code": 500}})
        return web.Response(status=status, body=body, content_type="application/json")
    if any(behaviour.refuses(question) for question in questions):
        return _refusal("this is not to my taste", behaviour.refused_field)
    if call.get("stream"):
        return await (
            _stream_sequences(request, call, questions)
            if ends_one_by_one
            else _stream(request, call, " ".join(questions))
        )
    choices = [
        {
            "index": index,
            "text": f"{question if call.get('echo') else ''} answer:{question} ",
            "finish_reason": "abort" if behaviour.aborts(question) else "stop",
        }
        for index, question in enumerate(questions)
    ]
    if behaviour.drops_last_choice:
        choices.pop()
    usage = {"prompt_tokens": sum(map(len, prompts)), "completion_tokens": 2 * len(questions)}
    # Order is the field `index`, not the place in the list.
    whole = {"id": "cmpl-1", "model": call.get("model"), "choices": choices[::-1], "usage": usage}
    return _json({**whole, "system_fingerprint": behaviour.fingerprint})


async def _chat(request: web.Request) -> web.StreamResponse:
    behaviour = request.app[BEHAVIOUR]
    call = await _read(request)
    question = _last_text(call.get("messages"))
    if question is None:
        return _refusal("messages is a list of messages with a text", "messages")
    async with _working(behaviour, 1):
        await _run_sequence(behaviour, question)
    if behaviour.cuts_connection:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()
    status = _choose_status(behaviour, call, [question])
    if status != 200:
        broken = {"error": {"message": "broken", "code": status}}
        answer = _json(broken, status)
        if behaviour.retry_after_s is not None:
            answer.headers["Retry-After"] = str(behaviour.retry_after_s)
        return answer
    if call.get("model") not in {behaviour.model, *behaviour.adapters}:
        body = {
            "error": {"message": f"The model `{call.get('model')}` does not exist.", "code": 404}
        }
        return _json(body, status=404)
    if call.get("stream"):
        return await _stream(request, call, question)
    message = {"role": "assistant", "content": f"answer:{question}"}
    choice = {"index": 0, "message": message, "finish_reason": "stop"}
    usage = {"prompt_tokens": 3, "completion_tokens": 4, "prompt_tokens_details": {"cached": 1}}
    return _json({"id": "chat-1", "choices": [choice], "usage": usage})


def _choose_status(behaviour: Behaviour, call: dict[str, Any], questions: Sequence[str]) -> int:
    fails = any(behaviour.fails(question) for question in questions) and not call.get("stream")
    return max(500 if fails else behaviour.status, *map(behaviour.statuses, questions))


async def _stream(request: web.Request, call: dict[str, Any], question: str) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    behaviour = request.app[BEHAVIOUR]
    text, sent, options = "answer:" + question, 0, call.get("stream_options")
    options = options if isinstance(options, dict) else {}
    async with _working(behaviour, 1):
        if behaviour.floods(question):
            await _flood(request, response)
        error = behaviour.stream_error
        if behaviour.fails(question):
            error = {"message": "broken", "code": 500}
        if error:
            await asyncio.sleep(0.01)  # or it would leave with the head
            await response.write(b"data: " + orjson.dumps({"error": error}) + b"\n\n")
            text = ""
        for number, part in enumerate(_cut_text(text, call.get("stream_interval") or 1)):
            if number == behaviour.stream_cut_after and behaviour.cuts(question):
                assert request.transport is not None
                request.transport.abort()
                return response
            sent += len(part)
            choice: dict[str, Any] = {"index": 0, "text": part, "delta": {"content": part}}
            event: dict[str, Any] = {"choices": [choice]}
            if sent == len(text):
                choice["finish_reason"] = "stop"
                if not options.get("include_usage"):  # else the last event has it
                    event["system_fingerprint"] = behaviour.fingerprint
            if options.get("include_usage") and options.get("continuous_usage_stats"):
                event["usage"] = {"prompt_tokens": 5, "completion_tokens": sent}
            await response.write(b"data: " + orjson.dumps(event) + b"\n\n")
            behaviour.streamed += len(part)
            await asyncio.sleep(behaviour.stream_gap_s)
    if options.get("include_usage"):
        usage = {"prompt_tokens": 5, "completion_tokens": len(text), "total_tokens": 5 + len(text)}
        event = {"choices": [], "usage": usage, "system_fingerprint": behaviour.fingerprint}
        await response.write(b"data: " + orjson.dumps(event) + b"\n\n")
    await response.write(b"data: [DONE]\n\n")
    await response.write_eof()
    return response


def _cut_text(text: str, interval: int) -> list[str]:
    """A first token, here a character, and then so many at a time."""
    rest = range(1, len(text), interval)
    return [text[:1], *(text[start : start + interval] for start in rest)] if text else []


async def _stream_sequences(
    request: web.Request, call: dict[str, Any], questions: Sequence[str]
) -> web.StreamResponse:
    """Each sequence as it ends: in one chunk for its beginning and one for the rest, or in one for
    each character where the engine does not know `stream_interval`.
    """
    behaviour = request.app[BEHAVIOUR]
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await response.prepare(request)
    ended = 0

    async def run(index: int, question: str) -> None:
        nonlocal ended
        text = f" answer:{question} "
        parts = [text[:1], text[1:]] if behaviour.knows_stream_interval else list(text)
        async with _working(behaviour, 1):
            await _run_sequence(behaviour, question)
        if ended == behaviour.stream_cut_after and behaviour.cuts(question):
            assert request.transport is not None
            request.transport.abort()
            return
        if behaviour.fails(question):
            error = {"error": {"message": "broken", "code": 500}}
            await response.write(b"data: " + orjson.dumps(error) + b"\n\n")
            return
        ended += 1
        for number, part in enumerate(parts, start=1):
            choice: dict[str, Any] = {"index": index, "text": part, "finish_reason": None}
            if number == len(parts):
                choice["finish_reason"] = "abort" if behaviour.aborts(question) else "stop"
            prompt = call["prompt"][index * len(call["prompt"]) // len(questions)]
            usage = {"prompt_tokens": len(prompt), "completion_tokens": 2}
            event = {"choices": [choice], "usage": usage}
            await response.write(b"data: " + orjson.dumps(event) + b"\n\n")

    async with asyncio.TaskGroup() as group:
        for index, question in enumerate(questions):
            group.create_task(run(index, question))
    if ended == behaviour.stream_cut_after and any(map(behaviour.cuts, questions)):
        if request.transport is not None:
            request.transport.abort()
        return response
    usage = {"prompt_tokens": sum(map(len, call["prompt"])), "completion_tokens": 2 * ended}
    event = {"choices": [], "usage": usage}
    await response.write(b"data: " + orjson.dumps(event) + b"\n\ndata: [DONE]\n\n")
    await response.write_eof()
    return response


async def _flood(request: web.Request, response: web.StreamResponse) -> None:
    """As fast as it is taken, and counts how much that is; keeps next to nothing back itself."""
    assert request.transport is not None
    line = request.transport.get_extra_info("socket")
    line.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2**14)
    for _ in range(FLOOD_BYTES // len(_FLOOD_EVENT)):
        await response.write(_FLOOD_EVENT)
        request.app[BEHAVIOUR].flooded_bytes += len(_FLOOD_EVENT)


async def _responses(request: web.Request) -> web.StreamResponse:
    behaviour, call = request.app[BEHAVIOUR], await _read(request)
    text = _last_input(call.get("input"))
    if text is None:
        return _refusal("input is a text or a list of items", "input")
    previous = call.get("previous_response_id")
    if previous is not None and previous not in behaviour.responses:
        error = {"message": f"Response with id '{previous}' not found.", "code": 404}
        return _json({"error": {**error, "param": "response_id"}}, 404)
    if behaviour.refuses(text):
        return _refusal("this is not to my taste", behaviour.refused_field)
    if not call.get("stream"):
        async with _working(behaviour, 1):
            await _run_sequence(behaviour, text)
    status = _choose_status(behaviour, call, [text])
    if status != 200 or behaviour.body is not None:
        body = behaviour.body or orjson.dumps({"error": {"message": "broken", "code": status}})
        return web.Response(status=status, body=body, content_type="application/json")
    response = _build_response(call, text)
    return await _stream_response(request, response) if call.get("stream") else _json(response)


def _build_response(call: dict[str, Any], text: str) -> dict[str, Any]:
    """As vLLM writes one."""
    said = {"type": "output_text", "text": f"answer:{text}", "annotations": []}
    part = {**said, "logprobs": None}
    message = {"id": "msg_1", "type": "message", "role": "assistant", "status": "completed"}
    repeated = ("instructions", "metadata", "user")
    return {
        "id": "resp-1",
        "created_at": 1,
        "object": "response",
        "status": "completed",
        "model": call.get("model") or "fake",
        "output": [{**message, "content": [part], "phase": None}],
        "parallel_tool_calls": True,
        "temperature": 1.0,
        "tool_choice": "none",
        "tools": [],
        "top_p": 1.0,
        "background": bool(call.get("background")),
        "max_output_tokens": call.get("max_output_tokens") or 500,
        "previous_response_id": call.get("previous_response_id"),
        "usage": {
            "input_tokens": 3,
            "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
            "output_tokens": 4,
            "output_tokens_details": {"reasoning_tokens": 0},
            "total_tokens": 7,
        },
        **{name: call.get(name) for name in repeated},
    }


async def _stream_response(request: web.Request, response: dict[str, Any]) -> web.StreamResponse:
    behaviour = request.app[BEHAVIOUR]
    begun = {**response, "status": "in_progress", "output": [], "usage": None}
    message: dict[str, Any] = response["output"][0]
    part: dict[str, Any] = message["content"][0]
    place = {"item_id": message["id"], "output_index": 0, "content_index": 0}
    unsaid = {**part, "text": ""}
    events: list[dict[str, Any]] = [
        {"type": "response.created", "response": begun},
        {"type": "response.in_progress", "response": begun},
        {
            "type": "response.output_item.added",
            "output_index": 0,
            "item": {**message, "status": "in_progress", "content": []},
        },
        {"type": "response.content_part.added", **place, "part": unsaid},
        *(
            {"type": "response.output_text.delta", **place, "delta": one, "logprobs": []}
            for one in part["text"]
        ),
        {"type": "response.output_text.done", **place, "text": part["text"], "logprobs": []},
        {"type": "response.content_part.done", **place, "part": part},
        {"type": "response.output_item.done", "output_index": 0, "item": message},
        {"type": "response.completed", "response": response},
    ]
    answer = web.StreamResponse(headers={"Content-Type": "text/event-stream; charset=utf-8"})
    await answer.prepare(request)
    async with _working(behaviour, 1):
        for number, event in enumerate(events):
            if number == behaviour.stream_cut_after:
                assert request.transport is not None
                request.transport.abort()
                return answer
            if behaviour.before_event is not None:
                await behaviour.before_event(number)
            data = orjson.dumps({**event, "sequence_number": number})
            await answer.write(f"event: {event['type']}\ndata: ".encode() + data + b"\n\n")
            await asyncio.sleep(behaviour.stream_gap_s)
    await answer.write_eof()
    return answer


def _last_input(value: Any) -> str | None:
    """The last text of a call of /v1/responses."""
    if isinstance(value, str):
        return value
    last = value[-1] if isinstance(value, list) and value else None
    content = last.get("content", last.get("output")) if isinstance(last, dict) else None
    if isinstance(content, list) and content and isinstance(content[-1], dict):
        content = content[-1].get("text")
    return content if isinstance(content, str) else None


async def _messages(request: web.Request) -> web.Response:
    text = _last_text((await _read(request)).get("messages"))
    if text is None:
        return _refusal("messages is a list of messages with a text", "messages")
    usage = {"input_tokens": 3, "output_tokens": 4}
    content = [{"type": "text", "text": f"answer:{text}"}]
    return _json({"id": "msg-1", "type": "message", "content": content, "usage": usage})


async def _embeddings(request: web.Request) -> web.Response:
    texts = await _read_texts(request, "input")
    if isinstance(texts, web.Response):
        return texts
    data = [
        {"index": place, "object": "embedding", "embedding": [ord(one) for one in text[:20]]}
        for place, text in enumerate(texts)
    ]
    usage = {"prompt_tokens": sum(map(len, texts))}
    return _json({"object": "list", "data": data, "usage": usage})


async def _pool_texts(request: web.Request, name: str) -> web.Response:
    texts = await _read_texts(request, name)
    if isinstance(texts, web.Response):
        return texts
    data = [{"index": place, "data": [len(text)]} for place, text in enumerate(texts)]
    usage = {"prompt_tokens": sum(map(len, texts))}
    form = (await request.json()).get("encoding_format")  # the last of `calls` may be another's
    if form in ("bytes", "bytes_only"):
        told = {} if form == "bytes_only" else {"metadata": orjson.dumps({"usage": usage}).decode()}
        body, kind = bytes(map(len, texts)), "application/octet-stream"
        return web.Response(body=body, content_type=kind, headers=told)
    if request.path == "/v2/embed":
        billed = {"billed_units": {"input_tokens": usage["prompt_tokens"]}}
        return _json({"data": data, "meta": billed})
    return _json({"data": data, "usage": usage})


async def _read_texts(request: web.Request, name: str) -> list[str] | web.Response:
    """What a pooling call is about, once the engine is through with it, or what is answered."""
    behaviour, texts = request.app[BEHAVIOUR], (await _read(request)).get(name)
    texts = [texts] if isinstance(texts, str) else texts
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        return _refusal(f"{name} is a text or a list of texts", name)
    if any(map(behaviour.refuses, texts)):
        return _refusal("this is not to my taste", behaviour.refused_field)
    async with _working(behaviour, len(texts)):
        await asyncio.gather(*(_run_sequence(behaviour, text) for text in texts))
    status = _choose_status(behaviour, {}, texts)
    if status != 200:
        return _json({"error": {"message": "broken", "code": status}}, status)
    return texts


async def _transcribe(request: web.Request) -> web.StreamResponse:
    """Says how long the sound was."""
    behaviour = request.app[BEHAVIOUR]
    fields: dict[str, str] = {}
    sound: tuple[str, bytes] | None = None
    async for part in await request.multipart():
        assert isinstance(part, BodyPartReader)
        if part.filename is None:
            fields[part.name or ""] = (await part.read()).decode("utf-8", "replace")
        else:
            sound = part.filename, bytes(await part.read())
    if sound is None:
        return _refusal("send a file", "file")
    filename, data = sound
    behaviour.calls.append({**fields, "file": data, "filename": filename})
    behaviour.headers.append(dict(request.headers))
    async with _working(behaviour, 1):
        await _run_sequence(behaviour, "")
    if fields.get("stream") == "true":
        return await _stream(request, {}, str(len(data)))
    return _json({"text": f"{len(data)} bytes", "usage": {"type": "duration", "seconds": 1}})


async def _tell_response(request: web.Request) -> web.Response:
    behaviour, name = request.app[BEHAVIOUR], request.match_info["response_id"]
    behaviour.asked_responses.append(f"{request.method} {request.path}")
    if behaviour.cuts_connection:
        assert request.transport is not None
        request.transport.abort()
        return web.Response()
    if behaviour.status != 200:
        return _json({"error": {"message": "lost", "code": behaviour.status}}, behaviour.status)
    if name not in behaviour.responses:
        error = {"message": f"Response with id '{name}' not found.", "code": 404}
        return _json({"error": error}, 404)
    return _json({"id": name, "model": behaviour.model, "status": "completed"})


async def _echo(request: web.Request) -> web.Response:
    behaviour, call = request.app[BEHAVIOUR], await _read(request)
    async with _working(behaviour, 1):
        await _run_sequence(behaviour, "")
    return _json({"path": request.path, "call": call, "usage": {"completion_tokens": 7}})


async def _tell_tokenizer(request: web.Request) -> web.Response:
    return _json({"tokenizer_class": request.app[BEHAVIOUR].model.title()})


async def _tokenize(request: web.Request) -> web.Response:
    text = (await _read(request)).get("prompt")
    if not isinstance(text, str):
        return _refusal("prompt is a text", "prompt")
    return _json({"tokens": request.app[TOKENIZER].encode(text).ids})


async def _detokenize(request: web.Request) -> web.Response:
    tokens = (await _read(request)).get("tokens")
    if not isinstance(tokens, list) or not _is_ids(tokens):
        return _refusal("tokens is a list of token ids", "tokens")
    return _json({"prompt": request.app[TOKENIZER].decode(tokens)})


async def _admin(_request: web.Request) -> web.Response:
    return _json({"danger": True})


async def _run_sequence(behaviour: Behaviour, question: str) -> None:
    async with behaviour.slots or contextlib.nullcontext():
        await asyncio.sleep(behaviour.delay_s + behaviour.delays(question))


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


async def _read(request: web.Request) -> dict[str, Any]:
    """The call, remembered for the test; what is no JSON object is refused and counted."""
    behaviour = request.app[BEHAVIOUR]
    try:
        call = orjson.loads(await request.read())
    except orjson.JSONDecodeError:
        call = None
    if not isinstance(call, dict):
        behaviour.unreadable += 1
        return {}
    behaviour.calls.append(call)
    behaviour.headers.append(dict(request.headers))
    return call


def _is_ids(value: Sequence[Any]) -> bool:
    return bool(value) and all(type(one) is int and 0 <= one < 2**31 for one in value)


def _is_prompt(value: Any) -> bool:
    return isinstance(value, str) or (isinstance(value, list) and _is_ids(value))


def _last_text(messages: Any) -> str | None:
    """The last message's text, or nothing if these are no messages."""
    last = messages[-1] if isinstance(messages, list) and messages else None
    text = last.get("content") if isinstance(last, dict) else None
    return text if isinstance(text, str) else None


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
