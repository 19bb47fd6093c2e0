"""How far it is from socket to socket: which functions of the project stand between a caller's
request and the write to an engine, seen in a running gateway.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import aiohttp
from aiohttp import web

_RECORDER = Path(__file__).with_name("stack_recorder.py")
_START_S = 60.0
_MODEL = "demo"
_PREDICT = {"prompt": ["one", "two", "three"]}
_CHAT = {"model": _MODEL, "stream": True, "messages": [{"role": "user", "content": "one"}]}


class NotMeasured(Exception):
    """The tree's gateway did not start, or did not ask the engine."""


@dataclass(frozen=True)
class CallPath:
    """The project's frames, outermost first, each `file:function`."""

    name: str
    frames: list[str]

    @property
    def files(self) -> list[str]:
        return sorted({frame.partition(":")[0] for frame in self.frames})


async def measure_call_paths(root: Path) -> list[CallPath]:
    """A batch and a stream to the engine, and a stream's chunk on its way back."""
    with TemporaryDirectory() as name:
        records = Path(name) / "records"
        records.touch()
        async with (
            serve_engine() as engine,
            run_gateway(root, engine, records) as url,
            aiohttp.ClientSession() as session,
        ):
            await ask(session, f"{url}/predict", _PREDICT)
            predict = read_records(records)
            await ask(session, f"{url}/v1/chat/completions", _CHAT)
            stream = read_records(records)[len(predict) :]
    return [
        choose_longest("predict to engine", predict, "engine"),
        choose_longest("stream to engine", stream, "engine"),
        choose_longest("chunk to caller", stream, "caller"),
    ]


async def ask(session: aiohttp.ClientSession, url: str, body: dict[str, Any]) -> None:
    async with session.post(url, json=body) as answer:
        text = await answer.text()
        if answer.status != 200:
            raise NotMeasured(f"{url} answered {answer.status}: {text}")


def read_records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def choose_longest(name: str, records: list[dict[str, Any]], kind: str) -> CallPath:
    """A request may ask more than once, and a stream writes often."""
    paths = [record["frames"] for record in records if record["kind"] == kind]
    if not paths:
        raise NotMeasured(f"{name}: the gateway does not write by the functions that are watched")
    return CallPath(name, max(paths, key=len))


@asynccontextmanager
async def run_gateway(root: Path, engine: str, records: Path) -> AsyncIterator[str]:
    """The tree's own gateway, recorded; warm when it is handed out."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    dropped = ("GATEWAY_", "PYTHONPATH")  # else another tree's gateway may be found
    others = {name: value for name, value in os.environ.items() if not name.startswith(dropped)}
    settings = {
        "GATEWAY_ENGINES": engine,
        "GATEWAY_PORT": str(port),
        "GATEWAY_PROMPT_STYLE": "raw",
        "GATEWAY_WARMUP_PROMPTS": "1",
        "GATEWAY_LOG_FORMAT": "json",
    }
    log = records.with_name("log")
    with log.open("wb") as output:
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            str(_RECORDER),
            str(records),
            cwd=root,
            env=others | settings,
            stdout=output,
            stderr=output,
        )
    try:
        await wait_ready(f"http://127.0.0.1:{port}/readyz", process, log)
        yield f"http://127.0.0.1:{port}"
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def wait_ready(url: str, process: asyncio.subprocess.Process, log: Path) -> None:
    loop = asyncio.get_running_loop()
    deadline = loop.time() + _START_S
    async with aiohttp.ClientSession() as session:
        while process.returncode is None and loop.time() < deadline:
            try:
                async with session.get(url) as answer:
                    if answer.status == 200:
                        return
            except aiohttp.ClientError:
                pass  # it does not listen yet
            await asyncio.sleep(0.1)
    raise NotMeasured(f"the gateway did not become ready:\n{read_end(log)}")


def read_end(log: Path) -> str:
    return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-5:])


@asynccontextmanager
async def serve_engine() -> AsyncIterator[str]:
    """As much of vLLM's HTTP face as a gateway asks for."""
    app = web.Application()
    app.router.add_get("/health", handle_health)
    app.router.add_get("/metrics", handle_health)
    app.router.add_get("/v1/models", handle_models)
    app.router.add_post("/v1/completions", handle_completions)
    app.router.add_post("/v1/chat/completions", handle_chat)
    runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
    await runner.setup()
    try:
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        yield f"http://127.0.0.1:{runner.addresses[0][1]}"
    finally:
        await runner.cleanup()


async def handle_health(_request: web.Request) -> web.Response:
    return web.Response()


async def handle_models(_request: web.Request) -> web.Response:
    card = {"id": _MODEL, "object": "model", "max_model_len": 4096}
    return web.json_response({"object": "list", "data": [card]})


async def handle_completions(request: web.Request) -> web.Response:
    choices = [
        {"index": index, "text": "an answer", "finish_reason": "stop"}
        for index, _ in enumerate((await request.json())["prompt"])
    ]
    usage = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
    return web.json_response({"object": "text_completion", "choices": choices, "usage": usage})


async def handle_chat(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
    await response.prepare(request)
    for word in ("an ", "answer"):
        choice = {"index": 0, "delta": {"content": word}, "finish_reason": None}
        chunk = {"object": "chat.completion.chunk", "model": _MODEL, "choices": [choice]}
        await response.write(f"data: {json.dumps(chunk)}\n\n".encode())
    await response.write(b"data: [DONE]\n\n")
    return response
