"""Ready means warm: GET /, /healthz, /readyz, /metrics, and the warm-up behind them."""

from __future__ import annotations

import asyncio
import signal
import socket
import time
from pathlib import Path

import httpx
import orjson
import pytest

from common.project import read_version
from gateway.config import SettingsError
from gateway.engines.warmup import read_warmup_questions
from lab.fuzz.raw_http import address, build_request
from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.conftest import Serve, Served, make_settings, until
from tests.gateway.process import GatewayProcess, serve_process
from tests.patience import PROGRAM_S
from tests.plain_http import NO_TLS


@pytest.mark.parametrize("status", ["batch", "ok"])
async def test_root_warm_tells_the_mode(serve: Serve, status: str) -> None:
    async with serve(root_status=status) as served:
        answer = await served.client.get("/")

        assert (answer.status_code, answer.json()) == (200, {"status": status})


async def test_root_cold_is_held_then_503(serve: Serve) -> None:
    async with serve(Behaviour(is_healthy=False), wait_ready=False, root_hold_s=0.3) as served:
        answer = await served.client.get("/")

        assert (answer.status_code, answer.json()) == (503, {"status": "warming"})
        assert answer.elapsed.total_seconds() >= 0.3
        assert answer.headers["Retry-After"] == "1"


async def test_root_held_answers_as_soon_as_warm(serve: Serve) -> None:
    async with serve(Behaviour(is_healthy=False), wait_ready=False, root_hold_s=10) as served:
        waiting = asyncio.create_task(served.client.get("/"))
        await asyncio.sleep(0.2)
        assert not waiting.done()

        served.engine.is_healthy = True

        assert (await waiting).status_code == 200


async def test_warmup_has_the_shape_that_will_be_served(serve: Serve) -> None:
    engine = Behaviour()
    async with serve(engine, wait_ready=False, warmup_prompts=358, max_tokens=77) as served:
        await until(lambda: len(engine.calls) == 1)

        call = engine.calls[0]
        assert (len(call["prompt"]), call["max_tokens"], call["temperature"]) == (358, 77, 0.0)
        await until(lambda: _status(served.client, "/readyz", 200))


async def _status(client: object, path: str, status: int) -> bool:
    answer = await client.get(path)  # type: ignore[attr-defined]
    return bool(answer.status_code == status)


async def test_readyz_says_why_not(serve: Serve) -> None:
    async with serve(Behaviour(status=500), wait_ready=False) as served:
        await until(lambda: len(served.engine.calls) > 0)
        await until(
            lambda: _tells(served.client, "warm-up failed: the engine answered 500: broken")
        )

        answer = await served.client.get("/readyz")

        assert answer.status_code == 503
        assert (await served.client.get("/healthz")).status_code == 200
        assert (await served.predict("a")).status_code == 503


async def _tells(client: object, text: str) -> bool:
    answer = await client.get("/readyz")  # type: ignore[attr-defined]
    return text in answer.text


async def test_engine_back_after_a_restart_is_warmed_again(serve: Serve) -> None:
    async with serve() as served:
        served.engine.is_healthy = False
        await until(lambda: _status(served.client, "/readyz", 503))
        assert served.engine.calls == []

        served.engine.is_healthy = True

        await until(lambda: _status(served.client, "/readyz", 200))
        assert len(served.engine.calls) == 1


async def test_metrics_are_prometheus_text(serve: Serve) -> None:
    async with serve() as served:
        await served.predict(["a", "b", ""])

        text = (await served.client.get("/metrics")).text

        assert 'gateway_requests_total{route="/predict",status="200"} 1.0' in text
        assert 'gateway_prompts_failed_total{code="empty_prompt"} 1.0' in text
        assert 'gateway_tokens_total{direction="out"} 4.0' in text
        assert f'gateway_engine_ready{{engine="{served.engine_url}"}} 1.0' in text


async def test_warmup_file_without_questions_stops_the_start(tmp_path: Path) -> None:
    path = tmp_path / "bad.jsonl"
    path.write_text('{"question": "a"}\n{"no": 1}\n')
    with pytest.raises(SettingsError, match="line 2"):
        read_warmup_questions(make_settings(warmup_file=path))


@pytest.mark.programs
async def test_stop_readiness_goes_first_and_what_runs_is_finished(tmp_path: Path) -> None:
    engine = Behaviour()
    async with (
        serve_app(build_fake_engine(engine)) as engine_url,
        serve_process(tmp_path, engine_url) as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=20, verify=NO_TLS) as client,
    ):
        engine.delay_s = 2
        running = asyncio.create_task(client.post("/predict", json={"prompt": "last"}))
        await until(lambda: engine.running == 1)

        gateway.process.send_signal(signal.SIGTERM)

        await until(lambda: "gateway_draining" in gateway.read_log())
        async with httpx.AsyncClient(base_url=gateway.url, verify=NO_TLS) as newcomer:
            answers = [await newcomer.get(path) for path in ("/readyz", "/", "/healthz")]
            assert [answer.status_code for answer in answers] == [503, 503, 200]
            # Kept open, a connection would bring the next call here too.
            assert {answer.headers["Connection"] for answer in answers} == {"close"}
            late = await newcomer.post("/predict", json={"prompt": "late"})
            assert (late.status_code, late.headers["Retry-After"]) == (503, "5")
        assert (await running).json() == {"response": "answer:last"}
        assert await asyncio.wait_for(gateway.process.wait(), PROGRAM_S) == 0


@pytest.mark.programs
async def test_stop_waits_for_who_reads_a_whole_answer_slowly(tmp_path: Path) -> None:
    text = "x" * 2**24  # more than the buffers between the two hold
    body = orjson.dumps({"choices": [{"index": 0, "text": text}], "usage": None})
    engine = Behaviour()
    async with (
        serve_app(build_fake_engine(engine)) as engine_url,
        serve_process(tmp_path, engine_url) as gateway,
    ):
        engine.body = body
        reader, writer = await asyncio.open_connection(*address(gateway.url))
        call = orjson.dumps({"model": "fake", "prompt": "a"})
        writer.write(build_request("POST", "/v1/completions", call))
        head = await reader.readuntil(b"\r\n\r\n")

        gateway.process.send_signal(signal.SIGTERM)
        await asyncio.sleep(3)

        assert b"200 OK" in head
        assert await reader.readexactly(len(body)) == body
        writer.close()
        assert await asyncio.wait_for(gateway.process.wait(), PROGRAM_S) == 0


async def open_slowly(gateway: GatewayProcess) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """A caller with hardly any buffers of their own."""
    slow = socket.socket()
    slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    slow.connect(address(gateway.url))
    return await asyncio.open_connection(sock=slow, limit=512)


@pytest.mark.programs
async def test_stop_waits_until_answers_have_left_the_buffers(tmp_path: Path) -> None:
    """aiohttp counts an answer as sent while 64 KiB of it wait in its buffer, and a container's
    network goes with its process: so of each size, what fills one buffer more or less. The largest
    are read first, since for these alone the gateway would stay.
    """
    engine = Behaviour()
    bodies = [
        orjson.dumps({"choices": [{"index": 0, "text": "x" * size}], "usage": None})
        for size in range(2**20, 2**15, -3 * 2**14)
    ]
    call = build_request("POST", "/v1/completions", orjson.dumps({"model": "fake", "prompt": "a"}))
    async with (
        serve_app(build_fake_engine(engine)) as engine_url,
        serve_process(tmp_path, engine_url) as gateway,
    ):
        callers = []
        for body in bodies:
            engine.body = body
            reader, writer = await open_slowly(gateway)
            writer.write(call)
            assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")
            callers.append((reader, writer))

        gateway.process.send_signal(signal.SIGTERM)
        await until(lambda: "gateway_draining" in gateway.read_log())
        for body, (reader, writer) in zip(bodies, callers, strict=True):
            await asyncio.sleep(0.2)
            assert gateway.process.returncode is None
            assert await reader.readexactly(len(body)) == body
            writer.close()
        assert await asyncio.wait_for(gateway.process.wait(), PROGRAM_S) == 0


@pytest.mark.programs
async def test_stop_waits_for_the_last_bytes_of_an_answer_that_ends_meanwhile(
    tmp_path: Path,
) -> None:
    """Its connection is to be closed, and all of it lies in the kernel's buffers."""
    engine = Behaviour()
    body = orjson.dumps({"choices": [{"index": 0, "text": "x" * 2**15}], "usage": None})
    call = build_request("POST", "/v1/completions", orjson.dumps({"model": "fake", "prompt": "a"}))
    async with (
        serve_app(build_fake_engine(engine)) as engine_url,
        serve_process(tmp_path, engine_url) as gateway,
    ):
        engine.body = body
        engine.delay_s = 2
        reader, writer = await open_slowly(gateway)
        writer.write(call)
        await until(lambda: engine.running == 1)

        gateway.process.send_signal(signal.SIGTERM)
        head = await reader.readuntil(b"\r\n\r\n")
        await asyncio.sleep(2)

        assert b"Connection: close" in head
        assert gateway.process.returncode is None
        assert await reader.readexactly(len(body)) == body
        writer.close()
        assert await asyncio.wait_for(gateway.process.wait(), PROGRAM_S) == 0


@pytest.mark.programs
async def test_stop_answer_that_nobody_takes_is_cut_off_in_time(tmp_path: Path) -> None:
    engine = Behaviour()
    body = orjson.dumps({"choices": [{"index": 0, "text": "x" * 2**18}], "usage": None})
    call = build_request("POST", "/v1/completions", orjson.dumps({"model": "fake", "prompt": "a"}))
    async with (
        serve_app(build_fake_engine(engine)) as engine_url,
        serve_process(tmp_path, engine_url, "--drain-timeout-s", "0.5") as gateway,
    ):
        engine.body = body
        reader, writer = await open_slowly(gateway)
        writer.write(call)
        assert b"200 OK" in await reader.readuntil(b"\r\n\r\n")

        gateway.process.send_signal(signal.SIGTERM)

        assert await asyncio.wait_for(gateway.process.wait(), PROGRAM_S) == 0
        writer.close()


@pytest.mark.programs
async def test_stop_what_does_not_end_is_cut_off_in_time(tmp_path: Path) -> None:
    engine = Behaviour()
    async with (
        serve_app(build_fake_engine(engine)) as engine_url,
        serve_process(tmp_path, engine_url, "--drain-timeout-s", "0.5") as gateway,
        httpx.AsyncClient(base_url=gateway.url, timeout=3600, verify=NO_TLS) as client,
    ):
        engine.delay_s = 3600
        running = asyncio.create_task(client.post("/predict", json={"prompt": "endless"}))
        await until(lambda: engine.running == 1)
        stopping = time.monotonic()

        gateway.process.send_signal(signal.SIGTERM)

        assert await asyncio.wait_for(gateway.process.wait(), PROGRAM_S) == 0
        assert time.monotonic() - stopping >= 0.5
        with pytest.raises(httpx.TransportError):
            await running
        await until(lambda: engine.running == 0)


async def test_health_says_that_the_process_lives_whatever_the_engine_does(serve: Serve) -> None:
    """By the name that clients of vLLM ask for before they begin."""
    async with serve(Behaviour(is_healthy=False), wait_ready=False) as served:
        answer = await served.client.get("/health")

    assert (answer.status_code, answer.json()) == (200, {"status": "ok"})


async def test_version_is_the_engines_and_the_gateways(served: Served) -> None:
    answer = await served.client.get("/version")

    assert answer.json() == {"version": "0.32.0", "gateway": read_version()}


async def test_version_without_an_engine_is_the_gateways_alone(serve: Serve) -> None:
    async with serve(Behaviour(is_healthy=False), wait_ready=False) as served:
        answer = await served.client.get("/version")

    assert answer.json() == {"version": None, "gateway": read_version()}


async def test_version_needs_a_key_where_there_are_keys(serve: Serve) -> None:
    async with serve(api_keys=("secret",)) as served:
        assert (await served.client.get("/version")).status_code == 401
        assert (await served.client.get("/health")).status_code == 200


async def test_root_says_that_there_is_no_default_of_several_models(serve: Serve) -> None:
    async with serve(Behaviour(model="a"), Behaviour(model="b")) as served:
        answer = await served.client.get("/")
    async with serve(Behaviour(model="a"), Behaviour(model="b"), default_model="b") as served:
        good = await served.client.get("/")

    assert answer.status_code == 503
    assert "set GATEWAY_DEFAULT_MODEL" in answer.json()["message"]
    assert (good.status_code, good.json()) == (200, {"status": "batch"})
