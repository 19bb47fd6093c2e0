"""What the relay comparison puts around the gateway: an engine that answers at once, and the
plainest relay that aiohttp makes. Each is a program: `python -m … engine`.
"""

from __future__ import annotations

import argparse
import asyncio
import re
from typing import ClassVar, cast

import aiohttp
import orjson
import uvloop
from aiohttp import web

STREAM_CHUNKS = 100
HOLD = b"hold "  # the answer takes for ever
LOSE = b"lose "  # the first try of it is broken off
_NUMBER = re.compile(rb"number-(\d+)\.")
_LENGTH = re.compile(rb"[Cc]ontent-[Ll]ength: (\d+)")


class EngineProtocol(asyncio.Protocol):
    """Answers a request of HTTP/1.1 keep-alive with the number it found in it.

    Raw, so that it costs next to nothing.
    """

    lost: ClassVar[set[tuple[bytes, bool, int]]] = set()  # path, whether a stream, number

    def __init__(self) -> None:
        self._buffer = b""
        self._streams: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        for task in self._streams:
            task.cancel()

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        while (end := self._buffer.find(b"\r\n\r\n")) >= 0:
            found = _LENGTH.search(self._buffer, 0, end)
            length = int(found[1]) if found else 0
            if len(self._buffer) < end + 4 + length:
                return
            head, body = self._buffer[:end], self._buffer[end + 4 : end + 4 + length]
            self._buffer = self._buffer[end + 4 + length :]
            self._answer(head, body)

    def _answer(self, head: bytes, body: bytes) -> None:
        if LOSE in body and self._is_first_try(head, body):
            self._transport.abort()
        elif HOLD in body and b'"stream":true' not in body:
            pass
        elif head.startswith(b"GET /v1/models"):
            self._transport.write(_whole(b'{"data":[{"id":"m","max_model_len":4096}]}'))
        elif head.startswith(b"GET"):
            self._transport.write(_whole(b"{}"))
        elif b'"stream":true' in body:
            pause_s = 3600.0 if HOLD in body else 0.0
            task = asyncio.create_task(self._stream(find_number(body), pause_s))
            self._streams.add(task)
            task.add_done_callback(self._streams.discard)
        elif head.startswith(b"POST /v1/completions"):
            prompts, number = len(orjson.loads(body)["prompt"]), find_number(body)
            choice = b'{"index":%d,"text":"number-%d.","finish_reason":"stop"}'
            choices = b",".join(choice % (index, number) for index in range(prompts))
            self._transport.write(_whole(b'{"choices":[%s],"usage":{}}' % choices))
        else:
            text = b'{"id":"x","object":"chat.completion","choices":[{"index":0,"message":'
            text += b'{"role":"assistant","content":"number-%d."},"finish_reason":"stop"}],'
            text += b'"usage":{"prompt_tokens":9,"completion_tokens":9,"total_tokens":18}}'
            self._transport.write(_whole(text % find_number(body)))

    def _is_first_try(self, head: bytes, body: bytes) -> bool:
        """Each number is asked for in several ways, and its first try is lost in each."""
        tried = (head.split(b" ", 2)[1], b'"stream":true' in body, find_number(body))
        is_first = tried not in self.lost
        self.lost.add(tried)
        return is_first

    async def _stream(self, number: int, pause_s: float) -> None:
        self._transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        event = b'data: {"choices":[{"index":0,"delta":{"content":"number-%d."}}]}\n\n' % number
        for _ in range(STREAM_CHUNKS):
            self._transport.write(b"%x\r\n%s\r\n" % (len(event), event))
            await asyncio.sleep(pause_s)
        done = b"data: [DONE]\n\n"
        self._transport.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(done), done))


def find_number(data: bytes) -> int:
    found = _NUMBER.search(data)
    return int(found[1]) if found else 0


def find_numbers(data: bytes) -> list[int]:
    return [int(number) for number in _NUMBER.findall(data)]


def _whole(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


async def serve_engine(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(EngineProtocol, "127.0.0.1", port)
    await server.serve_forever()


async def serve_plain_relay(port: int, engine: str) -> None:
    """As little as aiohttp can do."""

    async def predict(request: web.Request) -> web.Response:
        asked = orjson.loads(await request.read())
        body = orjson.dumps({"prompt": asked["prompt"], "max_tokens": 256, "temperature": 0.0})
        headers = {"Content-Type": "application/json"}
        async with session.post(engine + "/v1/completions", data=body, headers=headers) as upstream:
            answer = orjson.loads(await upstream.read())
        texts = [choice["text"].strip() for choice in answer["choices"]]
        return web.Response(body=orjson.dumps({"response": texts}), content_type="application/json")

    async def relay(request: web.Request) -> web.StreamResponse:
        body = await request.read()
        headers = {"Content-Type": "application/json"}
        async with session.request(
            request.method, engine + request.path, data=body, headers=headers
        ) as upstream:
            if upstream.content_type != "text/event-stream":
                return web.Response(
                    body=await upstream.read(),
                    status=upstream.status,
                    content_type=upstream.content_type,
                )
            response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
            await response.prepare(request)
            async for chunk in upstream.content.iter_any():
                await response.write(chunk)
            await response.write_eof()
            return response

    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:
        app = web.Application()
        app.router.add_post("/predict", predict)
        app.router.add_route("*", "/{path:.*}", relay)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
        await asyncio.Event().wait()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("role", choices=("engine", "plain"))
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--url", default="", help="the engine, for the plain relay")
    arguments = parser.parse_args()
    if arguments.role == "engine":
        uvloop.run(serve_engine(arguments.port))
    else:
        uvloop.run(serve_plain_relay(arguments.port, arguments.url))


if __name__ == "__main__":
    main()
