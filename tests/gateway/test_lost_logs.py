"""A gateway whose log goes nowhere: callers are answered as ever, and it ends when told to."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import orjson
import pytest

from common.prometheus_text import parse_samples, sum_samples
from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.process import GatewayProcess, serve_process
from tests.outputs import full_disk, full_pipe_nobody_reads
from tests.plain_http import NO_TLS

pytestmark = pytest.mark.programs

_CALLS = 40
_SOON_S = 15.0


@contextlib.contextmanager
def pipe_without_reader() -> Iterator[int]:
    reader, writer = os.pipe()
    os.close(reader)
    yield writer
    os.close(writer)


async def ask_all(gateway: GatewayProcess) -> None:
    """Batches, chats and streams: each is answered, and whole."""
    async with httpx.AsyncClient(base_url=gateway.url, timeout=60, verify=NO_TLS) as client:

        async def ask(number: int) -> None:
            questions = [f"question {number}", f"another {number}"]
            batch = await client.post("/predict", json={"prompt": questions})
            assert batch.status_code == 200
            assert len(batch.json()["response"]) == 2
            messages = [{"role": "user", "content": f"{number}"}]
            body = {"model": "fake", "messages": messages}
            assert (await client.post("/v1/chat/completions", json=body)).status_code == 200
            stream = await client.post("/v1/chat/completions", json={**body, "stream": True})
            assert stream.text.endswith("data: [DONE]\n\n")
            refused = await client.post("/predict", content=b"{")
            assert refused.json()["error"]["code"] == "invalid_json"

        await asyncio.gather(*map(ask, range(_CALLS)))


async def count_dropped(gateway: GatewayProcess) -> float:
    async with httpx.AsyncClient(base_url=gateway.url, verify=NO_TLS) as client:
        samples = parse_samples((await client.get("/metrics")).text)
    return sum_samples(samples, "gateway_log_lines_dropped_total")


@pytest.mark.parametrize("place", [full_disk, pipe_without_reader, full_pipe_nobody_reads])
async def test_log_that_cannot_be_written_costs_no_answer_and_no_end(
    tmp_path: Path, place: Callable[[], contextlib.AbstractContextManager[int]]
) -> None:
    with place() as stderr:
        async with (
            serve_app(build_fake_engine(Behaviour())) as engine_url,
            serve_process(tmp_path, engine_url, stderr=stderr) as gateway,
        ):
            await ask_all(gateway)
            gateway.process.send_signal(signal.SIGTERM)
            assert await asyncio.wait_for(gateway.process.wait(), _SOON_S) == 0


async def test_lines_that_are_lost_are_counted(tmp_path: Path) -> None:
    with full_disk() as stderr:
        async with (
            serve_app(build_fake_engine(Behaviour())) as engine_url,
            serve_process(tmp_path, engine_url, stderr=stderr) as gateway,
        ):
            await ask_all(gateway)
            deadline = time.monotonic() + _SOON_S
            while await count_dropped(gateway) < 4 * _CALLS:
                assert time.monotonic() < deadline


async def test_last_lines_are_there_when_it_has_ended(tmp_path: Path) -> None:
    async with (
        serve_app(build_fake_engine(Behaviour())) as engine_url,
        serve_process(tmp_path, engine_url) as gateway,
    ):
        await ask_all(gateway)
        assert await count_dropped(gateway) == 0
    rows = [orjson.loads(line) for line in gateway.read_log().splitlines()]
    assert rows[-1]["event"] == "gateway_stopped"
    assert sum(row["event"] == "request_done" for row in rows) == 4 * _CALLS
