"""What passing a /v1 call on costs: the gateway beside a plain relay and the engine itself.

A stand-in engine that answers at once makes the gateway's own cost visible. Every request carries
a number and must get it back: a relay that mixes answers up is fast and useless. The arms take
turns in random order; the engine is asked twice, so that the control says what a difference means.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import socket
import statistics
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import cast

import uvloop

ROOT = Path(__file__).resolve().parent.parent
STREAM_CHUNKS = 100
CHUNK_FRAME = re.compile(rb"\r\n[0-9a-f]+\r\n")
NUMBER = re.compile(rb"number-(\d+)\.")
BOUNDS = {
    "added p50 at concurrency 1, ms": ("at most", 0.35),
    "requests/s at 64, of the plain relay's": ("at least", 0.75),
    "stream chunks/s at 64, of the plain relay's": ("at least", 0.9),
    "memory at 500 open streams, MB": ("at most", 150.0),
}


# --- the engine's stand-in: raw, so that it costs next to nothing ---------------------------------


class EngineProtocol(asyncio.Protocol):
    """Answers a request of HTTP/1.1 keep-alive with the number it found in it."""

    def __init__(self) -> None:
        self.buffer = b""
        self.streams: set[asyncio.Task[None]] = set()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast("asyncio.Transport", transport)

    def connection_lost(self, exc: Exception | None) -> None:
        for task in self.streams:
            task.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        while (end := self.buffer.find(b"\r\n\r\n")) >= 0:
            found = re.search(rb"[Cc]ontent-[Ll]ength: (\d+)", self.buffer[:end])
            length = int(found[1]) if found else 0
            if len(self.buffer) < end + 4 + length:
                return
            head, body = self.buffer[:end], self.buffer[end + 4 : end + 4 + length]
            self.buffer = self.buffer[end + 4 + length :]
            self.answer(head, body)

    def answer(self, head: bytes, body: bytes) -> None:
        if head.startswith(b"GET /v1/models"):
            card = b'{"data":[{"id":"m","max_model_len":4096}]}'
            self.transport.write(whole(card))
        elif head.startswith(b"GET"):
            self.transport.write(whole(b"{}"))
        elif b'"stream":true' in body:
            pause_s = 3600.0 if b"hold" in body else 0.0
            task = asyncio.create_task(self.stream(number_of(body), pause_s))
            self.streams.add(task)
            task.add_done_callback(self.streams.discard)
        elif head.startswith(b"POST /v1/completions"):
            prompts = body.count(b"[") - body.count(b'"stop":[') - body.count(b'_ids":[') - 1
            choice = b'{"index":%d,"text":"a","finish_reason":"stop"}'
            choices = b",".join(choice % index for index in range(max(1, prompts)))
            self.transport.write(whole(b'{"choices":[%s],"usage":{}}' % choices))
        else:
            text = b'{"id":"x","object":"chat.completion","choices":[{"index":0,"message":'
            text += b'{"role":"assistant","content":"number-%d."},"finish_reason":"stop"}],'
            text += b'"usage":{"prompt_tokens":9,"completion_tokens":9,"total_tokens":18}}'
            self.transport.write(whole(text % number_of(body)))

    async def stream(self, number: int, pause_s: float) -> None:
        self.transport.write(
            b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
            b"Transfer-Encoding: chunked\r\n\r\n"
        )
        event = b'data: {"choices":[{"index":0,"delta":{"content":"number-%d."}}]}\n\n' % number
        for _ in range(STREAM_CHUNKS):
            self.transport.write(b"%x\r\n%s\r\n" % (len(event), event))
            await asyncio.sleep(pause_s)
        done = b"data: [DONE]\n\n"
        self.transport.write(b"%x\r\n%s\r\n0\r\n\r\n" % (len(done), done))


def whole(body: bytes) -> bytes:
    head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
    return head % len(body) + body


def number_of(data: bytes) -> int:
    found = NUMBER.search(data)
    return int(found[1]) if found else 0


async def serve_engine(port: int) -> None:
    server = await asyncio.get_running_loop().create_server(EngineProtocol, "127.0.0.1", port)
    await server.serve_forever()


# --- the reference: as little as aiohttp can do ---------------------------------------------------


async def serve_plain_relay(port: int, engine: str) -> None:
    import aiohttp  # noqa: PLC0415 — the other roles do without it
    from aiohttp import web  # noqa: PLC0415

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
        app.router.add_route("*", "/{path:.*}", relay)
        runner = web.AppRunner(app, access_log=None, handler_cancellation=True)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", port, backlog=1024).start()
        await asyncio.Event().wait()


# --- the load -------------------------------------------------------------------------------------


class Caller:
    """One keep-alive connection that asks and checks."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    @classmethod
    async def connect(cls, port: int) -> Caller:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def send(self, number: int, *, stream: bool, extra: bytes = b"") -> None:
        body = b'{"model":"m","messages":[{"role":"user","content":"%snumber-%d."}]%s}'
        body %= (extra, number, b',"stream":true' if stream else b"")
        head = (
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        )
        self.writer.write(head + b"Content-Length: %d\r\n\r\n" % len(body) + body)

    async def ask(self, number: int) -> None:
        self.send(number, stream=False)
        head = await self.reader.readuntil(b"\r\n\r\n")
        length = re.search(rb"[Cc]ontent-[Ll]ength: (\d+)", head)
        if not head.startswith(b"HTTP/1.1 200") or length is None:
            raise SystemExit(f"bench: {head!r}")
        check(await self.reader.readexactly(int(length[1])), number)

    async def ask_stream(self, number: int) -> int:
        self.send(number, stream=True)
        data = await self.reader.readuntil(b"\r\n0\r\n\r\n")
        # A relay frames anew what it read, and may cut an event in the middle of its number.
        numbers = NUMBER.findall(CHUNK_FRAME.sub(b"", data))
        if len(numbers) != STREAM_CHUNKS or any(int(one) != number for one in numbers):
            raise SystemExit(f"bench: stream {number} came back wrong: {data[:300]!r}")
        return len(numbers)


def check(body: bytes, number: int) -> None:
    if number_of(body) != number:
        raise SystemExit(f"bench: asked {number}, got {body[:300]!r}: answers were mixed up")


async def latency_ms(port: int, requests: int) -> float:
    caller = await Caller.connect(port)
    times = []
    for number in range(requests):
        started = time.perf_counter()
        await caller.ask(number)
        times.append(time.perf_counter() - started)
    caller.writer.close()
    return statistics.median(times) * 1e3


async def requests_per_s(port: int, seconds: float, concurrency: int = 64) -> float:
    async def work(first: int) -> int:
        caller = await Caller.connect(port)
        done = 0
        while time.perf_counter() < deadline:
            await caller.ask(first + done)
            done += 1
        caller.writer.close()
        return done

    started = time.perf_counter()
    deadline = started + seconds
    counts = await asyncio.gather(*(work(n * 1_000_000) for n in range(concurrency)))
    return sum(counts) / (time.perf_counter() - started)


async def chunks_per_s(port: int, seconds: float, concurrency: int = 64) -> float:
    async def work(first: int) -> int:
        caller = await Caller.connect(port)
        chunks = streams = 0
        while time.perf_counter() < deadline:
            chunks += await caller.ask_stream(first + streams)
            streams += 1
        caller.writer.close()
        return chunks

    started = time.perf_counter()
    deadline = started + seconds
    counts = await asyncio.gather(*(work(n * 1_000_000) for n in range(concurrency)))
    return sum(counts) / (time.perf_counter() - started)


async def memory_mb_at_streams(port: int, pid: int, streams: int = 500) -> float:
    callers = [await Caller.connect(port) for _ in range(streams)]
    for number, caller in enumerate(callers):
        caller.send(number, stream=True, extra=b"hold ")
    for caller in callers:
        await caller.reader.readuntil(b"\r\n\r\n")
    memory_mb = resident_mb(pid)
    for caller in callers:
        caller.writer.close()
    await asyncio.gather(*(caller.writer.wait_closed() for caller in callers))
    return memory_mb


def resident_mb(pid: int) -> float:
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"VmRSS:\s+(\d+) kB", text)
    return int(found[1]) / 1024 if found else 0.0


# --- the run --------------------------------------------------------------------------------------


@dataclass
class Figures:
    """One workload: a figure for each arm, round by round."""

    name: str
    by_arm: dict[str, list[float]] = field(default_factory=dict)

    def median(self, arm: str) -> float:
        return statistics.median(self.by_arm[arm])

    def paired(self, arm: str, other: str, combine: Callable[[float, float], float]) -> float:
        pairs = zip(self.by_arm[arm], self.by_arm[other], strict=True)
        return statistics.median(combine(a, b) for a, b in pairs)

    def ratio(self, arm: str, other: str) -> float:
        return self.paired(arm, other, lambda a, b: a / b)


@contextlib.contextmanager
def start(role: str, core: int, *arguments: str) -> Iterator[subprocess.Popen[bytes]]:
    """A role in a process of its own, on a core of its own where there are two."""
    command = [sys.executable, __file__, "--role", role, *arguments]
    if role == "gateway":
        command = [sys.executable, "-m", "gateway", *arguments]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.DEVNULL)
    if (os.cpu_count() or 1) > 1:
        os.sched_setaffinity(process.pid, {core})
    try:
        yield process
    finally:
        process.terminate()
        process.wait(timeout=20)


@contextlib.asynccontextmanager
async def arms() -> AsyncIterator[tuple[dict[str, int], int]]:
    """The ports by arm, and the gateway's process id."""
    engine, plain, gateway = free_ports(3)
    url = f"http://127.0.0.1:{engine}"
    flags = ["--port", str(gateway), "--engines", url, "--prompt-style", "raw"]
    flags += ["--warmup-prompts", "1", "--log-format", "json"]
    with (
        start("engine", 0, "--port", str(engine)),
        start("plain", 1, "--port", str(plain), "--url", url),
        start("gateway", 1, *flags) as process,
    ):
        if (os.cpu_count() or 1) > 1:
            os.sched_setaffinity(0, {0})
        for port in (engine, plain, gateway):
            await wait_answering(port)
        yield {"direct": engine, "control": engine, "plain": plain, "gateway": gateway}, process.pid


async def wait_answering(port: int) -> None:
    for _ in range(300):
        with contextlib.suppress(OSError, asyncio.IncompleteReadError, SystemExit):
            await (await Caller.connect(port)).ask(1)
            return
        await asyncio.sleep(0.1)
    raise SystemExit("bench: something did not start")


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for held in sockets:
            held.bind(("127.0.0.1", 0))
        return [held.getsockname()[1] for held in sockets]


async def run(arguments: argparse.Namespace) -> int:
    workloads: dict[str, Callable[[int], Awaitable[float]]] = {
        "p50 at concurrency 1, ms": lambda port: latency_ms(port, 500),
        "requests/s at 64": lambda port: requests_per_s(port, 1.5),
        "stream chunks/s at 64": lambda port: chunks_per_s(port, 1.5),
    }
    figures = {name: Figures(name) for name in workloads}
    async with arms() as (ports, pid):
        for number in range(-1, arguments.rounds):
            for name, measure in workloads.items():
                for arm in random.sample(list(ports), len(ports)):
                    if sys.stderr.isatty():
                        print(f"\r\033[Kround {number + 1}: {name}, {arm}", end="", file=sys.stderr)
                    value = await measure(ports[arm])
                    if number >= 0:
                        figures[name].by_arm.setdefault(arm, []).append(value)
        memory_mb = await memory_mb_at_streams(ports["gateway"], pid)
    if sys.stderr.isatty():
        print("\r\033[K", end="", file=sys.stderr)
    return report(list(figures.values()), memory_mb, arguments)


def report(figures: list[Figures], memory_mb: float, arguments: argparse.Namespace) -> int:
    latency, rate, chunks = figures
    for one in figures:
        cells = "  ".join(f"{arm} {one.median(arm):10.2f}" for arm in one.by_arm)
        print(f"{one.name:26} {cells}  control/direct {one.ratio('control', 'direct'):.3f}")
    results = {
        "added p50 at concurrency 1, ms": latency.paired("gateway", "direct", lambda a, b: a - b),
        "requests/s at 64, of the plain relay's": rate.ratio("gateway", "plain"),
        "stream chunks/s at 64, of the plain relay's": chunks.ratio("gateway", "plain"),
        "memory at 500 open streams, MB": memory_mb,
    }
    plain_ms = latency.paired("plain", "direct", lambda a, b: a - b)
    print(f"the plain relay adds {plain_ms:.3f} ms")
    passed = True
    for name, value in results.items():
        word, bound = BOUNDS[name]
        held = value <= bound if word == "at most" else value >= bound
        passed = passed and held
        print(f"{'within' if held else 'OVER  '}  {name}: {value:.3f} ({word} {bound:g})")
    if arguments.json:
        data = {"results": results, "rounds": {one.name: one.by_arm for one in figures}}
        Path(arguments.json).write_text(json.dumps(data, indent=1) + "\n")
    return 0 if passed else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="write the figures there")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--port", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--url", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.role == "engine":
        uvloop.run(serve_engine(arguments.port))
    elif arguments.role == "plain":
        uvloop.run(serve_plain_relay(arguments.port, arguments.url))
    return uvloop.run(run(arguments))


if __name__ == "__main__":
    sys.exit(main())
