"""The gate follows what the engines run: batches are fed to them, chats keep a share."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest
from aiohttp import web

from gateway.admission.accounts import ACCOUNTS
from gateway.admission.served_models import MODELS
from gateway.admission.tickets import LANES
from gateway.engines.pool import POOL
from gateway.middleware import OPEN_REQUESTS
from tests.fake_engine import Behaviour, serve_app
from tests.gateway.conftest import Serve, Served, until
from tests.gateway.engines.lists.peak import watch_peak


def _sent(engine: Behaviour) -> int:
    """Prompts of batches that the engine was sent so far."""
    return sum(len(call["prompt"]) for call in engine.calls if "prompt" in call)


def _is_empty(served: Served) -> bool:
    counts = [served.app[MODELS].count(lane) for lane in LANES]
    return counts == [(0, 0), (0, 0)] and all(e.running == 0 for e in served.app[POOL].engines)


async def test_batch_that_fits_is_one_whole_call(serve: Serve) -> None:
    async with serve(engine_sequences=384) as served:
        answer = await served.predict([f"{n}" for n in range(358)])

        assert answer.json() == {"response": [f"answer:{n}" for n in range(358)]}
        assert [len(call["prompt"]) for call in served.engine.calls] == [358]
        assert "stream" not in served.engine.calls[0]


async def test_large_batch_never_has_more_in_the_engine_than_it_runs(serve: Serve) -> None:
    engine = Behaviour(delays=lambda one: 0.001 * (len(one) * 3 % 7))
    async with serve(engine, engine_sequences=32) as served:
        async with watch_peak(engine) as peak:
            answer = await served.predict([f"{n}" for n in range(400)])

        assert answer.json() == {"response": [f"answer:{n}" for n in range(400)]}
        assert 16 < peak.most <= 30  # a share stays free
        assert _sent(engine) == 400
        usage = served.app[POOL].engines[0].running
        assert usage == 0
        await until(lambda: _is_empty(served))


@pytest.mark.parametrize("size", [200, 600])
async def test_chat_is_answered_before_half_of_the_batch_is_sent(serve: Serve, size: int) -> None:
    """The engine runs sixteen at once, whatever else it has in order of arrival."""
    engine = Behaviour(delay_s=0.02, slots=asyncio.Semaphore(16))
    async with serve(engine, engine_sequences=16) as served:
        batch = asyncio.create_task(served.predict([f"{n}" for n in range(size)]))
        await until(lambda: engine.running >= 15)

        chat = await served.chat("hello")

        assert served.app[MODELS].count("batch")[1] > size / 2  # all of the rest is told of
        assert chat.status_code == 200
        assert _sent(engine) < size / 2
        assert (await batch).json()["response"] == [f"answer:{n}" for n in range(size)]


async def test_batches_share_the_engine_by_turns(serve: Serve) -> None:
    """A small one does not wait for the last of a large one."""
    engine = Behaviour(delay_s=0.02, slots=asyncio.Semaphore(16))
    async with serve(engine, engine_sequences=16) as served:
        large = asyncio.create_task(served.predict([f"{n}" for n in range(400)]))
        await until(lambda: engine.running >= 15)

        small = await served.predict(["a", "b", "c"])

        assert small.json() == {"response": ["answer:a", "answer:b", "answer:c"]}
        assert _sent(engine) < 200
        assert not large.done()
        large.cancel()
        await until(lambda: _is_empty(served))


async def test_batch_beside_another_gives_its_places_back_one_by_one(serve: Serve) -> None:
    engine = Behaviour(delays=lambda question: 60 if "long" in question else 0.0)
    async with serve(engine, engine_sequences=16) as served:
        first = asyncio.create_task(served.predict(["long 1", "long 2"]))
        await until(lambda: engine.running == 2)
        mixed = asyncio.create_task(served.predict(["long 3", *(f"{n}" for n in range(12))]))
        await until(lambda: engine.running == 3)

        after = await served.predict([f"after {n}" for n in range(12)])

        assert after.status_code == 200
        for call in (first, mixed):
            call.cancel()
        await until(lambda: _is_empty(served))


async def test_fed_batch_sets_a_bad_prompt_apart(serve: Serve) -> None:
    async with serve(Behaviour(refuses=lambda one: one == "17"), engine_sequences=16) as served:
        body = (await served.predict([f"{n}" for n in range(60)])).json()

        assert list(body["errors"]) == ["17"]
        assert body["response"] == ["" if n == 17 else f"answer:{n}" for n in range(60)]
        assert _is_empty(served)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
async def test_fed_batch_asks_again_for_what_was_lost_in_the_middle(
    serve: Serve, temperature: float
) -> None:
    engine = Behaviour(delays=lambda one: 0.01 * (len(one) * 3 % 5))
    async with serve(engine, engine_sequences=32, max_attempts=20) as served:
        engine.stream_cut_after = 4
        asking = asyncio.create_task(
            served.predict([f"{n}" for n in range(100)], temperature=temperature)
        )
        await until(lambda: _sent(engine) > 30)
        engine.stream_cut_after = None
        body = (await asking).json()

        lost = {int(place) for place in body.get("errors", {})}
        assert bool(lost) == (temperature > 0)  # another draw would be another answer
        assert body["response"] == ["" if n in lost else f"answer:{n}" for n in range(100)]
        await until(lambda: _is_empty(served))


async def test_fed_batch_whose_deadline_passes_leaves_nothing_behind(serve: Serve) -> None:
    async with serve(engine_sequences=16) as served:
        served.engine.delay_s = 60
        answer = await served.client.post(
            "/predict",
            json={"prompt": [f"{n}" for n in range(100)]},
            headers={"X-Deadline-Ms": "300"},
        )

        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_passed")
        await until(lambda: _is_empty(served) and served.engine.running == 0)


async def test_prompts_of_a_batch_asked_for_again_take_no_room_from_it(serve: Serve) -> None:
    """They wait for its answers; it waits for the room."""
    engine = Behaviour(delay_s=0.02)
    async with serve(engine, engine_sequences=16) as served:
        batch = asyncio.create_task(served.predict([f"{n}" for n in range(100)]))
        await until(lambda: engine.running >= 15)
        again = [asyncio.create_task(served.predict("99")) for _ in range(25)]

        answers = [one.json() for one in await asyncio.gather(*again)]

        assert answers == [{"response": "answer:99"}] * 25
        assert (await batch).json()["response"][99] == "answer:99"
        assert _sent(engine) == 100
        await until(lambda: _is_empty(served))


async def test_prompt_whose_first_asker_left_is_let_in_again(serve: Serve) -> None:
    engine = Behaviour()
    async with serve(engine, engine_sequences=16) as served:
        engine.delay_s = 60
        first = asyncio.create_task(served.predict(["a", "b"]))
        await until(lambda: engine.running == 2)
        second = asyncio.create_task(served.predict("a"))
        await until(lambda: served.app[OPEN_REQUESTS].count == 2)
        # It has nothing in the engine, so it takes no room there.
        await until(lambda: served.app[MODELS].count("interactive") == (0, 0))

        engine.delay_s = 0
        first.cancel()

        assert (await second).json() == {"response": "answer:a"}
        await until(lambda: _is_empty(served))


@pytest.mark.parametrize("end", ["hang-up", "deadline"])
async def test_fed_batch_left_in_the_middle_is_charged_for_what_it_had_running(
    serve: Serve, end: str
) -> None:
    engine = Behaviour()
    async with serve(engine, engine_sequences=16) as served:
        engine.delay_s = 60
        served.app[ACCOUNTS]._pace.learn(100, 1)
        before = served.app[ACCOUNTS].sum_usage().completion_tokens
        asking = asyncio.create_task(
            served.client.post(
                "/predict",
                json={"prompt": [f"{n}" for n in range(40)], "max_tokens": 10},
                headers={"X-Deadline-Ms": "600"} if end == "deadline" else {},
            )
        )
        await until(lambda: engine.running == 15)
        if end == "hang-up":
            enough = time.perf_counter() + 0.2  # a token is made in 10 ms
            await until(lambda: time.perf_counter() > enough)
            asking.cancel()

        await until(lambda: _is_empty(served) and engine.running == 0)
        await until(lambda: served.app[ACCOUNTS].sum_usage().completion_tokens - before == 150)
        await asyncio.wait({asking})


async def test_batch_left_in_the_middle_is_charged_by_the_start_of_each_piece(serve: Serve) -> None:
    """Short ones that come and go beside the long ones do not begin their time anew, and what never
    came in costs nothing.
    """
    prompts = [f"{number}" for number in range(900)]
    engine = Behaviour(delays=lambda one: 0 if not one.isdigit() else 60 if int(one) < 14 else 0.01)
    async with serve(engine, engine_sequences=16) as served:
        accounts = served.app[ACCOUNTS]
        accounts._pace.learn(100, 1)
        taken, given = accounts.sum_usage().prompt_tokens, accounts.sum_usage().completion_tokens
        body = {"prompt": prompts, "max_tokens": 10}
        asking = asyncio.create_task(served.client.post("/predict", json=body))
        await until(lambda: engine.running >= 14)
        enough = time.perf_counter() + 0.2  # a token is made in 10 ms
        await until(lambda: time.perf_counter() > enough and _sent(engine) > 20)
        asking.cancel()

        await until(lambda: _is_empty(served) and engine.running == 0)
        await asyncio.wait({asking})
        ended = _sent(engine) - 15
        used = accounts.sum_usage()
        assert 14 * 10 + 2 * ended <= used.completion_tokens - given <= 15 * 10 + 2 * (ended + 1)
        assert used.prompt_tokens - taken < 40 * _sent(engine)


async def _read_used(served: Served) -> tuple[int, int]:
    used = served.app[ACCOUNTS].sum_usage()
    return used.prompt_tokens, used.completion_tokens


async def test_who_leaves_while_others_prompts_are_awaited_pays_for_their_own_alone(
    serve: Serve,
) -> None:
    engine = Behaviour(delays=lambda one: 60 if one.startswith("slow") else 0)
    async with serve(engine, engine_sequences=64) as served:
        served.app[ACCOUNTS]._pace.learn(100, 1)
        slow, quick = [f"slow {n}" for n in range(5)], [f"quick {n}" for n in range(5)]
        first = asyncio.create_task(served.predict(slow))
        await until(lambda: engine.running == 5)
        before = await _read_used(served)
        second = asyncio.create_task(served.predict(quick + slow))
        await until(lambda: _sent(engine) == 10 and engine.running == 5)
        second.cancel()
        await until(lambda: served.app[OPEN_REQUESTS].count == 1)
        left = await _read_used(served)
        await served.predict(quick)
        whole = await _read_used(served)

        assert [now - then for now, then in zip(left, before, strict=True)] == [
            now - then for now, then in zip(whole, left, strict=True)
        ]
        first.cancel()
        await until(lambda: _is_empty(served))


async def test_what_took_too_long_is_charged_also_when_the_rest_is_left(serve: Serve) -> None:
    engine = Behaviour(delays=lambda one: 60 if one.isdigit() else 0)
    async with serve(engine, engine_sequences=16, engine_timeout_s=0.5) as served:
        served.app[ACCOUNTS]._pace.learn(100, 1)
        before = await _read_used(served)
        body = {"prompt": [f"{n}" for n in range(60)], "max_tokens": 10}
        asking = asyncio.create_task(served.client.post("/predict", json=body))
        await until(lambda: _sent(engine) >= 30)
        asking.cancel()
        await until(lambda: served.app[OPEN_REQUESTS].count == 0)
        await asyncio.wait({asking})

        # Ten tokens are made in a tenth of a second.
        assert (await _read_used(served))[1] - before[1] >= 15 * 10


async def test_engine_that_sends_each_token_is_asked_for_whole_answers_from_then_on(
    serve: Serve,
) -> None:
    async with serve(Behaviour(knows_stream_interval=False), engine_sequences=16) as served:
        first = await served.predict([f"{n}" for n in range(40)])
        n_streams = sum("stream" in call for call in served.engine.calls)
        second = await served.predict([f"again {n}" for n in range(40)])

        assert first.json() == {"response": [f"answer:{n}" for n in range(40)]}
        assert second.json() == {"response": [f"answer:again {n}" for n in range(40)]}
        assert sum("stream" in call for call in served.engine.calls) == n_streams > 0


async def test_list_of_v1_takes_the_batch_share_and_chats_the_rest(serve: Serve) -> None:
    async with serve(engine_sequences=32) as served:
        served.engine.delay_s = 60
        calls = [
            asyncio.create_task(
                served.client.post("/v1/completions", json={"model": "fake", "prompt": ["a"] * 100})
            )
        ]
        await until(lambda: served.app[MODELS].count("batch") == (30, 70))
        calls += [asyncio.create_task(served.chat(f"{n}")) for n in range(7)]

        await until(lambda: served.app[MODELS].count("interactive") == (6, 1))  # 32 and an eighth
        for call in calls:
            call.cancel()
        await until(lambda: _is_empty(served))


def _load(running: int, waiting: int) -> str:
    return f"vllm:num_requests_running {running}.0\nvllm:num_requests_waiting {waiting}.0\n"


async def _read_places(served: Served) -> float:
    text = (await served.client.get("/metrics")).text
    _, _, rest = text.partition("\ngateway_max_running_sequences ")
    return float(rest.partition("\n")[0])


async def test_places_of_an_unknown_engine_are_learnt_from_its_metrics(serve: Serve) -> None:
    engine = Behaviour(metrics=_load(48, 100))
    async with serve(engine, probe_interval_s=0.02) as served:
        engine.delay_s = 60
        assert await _read_places(served) == 4096
        batch = asyncio.create_task(served.predict([f"{n}" for n in range(148)]))

        async def is_learnt() -> bool:
            return await _read_places(served) == 54

        await until(is_learnt)
        engine.metrics = _load(54, 0)  # it could run more: the cache is no longer full

        async def has_grown() -> bool:
            return await _read_places(served) > 54

        await until(has_grown)
        batch.cancel()


async def test_places_learnt_too_few_grow_while_batches_alone_come(serve: Serve) -> None:
    """A share is never theirs, so they never fill what is known."""
    engine = Behaviour(metrics=_load(5, 100))  # it was still reading long prompts
    async with serve(engine, probe_interval_s=0.02) as served:
        engine.delay_s = 60
        first = asyncio.create_task(served.predict([f"{n}" for n in range(148)]))
        known = served.app[POOL].engines[0]
        await until(lambda: known.sequences == 16)
        first.cancel()
        await until(lambda: engine.running == 0)

        second = asyncio.create_task(served.predict([f"again {n}" for n in range(148)]))
        await until(lambda: engine.running == 15)
        engine.metrics = _load(15, 0)
        await until(lambda: (known.sequences or 0) > 16)

        await until(lambda: engine.running > 15)
        second.cancel()
        await until(lambda: _is_empty(served))


async def test_places_are_those_that_the_engines_launcher_tells(serve: Serve) -> None:
    told: dict[str, Any] = {"max_num_seqs": 64}

    async def status(_request: web.Request) -> web.Response:
        return web.json_response(told)

    launcher = web.Application()
    launcher.router.add_get("/status", status)
    async with serve_app(launcher) as url:
        engine = Behaviour(is_healthy=False)
        async with serve(engine, launchers=(url,), wait_ready=False) as served:
            told["engine_port"] = int(served.engine_url.rpartition(":")[2])
            engine.is_healthy = True

            async def is_told() -> bool:
                return await _read_places(served) == 72

            await until(is_told)
