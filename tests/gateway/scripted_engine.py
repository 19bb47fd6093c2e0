"""An engine by hand: a bare socket server that may do to a call what HTTP does not allow, too.

It answers looks as an engine does, and a call's prompt with `answer:` and the prompt. What it does
to a call beyond that is the test's: a fault is a coroutine that is given the call.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import orjson

from gateway.engines.pool import POOL
from tests.gateway.conftest import Served, serve_gateway, until

_MODELS = orjson.dumps({"object": "list", "data": [{"id": "fake", "max_model_len": 512}]})


@dataclass(frozen=True, slots=True)
class Call:
    """A POST that has arrived whole, on its connection."""

    path: str
    fields: dict[str, Any]
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    body: bytes

    @property
    def prompts(self) -> list[str]:
        if "messages" in self.fields:
            messages = self.fields["messages"]
            many = messages if isinstance(messages[0], list) else [messages]
            return [one[-1]["content"] for one in many]
        prompt = self.fields["prompt"]
        return prompt if isinstance(prompt, list) else [prompt]

    def good_answer(self) -> bytes:
        """Head and body, as an engine that is well would write them."""
        texts = [f"answer:{prompt}" for prompt in self.prompts]
        if self.fields.get("stream"):
            return stream_head() + b"".join(map(chunk, stream_events(texts[0]))) + b"0\r\n\r\n"
        choices = [
            {"index": index, "text": text, "message": {"content": text}, "finish_reason": "stop"}
            for index, text in enumerate(texts)
        ]
        return whole_answer(orjson.dumps({"choices": choices}))

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def reset(self) -> None:
        """Both ways at once, and what is on its way is lost."""
        self.writer.transport.abort()

    async def wait_closed(self) -> None:
        """Until the other side has had enough."""
        with contextlib.suppress(ConnectionError):
            await self.reader.read()


def whole_answer(body: bytes, status: str = "200 OK", length: int | None = None) -> bytes:
    head = f"HTTP/1.1 {status}\r\nContent-Type: application/json\r\nContent-Length: "
    return head.encode() + b"%d\r\n\r\n" % (len(body) if length is None else length) + body


def stream_head() -> bytes:
    return (
        b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
    )


def stream_events(text: str) -> list[bytes]:
    pieces = [text[:7], text[7:]]
    events = [{"choices": [{"index": 0, "delta": {"content": one}}]} for one in pieces]
    return [*(b"data: " + orjson.dumps(event) + b"\n\n" for event in events), b"data: [DONE]\n\n"]


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


Fault = Callable[[Call], Awaitable[None]]


async def answer_well(call: Call) -> None:
    await call.send(call.good_answer())


@dataclass
class ScriptedEngine:
    """One listening socket. `faults` are used up one a call, then `usual` holds."""

    usual: Fault = answer_well
    faults: list[Fault] = field(default_factory=list)
    calls: list[Call] = field(default_factory=list)
    open_connections: int = 0
    _tasks: set[asyncio.Task[None]] = field(default_factory=set)

    @contextlib.asynccontextmanager
    async def serve(self) -> AsyncIterator[str]:
        server = await asyncio.start_server(self._meet, "127.0.0.1", 0, limit=2**26)
        try:
            yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        finally:
            server.close()
            for task in list(self._tasks):
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.open_connections += 1
        try:
            while await self._serve_one(reader, writer):
                pass
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass
        finally:
            self.open_connections -= 1
            self._tasks.discard(task)
            writer.close()

    async def _serve_one(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        method, path, _ = head.split(" ", 2)
        if method == "GET":
            writer.write(whole_answer(_MODELS if path == "/v1/models" else b"{}"))
            return True
        length = int(head.lower().partition("content-length: ")[2].partition("\r\n")[0])
        body = await reader.readexactly(length)
        call = Call(path, orjson.loads(body), reader, writer, body)
        if call.prompts[0].startswith("warm"):
            await answer_well(call)
            return True
        self.calls.append(call)
        await (self.faults.pop(0) if self.faults else self.usual)(call)
        return not writer.is_closing()


@contextlib.asynccontextmanager
async def serve_scripted(
    tmp_path: Path, engine: ScriptedEngine, **settings: Any
) -> AsyncIterator[Served]:
    """A gateway before it, warm."""
    questions = tmp_path / "warm.jsonl"
    questions.write_text('{"question": "warm"}\n')
    async with (
        engine.serve() as url,
        serve_gateway(
            engines=(url,),
            wait_ready=False,
            tokenizer=None,
            prompt_style="raw",
            warmup_file=questions,
            breaker_failures=1000,
            engine_timeout_s=60,
            **settings,
        ) as served,
    ):
        await until(lambda: served.app[POOL].is_ready)
        yield served
        await until(lambda: served.app[POOL].engines[0].running == 0)
