"""What a call of an engine costs by the gateway's own client and by aiohttp's session.

    python -m lab.bench.relay.client_cost

CPU time of this process, a call, against an engine's stand-in; 64 calls at once, in turns. The own
client stands on aiohttp's internals and is kept for what this shows.
"""

from __future__ import annotations

import asyncio
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from contextlib import ExitStack

import aiohttp
import uvloop

from common.ports import find_free_ports
from gateway.config import Settings
from gateway.engines.client import EngineClient
from gateway.engines.connections import EngineConnector
from lab.bench.bench_figures import BenchFailed
from lab.bench.relay.relay_arms import is_answering, start_program
from lab.bench.relay.stand_in_engine import find_number
from lab.intervals import find_interval

ROUNDS, CALLS, AT_ONCE = 30, 4000, 64
_HEADERS = {"Content-Type": "application/json"}

Ask = Callable[[bytes], Awaitable[bytes]]


async def measure_us(ask: Ask) -> float:
    """Every answer must carry its request's number."""

    async def work(first: int) -> None:
        for number in range(first, first + CALLS // AT_ONCE):
            body = b'{"messages":[{"content":"number-%d."}]}' % number
            answer = await ask(body)
            if find_number(answer) != number:
                raise BenchFailed(f"asked {number}, answered {answer[:200]!r}")

    began = time.process_time()
    await asyncio.gather(*(work(n * 1_000_000) for n in range(AT_ONCE)))
    return (time.process_time() - began) * 1e6 / CALLS


async def compare(port: int, stand_in: subprocess.Popen[bytes]) -> dict[str, list[float]]:
    if not await is_answering(port, [stand_in]):
        raise BenchFailed("the engine's stand-in did not start")
    url = f"http://127.0.0.1:{port}"
    connector = EngineConnector(limit=0)
    settings = Settings(prompt_style="raw")
    path = "/v1/chat/completions"
    async with aiohttp.ClientSession(connector=connector, trust_env=False) as session:
        client = EngineClient(url, connector, settings)

        async def ask_own(body: bytes) -> bytes:
            return (await client.send("POST", path, _HEADERS, body)).body or b""

        async def ask_session(body: bytes) -> bytes:
            async with session.post(url + path, data=body, headers=_HEADERS) as answer:
                return await answer.read()

        arms: dict[str, Ask] = {"own": ask_own, "session": ask_session, "control": ask_own}
        taken: dict[str, list[float]] = {arm: [] for arm in arms}
        for number in range(ROUNDS + 1):
            for arm in random.sample(list(arms), len(arms)):
                spent_us = await measure_us(arms[arm])
                if number:  # the first round warms up
                    taken[arm].append(spent_us)
    return taken


def main() -> int:
    (port,) = find_free_ports(1)
    words = ("lab.bench.relay.stand_in_engine", "engine", "--port", str(port))
    with ExitStack() as exits:
        log = exits.enter_context(tempfile.TemporaryFile())
        taken = uvloop.run(compare(port, start_program(exits, log, 0, *words)))
    for arm, values in taken.items():
        ratio = find_interval([a / b for a, b in zip(values, taken["own"], strict=True)])
        times = f"{ratio.value:.3f} ({ratio.low:.3f} to {ratio.high:.3f}) times own"
        print(f"{arm:8} {find_interval(values).value:7.1f} us of CPU a call, {times}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
