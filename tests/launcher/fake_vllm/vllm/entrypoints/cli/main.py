"""Starts as `vllm serve` does, prints what it prints, has a core process, and misbehaves on demand.

How it starts is in the variable FAKE_VLLM (`hang_loading`, `dead_core`, `exit_loading=3`,
`ignore_term`, `fork`, `flood`, `no_metrics`, `late_metrics=2`, `echo`, `exit_after=1.5`,
`no_sleep`, `no_waking`, and
`fast_with=WORD`, `wrong_with=WORD`, `dies_with=WORD`, `never_with=WORD` for a word of its argv);
once it runs, POST /fake tells it what to do.
"""
# ruff: noqa: T201, ASYNC110

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import uuid

from aiohttp import web

_CORE = (
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN)\nwhile True: time.sleep(9)"
)


class Server:
    def __init__(self, words: dict[str, str], model: str) -> None:
        self.words = words
        self.model = model
        self.answer = "wrong" if words.get("wrong_with") in sys.argv else "right"
        self.delay_s = 0.2 if "fast_with" in words else 0.0
        if {words.get("fast_with"), words.get("wrong_with")} & set(sys.argv):
            self.delay_s = 0.05
        self.is_stalled = False
        self.tokenize_s = 0.0  # before a request reaches the core; vLLM aborts it when told to stop
        self.lost = 0  # streams whose end the server's count has missed
        self.at_server = 0
        self.running = 0
        self.tokens = 0
        self.looks = 0  # at the counters
        self.is_awake = asyncio.Event()
        self.is_awake.set()
        self.orders: list[str] = []  # to sleep, and to wake
        self.stopping = asyncio.Event()
        self.core: subprocess.Popen[bytes] | None = None

    async def health(self, _request: web.Request) -> web.Response:
        return web.Response()

    async def completions(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        prompts = body["prompt"] if isinstance(body["prompt"], list) else [body["prompt"]]
        self.at_server += 1
        try:
            if body.get("stream"):
                return await self.stream(request)
            return await self.generate(prompts)
        finally:
            self.at_server -= 1

    async def generate(self, prompts: list[str]) -> web.Response:
        await asyncio.sleep(self.tokenize_s)
        if self.stopping.is_set():
            choices = [{"index": i, "finish_reason": "abort"} for i in range(len(prompts))]
            return web.json_response({"choices": choices})
        self.running += len(prompts)
        if len(prompts) > 1 and self.words.get("dies_with") in sys.argv:
            os._exit(1)
        try:
            while self.is_stalled:
                await asyncio.sleep(0.05)
            await self.is_awake.wait()  # vLLM keeps what comes in its sleep
            for _ in range(10):
                await asyncio.sleep(self.delay_s / 10)
                self.tokens += len(prompts)
        finally:
            self.running -= len(prompts)
        choices = [
            {
                "index": i,
                "text": f"to {prompt}" if "echo" in self.words else self.answer,
                "finish_reason": "length",
            }
            for i, prompt in enumerate(prompts)
        ]
        usage = {"completion_tokens": 10 * len(prompts)}
        return web.json_response({"choices": choices, "usage": usage})

    async def stream(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "text/event-stream"})
        await response.prepare(request)
        self.running += 1
        try:
            for _ in range(10):
                await asyncio.sleep(self.delay_s / 10)
                self.tokens += 1
                await response.write(b'data: {"choices":[{"index":0,"text":"right"}]}\n\n')
            await response.write(b"data: [DONE]\n\n")
        finally:
            self.running -= 1
        return response

    async def load(self, _request: web.Request) -> web.Response:
        return web.json_response({"server_load": self.at_server + self.lost})

    async def reset_prefix_cache(self, _request: web.Request) -> web.Response:
        return web.json_response({"success": not self.running})

    async def sleep(self, request: web.Request) -> web.Response:
        self.orders.append(str(request.rel_url))
        if "no_sleep" in self.words:
            return web.Response(status=500)
        self.is_awake.clear()
        level = int(request.query.get("level", 1))
        return web.json_response({"status": "sleeping", "level": level})

    async def wake_up(self, request: web.Request) -> web.Response:
        self.orders.append(str(request.rel_url))
        if "no_waking" in self.words:
            return web.Response(status=500)
        tags = request.query.getall("tags", None)
        if tags in (None, ["kv_cache"]):
            self.is_awake.set()
        status = "awake" if self.is_awake.is_set() else "sleeping"
        return web.json_response({"status": status, "tags": tags})

    async def is_sleeping(self, _request: web.Request) -> web.Response:
        return web.json_response({"is_sleeping": not self.is_awake.is_set()})

    async def collective_rpc(self, request: web.Request) -> web.Response:
        self.orders.append((await request.json())["method"])
        return web.json_response({"results": [None]})

    async def tokenize(self, _request: web.Request) -> web.Response:
        return web.json_response({"tokens": [1, 2, 3]})

    async def models(self, _request: web.Request) -> web.Response:
        card = {"id": self.model, "object": "model", "max_model_len": 2048}
        return web.json_response({"object": "list", "data": [card]})

    async def metrics(self, _request: web.Request) -> web.Response:
        self.looks += 1
        if "no_metrics" in self.words or self.looks <= int(self.words.get("late_metrics", 0)):
            return web.Response(text="# nothing\n")
        lines = [
            f'vllm:num_requests_running{{engine="0"}} {self.running}.0',
            'vllm:num_requests_waiting{engine="0"} 0.0',
            f'vllm:generation_tokens_total{{engine="0"}} {self.tokens}.0',
        ]
        return web.Response(text="\n".join(lines) + "\n")

    async def fake(self, request: web.Request) -> web.Response:
        """Misbehave, from now on or at once."""
        order = await request.json()
        if "exit" in order:
            os._exit(order["exit"])
        if "kill_core" in order:
            assert self.core is not None
            os.kill(self.core.pid, signal.SIGKILL)
        if "say" in order:
            print(order["say"], flush=True)
        self.delay_s = order.get("delay_s", self.delay_s)
        self.tokenize_s = order.get("tokenize_s", self.tokenize_s)
        self.lost = order.get("lost", self.lost)
        self.is_stalled = order.get("stall", self.is_stalled)
        core = self.core.pid if self.core else None
        told = {"core": core, "running": self.running, "orders": self.orders}
        return web.json_response(told)

    def watch_core(self) -> None:
        """As vLLM does it: the core's death ends the server, with code 0."""
        assert self.core is not None
        os.waitpid(self.core.pid, 0)
        print(
            "ERROR 01-01 00:00:00 [core_client.py:1] Engine core died", file=sys.stderr, flush=True
        )
        os._exit(0)

    async def run(self, host: str, port: int) -> None:
        app = web.Application(client_max_size=2**30)
        app.router.add_get("/health", self.health)
        app.router.add_get("/load", self.load)
        app.router.add_get("/metrics", self.metrics)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.completions)
        app.router.add_post("/tokenize", self.tokenize)
        if os.environ.get("VLLM_SERVER_DEV_MODE") == "1":
            app.router.add_post("/reset_prefix_cache", self.reset_prefix_cache)
            app.router.add_post("/collective_rpc", self.collective_rpc)
            app.router.add_post("/sleep", self.sleep)
            app.router.add_post("/wake_up", self.wake_up)
            app.router.add_get("/is_sleeping", self.is_sleeping)
        app.router.add_post("/fake", self.fake)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=10)
        await runner.setup()
        await web.TCPSite(runner, host, port).start()
        loop = asyncio.get_running_loop()
        if "ignore_term" in self.words:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
        else:
            loop.add_signal_handler(signal.SIGTERM, self.stopping.set)
        await self.stopping.wait()
        while self.running:
            await asyncio.sleep(0.05)
        if self.core and "fork" not in self.words:
            self.core.kill()
        await runner.cleanup()
        os._exit(0)


def read_words(text: str) -> dict[str, str]:
    pairs = (word.partition("=") for word in text.split())
    return {key: value for key, _, value in pairs}


def main() -> None:
    words = read_words(os.environ.get("FAKE_VLLM", ""))
    option = {sys.argv[i]: sys.argv[i + 1] for i in range(len(sys.argv) - 1)}
    print("INFO 01-01 00:00:00 [model.py:1] Resolved architecture: FakeForCausalLM", flush=True)
    if "hang_loading" in words:
        if "ignore_term" in words:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
            subprocess.Popen([sys.executable, "-c", _CORE], process_group=0)
            print("deaf", flush=True)
        if "dead_core" in words:
            print("(EngineCore pid=7) RuntimeError: Executor failed.", flush=True)
            print(
                "(EngineCore pid=7) ERROR 01-01 00:00:00 [core.py:1] EngineCore failed to start.",
                flush=True,
            )
        time.sleep(600)
    if "exit_loading" in words or words.get("never_with") in sys.argv:
        print("ValueError: the fake model is not supported", file=sys.stderr, flush=True)
        sys.exit(int(words.get("exit_loading", 1)))
    for percent in (0, 50, 100):
        print(f"Loading safetensors checkpoint shards: {percent}% Completed | 1/2", flush=True)
    if "flood" in words:
        for number in range(50_000):
            print(f"WARNING 01-01 00:00:00 [flood.py:1] line {number} {'x' * 100}", file=sys.stderr)
        print("y" * 1_000_000, file=sys.stderr, flush=True)
    # vLLM's processes speak over sockets in the temporary folder; killed, they leave them there.
    place = os.path.join(tempfile.gettempdir(), str(uuid.uuid4()))  # noqa: PTH118
    socket.socket(socket.AF_UNIX).bind(place)
    if "--headless" in sys.argv:  # a part without a server
        core = subprocess.Popen([sys.executable, "-c", _CORE])
        signal.signal(signal.SIGTERM, lambda *_: core.kill())
        core.wait()
        os._exit(0)
    server = Server(words, option["--served-model-name"])
    server.core = subprocess.Popen([sys.executable, "-c", _CORE])
    threading.Thread(target=server.watch_core, daemon=True).start()
    if "exit_after" in words:
        threading.Timer(float(words["exit_after"]), lambda: os._exit(0)).start()
    asyncio.run(server.run(option["--host"], int(option["--port"])))


if __name__ == "__main__":
    main()
