"""Several engines as one: shares, failures, retries, the breaker, engines that come and go."""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from aiohttp import encode_basic_auth, web
from hypothesis import given
from hypothesis import strategies as st

from common.ports import find_free_ports
from gateway.admission.accounts import ACCOUNTS
from gateway.app import build_app
from gateway.config import SETTINGS, Settings, load_settings
from gateway.engines.engine import Engine, EngineState
from gateway.engines.lists.batch import cut
from gateway.engines.pool import POOL, EnginePool
from gateway.observability.metrics import METRICS
from gateway.schemas.predict import default_sampling
from lab.fuzz.raw_http import ask, build_request
from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.conftest import Serve, Served, make_settings, until
from tests.plain_http import NO_TLS

QUESTIONS = [f"question {number}" for number in range(358)]
ANSWERS = [f"answer:{question}" for question in QUESTIONS]


def _prompts(engine: Behaviour) -> int:
    return sum(len(call["prompt"]) for call in engine.calls)


async def test_batch_is_shared_over_the_engines_and_put_together(serve: Serve) -> None:
    async with serve(Behaviour(), Behaviour(), Behaviour()) as served:
        answer = await served.predict(QUESTIONS)

        assert answer.json() == {"response": ANSWERS}
        shares = [_prompts(engine) for engine in served.all_engines]
        assert sum(shares) == 358
        assert all(100 <= share <= 140 for share in shares)


async def test_small_batch_stays_whole(serve: Serve) -> None:
    async with serve(Behaviour(), Behaviour()) as served:
        await served.predict(QUESTIONS[:20])

        assert sorted(_prompts(engine) for engine in served.all_engines) == [0, 20]


async def test_half_the_pool_dies_in_a_batch_and_nothing_is_lost(serve: Serve) -> None:
    async with serve(*(Behaviour(delay_s=0.1) for _ in range(4))) as served:
        for dying in served.others[:2]:
            dying.cuts_connection = True

        answer = await served.predict(QUESTIONS)

        assert answer.status_code == 200
        assert answer.json() == {"response": ANSWERS}
        # Only the lost pieces ran again: 358 and about two quarters of it.
        assert 358 < sum(map(_prompts, served.all_engines)) <= 358 + 2 * 2 * 100


async def test_sampled_batch_is_not_run_twice(serve: Serve) -> None:
    async with serve(Behaviour(), Behaviour(cuts_connection=False)) as served:
        served.others[0].cuts_connection = True

        body = (await served.predict(QUESTIONS, temperature=0.7)).json()

        assert sum(map(_prompts, served.all_engines)) == 358
        lost = {int(index) for index in body["errors"]}
        assert 0 < len(lost) < 358
        assert all((body["response"][n] == "") == (n in lost) for n in range(358))


async def test_busy_engine_is_left_out_for_a_moment(serve: Serve) -> None:
    async with serve(Behaviour(), Behaviour()) as served:
        served.engine.status = 503

        answers = [await served.predict(f"q{number}") for number in range(6)]

        assert [answer.status_code for answer in answers] == [200] * 6
        assert len(served.engine.calls) <= 1
        assert served.app[POOL].engines[0].is_usable


async def test_breaker_opens_after_failures_and_closes_again(serve: Serve) -> None:
    async with serve(Behaviour(), breaker_failures=3, max_attempts=1, restart_hold_s=5) as served:
        served.engine.status = 500
        for number in range(3):
            assert (await served.predict(f"q{number}")).status_code == 502
            await until(lambda: not served.app[POOL].engines[0].suspect.is_set())
        seen = len(served.engine.calls)
        served.engine.status = 200

        assert not served.app[POOL].is_ready
        answer = await served.predict("after")  # held until the breaker closes

        assert answer.status_code == 200
        assert (await served.predict("later")).status_code == 200
        assert len(served.engine.calls) <= seen + 2


async def test_refusals_do_not_open_the_breaker(serve: Serve) -> None:
    async with serve(Behaviour(refuses=lambda _: True), breaker_failures=1, wait_ready=False) as s:
        s.engine.refuses = lambda question: "bad" in question
        await until(lambda: s.app[POOL].is_ready)
        for number in range(5):
            assert (await s.predict(f"bad {number}")).status_code == 400

        assert (await s.predict("good")).status_code == 200


async def test_streams_that_break_by_one_callers_doing_keep_nobody_out(serve: Serve) -> None:
    """vLLM cuts a stream of /v1/responses off whose grammar it cannot build."""
    async with serve(Behaviour(), breaker_failures=3, breaker_pause_s=60) as served:
        served.engine.stream_cut_after, served.engine.cuts = 1, lambda question: question == "a"
        for _ in range(9):
            assert "engine_failed" in (await served.chat("a", stream=True)).text
        await until(lambda: not served.app[POOL].engines[0].suspect.is_set())

        assert (await served.chat("b")).status_code == 200
        assert "engine_failed" not in (await served.chat("b", stream=True)).text
        metrics = (await served.client.get("/metrics")).text
    assert re.search(r"gateway_breaker_trips_total\{[^}]*\} 0\.0", metrics)


async def test_engine_that_breaks_every_stream_is_found_out(serve: Serve) -> None:
    """It has always the least to do, and answers what is no stream."""
    bad, good = Behaviour(stream_cut_after=1), Behaviour(stream_gap_s=0.005)
    async with serve(bad, good, breaker_failures=5, breaker_pause_s=60) as served:
        broken: list[bool] = []

        async def ask() -> None:
            for _ in range(20):
                answer = await served.chat("hello there you", stream=True)
                broken.append("engine_failed" in answer.text)

        await asyncio.gather(*(ask() for _ in range(8)))
        metrics = (await served.client.get("/metrics")).text
    assert len(broken) == 160
    assert sum(broken) <= 15
    assert re.search(r"gateway_breaker_trips_total\{[^}]*\} 1\.0", metrics)


async def test_whole_answers_between_broken_streams_hide_nothing(serve: Serve) -> None:
    async with serve(Behaviour(), breaker_failures=3, breaker_pause_s=60) as served:
        served.engine.stream_cut_after = 1
        for _ in range(3):
            assert (await served.chat("a")).status_code == 200
            assert "engine_failed" in (await served.chat("a", stream=True)).text

        await until(lambda: served.app[POOL].engines[0].breaker_open_until > time.monotonic())


async def test_streams_cut_by_an_engine_that_fails_else_too_open_the_breaker(serve: Serve) -> None:
    """Each begins with a 200, which is no success yet."""
    async with serve(Behaviour(), breaker_failures=3, breaker_pause_s=60) as served:
        served.engine.stream_cut_after = 1
        served.engine.fails = lambda question: question != "a"
        for _ in range(3):
            await until(lambda: served.app[POOL].engines[0].is_usable)
            assert "engine_failed" in (await served.chat("a", stream=True)).text

        await until(lambda: served.app[POOL].engines[0].breaker_open_until > time.monotonic())


async def test_calls_that_fail_together_open_the_breaker_once(serve: Serve) -> None:
    async with serve(breaker_failures=1, breaker_pause_s=60, max_attempts=1) as served:
        served.engine.cuts_connection, served.engine.delay_s = True, 0.3
        calls = [asyncio.create_task(served.chat(f"{number}")) for number in range(8)]
        await until(lambda: served.engine.running == 8)
        assert {answer.status_code for answer in await asyncio.gather(*calls)} == {502}

        metrics = (await served.client.get("/metrics")).text
    assert re.search(r"gateway_engine_failures_total\{[^}]*\} 8\.0", metrics)
    assert re.search(r"gateway_breaker_trips_total\{[^}]*\} 1\.0", metrics)


async def test_refusals_in_a_stream_are_no_failures_of_the_engine(serve: Serve) -> None:
    """vLLM looks at some of a request only after its 200."""
    refusal = {"message": "logit_bias: 99999 is no token", "code": 400}
    async with serve(Behaviour(stream_error=refusal), breaker_failures=1) as served:
        for _ in range(3):
            assert "no token" in (await served.chat("a", stream=True)).text

        assert served.app[POOL].engines[0].is_usable
        metrics = (await served.client.get("/metrics")).text
    assert re.search(r"gateway_engine_failures_total\{[^}]*\} 0\.0", metrics)


async def test_restarting_engine_is_waited_for(serve: Serve) -> None:
    async with serve(restart_hold_s=5) as served:
        served.engine.is_healthy = False
        await until(lambda: not served.app[POOL].is_ready)
        call = asyncio.create_task(served.predict("patient"))
        await asyncio.sleep(0.2)
        assert not call.done()

        served.engine.is_healthy = True

        assert (await call).json() == {"response": "answer:patient"}


async def test_restarted_engine_serves_those_who_waited_at_once(serve: Serve) -> None:
    """It refuses connections meanwhile; that must not count as failures of its next life."""
    engine = Behaviour()
    async with contextlib.AsyncExitStack() as first_life:
        runner_url = await first_life.enter_async_context(serve_app(build_fake_engine(engine)))
        port = int(runner_url.rsplit(":", 1)[1])
        async with serve(engines=(runner_url,), restart_hold_s=20, breaker_pause_s=60) as served:
            await first_life.aclose()
            await until(lambda: not served.app[POOL].is_ready)
            await asyncio.sleep(1.0)  # many more failed looks than the breaker allows
            call = asyncio.create_task(served.predict("patient"))
            await asyncio.sleep(0.1)
            async with serve_app(build_fake_engine(engine), port=port):
                answer = await asyncio.wait_for(call, 10)

    assert answer.json() == {"response": "answer:patient"}


async def test_waiting_for_a_suspect_engine_is_no_polling(
    serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its look hangs, so nothing says for a while whether it is well."""
    looks = 0

    def look(pool: EnginePool) -> bool:
        nonlocal looks
        looks += 1
        return any(engine.is_usable for engine in pool.engines)

    async with serve() as served:
        pool = served.app[POOL]
        monkeypatch.setattr(EnginePool, "has_engine", property(look))
        pool.engines[0].is_healthy = _hang  # type: ignore[method-assign]
        pool.engines[0].suspect.set()

        assert not await pool.wait_ready(0.5)

        assert looks <= 3


async def _hang() -> bool:
    await asyncio.sleep(30)
    return False


async def test_engine_gone_for_long_tells_when_to_come_back(serve: Serve) -> None:
    async with serve(restart_hold_s=0.1, expected_start_s=77) as served:
        pool = served.app[POOL]
        pool.engines[0].typical_start_s = 40.0
        served.engine.is_healthy = False
        await until(lambda: not pool.is_ready)

        answer = await served.predict("q")

        assert answer.status_code == 503
        assert 35 <= int(answer.headers["Retry-After"]) <= 40


async def test_relay_asks_another_engine_before_the_first_byte(serve: Serve) -> None:
    async with serve(Behaviour(), Behaviour()) as served:
        served.engine.cuts_connection = True

        answers = [await served.chat(f"c{number}", temperature=0) for number in range(4)]

        assert [answer.status_code for answer in answers] == [200] * 4


async def test_answered_failure_is_not_asked_of_the_same_engine_again(serve: Serve) -> None:
    async with serve(Behaviour()) as served:
        await until(lambda: served.app[POOL].is_ready)
        served.engine.status, before = 500, len(served.engine.calls)

        relayed = await served.chat("a", temperature=0)
        predicted = await served.predict(["a", "b"])

        assert (relayed.status_code, relayed.json()["error"]["source"]) == (500, "engine")
        assert predicted.status_code == 502
        assert len(served.engine.calls) - before == 2
        text = (await served.client.get("/metrics")).text
        assert 'gateway_retried_calls_total{code="engine_failed"} 0.0' in text


async def test_answered_failure_of_a_greedy_call_is_asked_of_another_engine(serve: Serve) -> None:
    async with serve(Behaviour(), Behaviour()) as served:
        served.engine.status = 500
        first = served.app[POOL].engines[0]

        greedy = await served.chat("a", temperature=0)
        await until(lambda: first.is_usable)
        sampled = await served.chat("a", temperature=1)

        assert (greedy.status_code, sampled.status_code) == (200, 500)


async def test_answered_failure_is_asked_again_of_an_engine_that_restarted(serve: Serve) -> None:
    async with serve(Behaviour(), restart_hold_s=20) as served:
        engine = served.engine
        engine.status, engine.is_healthy = 500, False
        waiting = asyncio.create_task(served.predict(["a", "b"]))
        await until(lambda: served.app[POOL].engines[0].state is EngineState.DOWN)
        engine.status, engine.is_healthy = 200, True

        assert (await waiting).json() == {"response": ["answer:a", "answer:b"]}


async def test_prompt_that_an_engine_gave_up_is_asked_of_another(serve: Serve) -> None:
    async with serve(Behaviour(), Behaviour()) as served:
        await until(lambda: sum(one.is_usable for one in served.app[POOL].engines) == 2)
        before = [len(engine.calls) for engine in served.all_engines]
        served.engine.aborts = lambda question: question == "a"

        answer = await served.predict(["a", "b"])

        assert answer.json() == {"response": ["answer:a", "answer:b"]}
        asked = [len(engine.calls) for engine in served.all_engines]
        assert [now - then for now, then in zip(asked, before, strict=True)] == [1, 1]


async def test_answered_failure_of_every_engine_is_asked_of_each_once(serve: Serve) -> None:
    async with serve(Behaviour(), Behaviour()) as served:
        await until(lambda: sum(one.is_usable for one in served.app[POOL].engines) == 2)
        before = [len(engine.calls) for engine in served.all_engines]
        for engine in served.all_engines:
            engine.status = 500

        assert (await served.chat("a", temperature=0)).status_code == 500

        asked = [len(engine.calls) for engine in served.all_engines]
        assert [now - then for now, then in zip(asked, before, strict=True)] == [1, 1]


async def test_session_routing_keeps_a_session_on_one_engine(serve: Serve) -> None:
    async with serve(*(Behaviour() for _ in range(3)), routing="session") as served:
        for number in range(12):
            await served.chat(f"{number}", user="alice")

        assert sorted(len(engine.calls) for engine in served.all_engines) == [0, 0, 12]


async def test_session_routing_takes_a_name_that_is_no_text(serve: Serve) -> None:
    async with serve(Behaviour(), Behaviour(), routing="session") as served:
        body = b'{"model": "fake", "prompt": "a"}'
        call = build_request("POST", "/v1/completions", body, [("X-Session-Id", b"\xff\xfe")])
        answers = [await ask(served.url, call) for _ in range(4)]

        assert [answer.status for answer in answers] == [200] * 4
        assert sorted(len(engine.calls) for engine in served.all_engines) == [0, 4]


async def test_prefix_routing_keeps_like_beginnings_together(serve: Serve) -> None:
    async with serve(Behaviour(), Behaviour(), routing="prefix", prefix_characters=60) as served:
        for number in range(6):
            await served.chat("the same long beginning of a prompt" * 3 + str(number))

        assert sorted(len(engine.calls) for engine in served.all_engines) == [0, 6]


async def test_identical_greedy_prompts_are_generated_once(served: Served) -> None:
    answer = await served.predict(["a", "b", "a", "a"])

    assert answer.json() == {"response": [f"answer:{name}" for name in "abaa"]}
    assert _prompts(served.engine) == 2
    assert 'dedup;desc="2 shared"' in answer.headers["Server-Timing"]
    text = (await served.client.get("/metrics")).text
    assert "gateway_deduplicated_prompts_total 2.0" in text


async def test_identical_prompts_in_flight_share_one_answer(served: Served) -> None:
    served.engine.delay_s = 0.3
    first = asyncio.create_task(served.predict(["a", "b"]))
    await until(lambda: served.engine.running == 2)

    second = await served.predict(["b", "c"])

    assert second.json() == {"response": ["answer:b", "answer:c"]}
    assert (await first).json() == {"response": ["answer:a", "answer:b"]}
    assert _prompts(served.engine) == 3


async def test_shared_answer_does_not_wait_for_the_batch_around_it(serve: Serve) -> None:
    engine = Behaviour(delays=lambda question: 3.0 if question == "slow" else 0.3)
    async with serve(engine, max_prompts_per_call=1) as served:
        batch = asyncio.create_task(served.predict(["slow", "quick"]))
        await until(lambda: engine.running == 2)
        started = time.monotonic()

        answer = await served.predict("quick")

        assert answer.json() == {"response": "answer:quick"}
        assert time.monotonic() - started < 2
        assert "dedup" in answer.headers["Server-Timing"]
        assert (await batch).json() == {"response": ["answer:slow", "answer:quick"]}


async def test_shared_prompt_survives_the_caller_who_hung_up(served: Served) -> None:
    served.engine.delay_s = 0.3
    first = asyncio.create_task(served.predict(["a"]))
    await until(lambda: served.engine.running == 1)
    second = asyncio.create_task(served.predict(["a"]))
    await asyncio.sleep(0.1)

    first.cancel()

    assert (await second).json() == {"response": ["answer:a"]}


async def test_sampled_prompts_and_dedup_off_are_not_shared(serve: Serve) -> None:
    async with serve(dedup=False) as served:
        await served.predict(["a", "a"])
        assert _prompts(served.engine) == 2
    async with serve() as served:
        await served.predict(["a", "a"], temperature=1)
        assert _prompts(served.engine) == 2


async def test_engines_follow_the_settings_file(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    first, second = Behaviour(), Behaviour()
    async with (
        serve_app(build_fake_engine(first)) as first_url,
        serve_app(build_fake_engine(second)) as second_url,
    ):
        path.write_text(f'prompt_style = "raw"\nengines = ["{first_url}"]\n')
        arguments = ["--config", str(path), "--probe-interval-s", "0.05"]
        arguments += ["--warmup-prompts", "2", "--reload-interval-s", "0.05"]

        def reload() -> Settings:
            return load_settings(arguments)

        app = build_app(reload(), reload)
        async with serve_app(app):
            await until(lambda: app[POOL].is_ready)
            path.write_text(f'prompt_style = "raw"\nengines = ["{second_url}"]\n')
            await until(lambda: [one.url for one in app[POOL].engines] == [second_url])
            await until(lambda: app[POOL].is_ready)
            path.write_text("engines = [")
            await asyncio.sleep(0.2)
            assert app[POOL].is_ready


async def test_engine_takes_a_new_password_from_the_settings_file(tmp_path: Path) -> None:
    path = tmp_path / "gateway.toml"
    password = "new"

    @web.middleware
    async def want_password(
        request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        if request.headers.get("Authorization") != encode_basic_auth("me", password):
            return web.json_response({"error": {"message": "who is it?"}}, status=401)
        return await handler(request)

    engine = build_fake_engine(Behaviour())
    engine.middlewares.append(want_password)
    async with serve_app(engine) as url:

        def write(password: str) -> None:
            secret = url.replace("//", f"//me:{password}@")
            path.write_text(f'prompt_style = "raw"\nengines = ["{secret}"]\n')

        def reload() -> Settings:
            arguments = ["--config", str(path), "--probe-interval-s", "0.05"]
            arguments += ["--warmup-prompts", "2", "--reload-interval-s", "0.05"]
            return load_settings(arguments)

        write("old")
        app = build_app(reload(), reload)
        async with (
            serve_app(app) as gateway,
            httpx.AsyncClient(base_url=gateway, verify=NO_TLS) as client,
        ):
            await until(lambda: "GET /health" in app[POOL].describe())
            write("new")
            await until(lambda: app[POOL].is_ready)
            before = app[POOL].engines

            password = "newer"
            write("newer")

            async def is_answered() -> bool:
                return (await client.post("/predict", json={"prompt": "a"})).status_code == 200

            await until(is_answered)
            assert app[POOL].engines == before


@given(
    lengths=st.lists(st.integers(1, 400), min_size=1, max_size=300),
    engines=st.integers(1, 6),
    most=st.integers(1, 128),
)
def test_cut_covers_every_prompt_once_in_order(lengths: list[int], engines: int, most: int) -> None:
    prompts: list[Any] = [[0] * length for length in lengths]

    pieces = cut(prompts, default_sampling(make_settings()), engines, most)

    assert [place for piece in pieces for place in piece] == list(range(len(prompts)))
    assert all(0 < len(piece) <= most for piece in pieces)


async def test_stream_where_an_answer_is_wanted_is_a_failure_of_the_engine(serve: Serve) -> None:
    async def stream(_request: web.Request) -> web.Response:
        return web.Response(body=b"data: {}\n\n", content_type="text/event-stream")

    async def list_models(_request: web.Request) -> web.Response:
        return web.json_response({"data": [{"id": "fake", "max_model_len": 512}]})

    engine = web.Application()
    engine.router.add_get("/health", list_models)
    engine.router.add_get("/v1/models", list_models)
    engine.router.add_post("/v1/completions", stream)
    async with (
        serve_app(engine) as url,
        serve(engines=(url,), wait_ready=False) as served,
    ):
        failed = f'gateway_warmups_total{{engine="{url}",outcome="failed"}} 2.0'

        async def is_tried_again() -> bool:
            return failed in (await served.client.get("/metrics")).text

        await until(is_tried_again)
        assert "answered with a stream" in served.app[POOL].describe()


async def test_model_list_that_makes_no_sense_is_asked_of_another_engine(serve: Serve) -> None:
    async def list_nothing(_request: web.Request) -> web.Response:
        return web.json_response({})

    async with serve(Behaviour(), aliases=("x=fake",)) as served:
        garbled = web.Application()
        garbled.router.add_get("/v1/models", list_nothing)
        async with serve_app(garbled) as url:
            pool = served.app[POOL]
            settings, metrics = served.app[SETTINGS], served.app[METRICS]
            connector = pool.engines[0].client._connector
            other = Engine(url, settings, connector, metrics)
            other.enter_state(EngineState.READY, "")
            await pool.set_engines([other, *pool.engines])

            answer = await served.client.get("/v1/models")

        assert [card["id"] for card in answer.json()["data"]] == ["fake", "x"]


async def test_call_that_nobody_runs_is_not_charged_when_its_caller_leaves(
    serve: Serve,
) -> None:
    (port,) = find_free_ports(1)
    url = f"http://127.0.0.1:{port}"
    async with serve(engines=(url,), wait_ready=False, restart_hold_s=20) as served:
        engine = served.app[POOL].engines[0]
        await served.app[POOL].set_state(engine, EngineState.READY)
        body = {"model": "fake", "messages": [{"role": "user", "content": "y" * 400}]}
        with pytest.raises(httpx.ReadTimeout):
            await served.client.post("/v1/chat/completions", json=body, timeout=0.5)

        usage = served.app[ACCOUNTS].read_usage()["anonymous"]
        assert (usage.prompt_tokens, usage.completion_tokens) == (0, 0)
