"""The breaker: a failure counts against an engine only when the engine is at fault."""

from __future__ import annotations

import asyncio
import re
import time

import pytest

from gateway.engines.engine import Engine
from gateway.engines.pool import POOL
from tests.fake_engine import Behaviour
from tests.gateway.conftest import Serve, Served, until


def _is_bad(question: str) -> bool:
    return question.startswith("bad")


def _engine(served: Served) -> Engine:
    return served.app[POOL].engines[0]


async def _read(served: Served, name: str) -> float:
    text = (await served.client.get("/metrics")).text
    found = re.search(rf"^{name}\{{[^}}]*\}} (\S+)$", text, re.MULTILINE)
    assert found is not None
    return float(found[1])


@pytest.mark.parametrize("is_stream", [False, True], ids=["whole", "stream"])
async def test_breaker_stays_closed_when_one_callers_requests_fail(
    serve: Serve, is_stream: bool
) -> None:
    """Nobody else asks anything meanwhile: a question of the gateway's own is what tells."""
    async with serve(Behaviour(fails=_is_bad), breaker_failures=3, breaker_pause_s=60) as served:
        for number in range(20):
            answer = await served.chat(f"bad {number}", stream=is_stream)
            assert answer.status_code == (200 if is_stream else 500)
            assert "broken" in answer.text
        await until(lambda: not _engine(served).suspect.is_set())

        assert (await served.chat("good")).status_code == 200
        assert await _read(served, "gateway_breaker_trips_total") == 0
        assert await _read(served, "gateway_engine_failures_total") == 0
        assert await _read(served, "gateway_engine_errors_total") == 20


async def test_breaker_stays_closed_for_predict_when_its_prompts_fail(serve: Serve) -> None:
    async with serve(
        Behaviour(fails=_is_bad), breaker_failures=3, breaker_pause_s=60, max_attempts=1
    ) as served:
        answers = await asyncio.gather(*(served.predict(f"bad {n}") for n in range(12)))
        await until(lambda: not _engine(served).suspect.is_set())

        assert {answer.status_code for answer in answers} == {502}
        assert (await served.predict("good")).json() == {"response": "answer:good"}
        assert await _read(served, "gateway_breaker_trips_total") == 0


async def test_engine_in_doubt_serves_others_meanwhile(serve: Serve) -> None:
    """One caller's failing requests, one after another, make nobody wait for a look."""
    async with serve(Behaviour(fails=_is_bad)) as served:
        looked = asyncio.Event()
        engine = _engine(served)
        is_healthy = engine.is_healthy

        async def look_slowly() -> bool:
            looked.set()
            await asyncio.sleep(0.5)
            return await is_healthy()

        engine.is_healthy = look_slowly  # type: ignore[method-assign]
        assert (await served.chat("bad")).status_code == 500
        await looked.wait()
        started = time.monotonic()

        assert (await served.chat("good")).status_code == 200

        assert time.monotonic() - started < 0.4


async def test_breaker_opens_when_the_gateways_own_question_fails_too(serve: Serve) -> None:
    async with serve(
        Behaviour(), breaker_failures=3, breaker_pause_s=60, restart_hold_s=0.05
    ) as served:
        served.engine.status = 500
        for number in range(3):
            assert (await served.chat(f"{number}")).status_code == 500

        await until(lambda: _engine(served).breaker_open_until > time.monotonic())
        assert (await served.chat("next")).status_code == 503
        assert await _read(served, "gateway_breaker_trips_total") == 1


async def test_trial_that_a_busy_engine_does_not_answer_opens_nothing(serve: Serve) -> None:
    engine = Behaviour(fails=_is_bad, delays=lambda question: 0 if _is_bad(question) else 5)
    async with serve(
        engine, breaker_failures=2, breaker_pause_s=60, probe_timeout_s=0.2, wait_ready=False
    ) as served:
        engine.delays = lambda question: 0
        await until(lambda: _engine(served).is_usable)
        engine.delays = lambda question: 0 if _is_bad(question) else 5
        for number in range(4):
            assert (await served.chat(f"bad {number}")).status_code == 500
        await until(lambda: engine.cancelled == 1)
        await until(lambda: not _engine(served).suspect.is_set())

        assert _engine(served).is_usable


async def test_calls_that_time_out_open_the_breaker_only_with_the_trial(serve: Serve) -> None:
    """A caller may have asked for what takes too long; an engine that hangs answers nobody."""
    settings = {"breaker_failures": 2, "breaker_pause_s": 60, "probe_timeout_s": 0.3}
    engine = Behaviour()
    async with serve(engine, engine_timeout_s=0.3, **settings) as served:
        engine.delays = lambda question: 5 if _is_bad(question) else 0
        for number in range(3):
            answer = await served.predict(f"bad {number}")
            assert answer.json()["error"]["code"] == "engine_timeout"
        await until(lambda: not _engine(served).suspect.is_set())
        assert _engine(served).is_usable

        engine.delays = lambda question: 5
        for number in range(3):
            await served.predict(f"bad {number}")
        await until(lambda: _engine(served).breaker_open_until > time.monotonic())


async def test_lost_connections_open_the_breaker_without_a_trial(serve: Serve) -> None:
    async with serve(
        breaker_failures=3, breaker_pause_s=60, restart_hold_s=5, max_attempts=1
    ) as served:
        served.engine.cuts_connection = True
        for number in range(3):
            assert (await served.predict(f"{number}")).status_code == 502

        assert _engine(served).breaker_open_until > time.monotonic()
        assert await _read(served, "gateway_engine_failures_total") == 3
