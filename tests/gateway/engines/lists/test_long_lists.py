"""A list on /v1 that is longer than its lane's share comes in by pieces; its answer is one."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest

from gateway.admission.accounts import ACCOUNTS
from gateway.admission.served_models import MODELS
from gateway.admission.tickets import LANES
from gateway.engines.pool import POOL
from gateway.request_body import BODIES
from tests.fake_engine import TOKENIZER, Behaviour, build_fake_engine
from tests.gateway.conftest import Serve, Served, until
from tests.gateway.engines.lists.peak import watch_peak
from tests.gateway.scripted_engine import (
    Call,
    ScriptedEngine,
    chunk,
    serve_scripted,
    stream_head,
    whole_answer,
)

# Of an engine that runs sixteen: fifteen are the batch lane's.
SHARE = 15


def _is_empty(served: Served) -> bool:
    counts = [served.app[MODELS].count(lane) for lane in LANES]
    return counts == [(0, 0), (0, 0)] and all(e.running == 0 for e in served.app[POOL].engines)


def _sent(*engines: Behaviour) -> int:
    return sum(len(call["prompt"]) for one in engines for call in one.calls if "prompt" in call)


def _numbers(count: int) -> list[str]:
    return [f"{n}" for n in range(count)]


def _number(one: str) -> int:
    """Of a prompt of these; the warm-up's are others."""
    return int(one) if one.isdigit() else 0


async def _complete(served: Served, prompt: Sequence[Any], **fields: Any) -> httpx.Response:
    body = {"model": "fake", "prompt": prompt, **fields}
    return await served.client.post("/v1/completions", json=body)


def _check_answer(answer: httpx.Response, prompts: Sequence[str], copies: int = 1) -> None:
    """In the order of the prompts, whichever piece each was in."""
    assert answer.status_code == 200, answer.text[:500]
    body = answer.json()
    asked = [one for one in prompts for _ in range(copies)]
    assert [one["index"] for one in body["choices"]] == list(range(len(asked)))
    assert [one["text"].strip() for one in body["choices"]] == [f"answer:{one}" for one in asked]
    assert body["usage"] == {
        "prompt_tokens": sum(map(len, prompts)),
        "completion_tokens": 2 * len(asked),
    }
    assert (body["id"], body["model"], body["system_fingerprint"]) == (
        "cmpl-1",
        "fake",
        "vllm-fake",
    )


async def test_long_list_over_several_engines_is_put_together_in_order(serve: Serve) -> None:
    engines = [Behaviour(delays=lambda one: 0.001 * (_number(one) * 7 % 5)) for _ in range(3)]
    async with serve(*engines, engine_sequences=16) as served:
        answer = await _complete(served, _numbers(200))

        _check_answer(answer, _numbers(200))
        assert _sent(*engines) == 200
        assert all(len(engine.calls) > 2 for engine in engines)
        assert await _read_usage(served) == (490, 400)
        await until(lambda: _is_empty(served))


async def _read_usage(served: Served) -> tuple[int, int]:
    used = served.app[ACCOUNTS].sum_usage()
    return used.prompt_tokens, used.completion_tokens


async def test_long_list_never_has_more_in_the_engine_than_its_share(serve: Serve) -> None:
    engine = Behaviour(delays=lambda one: 0.001 * (_number(one) * 3 % 7))
    async with serve(engine, engine_sequences=16) as served:
        async with watch_peak(engine) as peak:
            answer = await _complete(served, _numbers(150))

        _check_answer(answer, _numbers(150))
        assert SHARE / 2 < peak.most <= SHARE


@pytest.mark.parametrize("is_stream", [False, True])
async def test_chat_beside_a_long_list_enters_at_once(serve: Serve, is_stream: bool) -> None:
    """The engine runs sixteen at once, whatever else it has in order of arrival."""
    engine = Behaviour(delay_s=0.02, slots=asyncio.Semaphore(16))
    async with serve(engine, engine_sequences=16) as served:
        asking = asyncio.create_task(_complete(served, _numbers(300), stream=is_stream))
        await until(lambda: engine.running >= SHARE)

        chat = await served.chat("hello")

        assert chat.status_code == 200
        assert served.app[MODELS].count("batch")[1] > 150  # all of the rest is told of
        assert _sent(engine) < 150
        assert (await asking).status_code == 200
        await until(lambda: _is_empty(served))


@pytest.mark.parametrize("is_stream", [False, True])
async def test_small_batch_beside_long_lists_takes_its_turn(serve: Serve, is_stream: bool) -> None:
    engine = Behaviour(delay_s=0.02, slots=asyncio.Semaphore(16))
    async with serve(engine, engine_sequences=16) as served:
        lists = [
            asyncio.create_task(_complete(served, _numbers(300), stream=is_stream))
            for _ in range(3)
        ]
        await until(lambda: engine.running >= SHARE)

        small = await served.predict(["a", "b"])

        assert small.json() == {"response": ["answer:a", "answer:b"]}
        assert _sent(engine) < 500
        assert not any(one.done() for one in lists)
        for one in lists:
            one.cancel()
        await until(lambda: _is_empty(served) and engine.running == 0)


async def test_list_within_its_share_is_one_call_as_it_was_sent(serve: Serve) -> None:
    async with serve(engine_sequences=32) as served:
        answer = await _complete(served, _numbers(30))

        assert answer.status_code == 200
        assert [len(call["prompt"]) for call in served.engine.calls] == [30]


async def test_pieces_are_the_callers_bytes_with_a_shorter_list(tmp_path: Path) -> None:
    """What stands beside the prompts, odd numbers and escapes too, and each prompt by itself."""
    bodies: list[bytes] = []

    async def remember(call: Call) -> None:
        bodies.append(call.body)
        await call.send(call.good_answer())

    body = (
        b'{ "model":"fake",\n "temperature" : 1.00e-1, "prompt" : [ '
        + b" ,".join(b'"\\u0061 %d"' % n for n in range(20))
        + b' ], "user":"\\/ \xe4\xbb\x80" }'
    )
    async with serve_scripted(tmp_path, ScriptedEngine(remember), engine_sequences=4) as served:
        answer = await served.client.post("/v1/completions", content=body)

        assert answer.status_code == 200
        assert [one["text"] for one in answer.json()["choices"]] == [
            f"answer:a {n}" for n in range(20)
        ]
    before, after = body.split(b'"\\u0061 0"')[0], body.split(b'"\\u0061 19"')[1]
    assert sorted(bodies) == sorted(before + b'"\\u0061 %d"' % n + after for n in range(20))


async def test_token_ids_come_in_by_pieces_too(serve: Serve) -> None:
    tokenizer = build_fake_engine(Behaviour())[TOKENIZER]
    words = [f"word {n}" for n in range(60)]
    ids = [tokenizer.encode(word).ids for word in words]
    async with serve(engine_sequences=16) as served:
        answer = await _complete(served, ids)

        texts = [one["text"].strip() for one in answer.json()["choices"]]
        assert texts == [f"answer:{word}" for word in words]
        assert answer.json()["usage"]["prompt_tokens"] == sum(map(len, ids))
        assert len(served.engine.calls) > 2


@pytest.mark.parametrize("is_stream", [False, True])
async def test_copies_of_a_prompt_stay_together(serve: Serve, is_stream: bool) -> None:
    async with serve(engine_sequences=16) as served:
        answer = await _complete(served, _numbers(30), n=4, stream=is_stream)

        assert all(len(call["prompt"]) * 4 <= SHARE for call in served.engine.calls)
        if is_stream:
            texts = _read_texts(answer.text)
            assert texts == {4 * n + m: f"answer:{n}" for n in range(30) for m in range(4)}
        else:
            _check_answer(answer, _numbers(30), copies=4)
        await until(lambda: _is_empty(served))


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "hi"}], "n": 8}, "n"),
        ("/v1/completions", {"prompt": "hi", "n": 8}, "n"),
        ("/v1/completions", {"prompt": ["hi"] * 4, "n": 8}, "n"),
        ("/v1/completions", {"prompt": "hi", "best_of": 8}, "n"),
        ("/v1/completions", {"prompt": ["hi"] * 9, "prompt_embeds": ["eA=="]}, "prompt"),
        ("/v1/completions", {"prompt": ["hi"] * 9, "x": "x" * 2**20}, "prompt"),
    ],
)
async def test_what_cannot_be_cut_and_is_more_than_the_share_is_refused(
    serve: Serve, path: str, fields: dict[str, Any], param: str
) -> None:
    async with serve(engine_sequences=8, max_bytes_per_token=10_000) as served:
        refused = await served.client.post(path, json={"model": "fake", **fields})
        error = refused.json()["error"]
        assert (refused.status_code, error["param"], error["source"]) == (400, param, "gateway")
        assert "at most" in error["message"]
        assert served.engine.calls == []
        fitting = await served.client.post(
            path, json={"model": "fake", **fields, "x": "", "n": 1, "best_of": 1}
        )
        assert fitting.status_code == (400 if "prompt_embeds" in fields else 200)


@pytest.mark.parametrize("is_stream", [False, True])
async def test_texts_and_token_ids_in_one_list_are_refused_as_engines_do(
    serve: Serve, is_stream: bool
) -> None:
    """By pieces each of them would be a good list."""
    async with serve(engine_sequences=16) as served:
        refused = await _complete(served, ["a"] * 20 + [[1, 2]] * 20, stream=is_stream)

        error = refused.json()["error"]
        assert (refused.status_code, error["param"], error["code"]) == (
            400,
            "prompt",
            "invalid_type",
        )
        assert "of one kind" in error["message"]
        assert served.engine.calls == []


@pytest.mark.parametrize("count", [8, 20])
async def test_another_list_that_its_path_does_not_read_changes_nothing(
    serve: Serve, count: int
) -> None:
    async with serve(engine_sequences=16) as served:
        answer = await _complete(served, _numbers(count), input=["x"] * 30)

        _check_answer(answer, _numbers(count))
        await until(lambda: _is_empty(served))


async def test_nothing_is_cut_or_refused_while_nobody_knows_what_the_engine_runs(
    serve: Serve,
) -> None:
    async with serve() as served:
        answer = await _complete(served, _numbers(1000))
        assert answer.status_code == 200
        assert len(served.engine.calls) == 1
        assert (await served.chat("hi", n=16)).status_code == 200


async def test_engine_killed_in_the_middle_costs_a_greedy_list_nothing(serve: Serve) -> None:
    engines = [Behaviour(delay_s=0.01) for _ in range(3)]
    async with serve(*engines, engine_sequences=16) as served:
        asking = asyncio.create_task(_complete(served, _numbers(300), temperature=0))
        await until(lambda: _sent(*engines) > 60)
        engines[1].cuts_connection = True
        engines[1].is_healthy = False

        _check_answer(await asking, _numbers(300))
        await until(lambda: _is_empty(served))


async def test_sampled_list_that_lost_a_piece_is_an_error_and_charged_for_the_rest(
    serve: Serve,
) -> None:
    engine = Behaviour(delay_s=0.005)
    async with serve(engine, engine_sequences=16) as served:
        before = await _read_usage(served)
        asking = asyncio.create_task(_complete(served, _numbers(300), temperature=1))
        await until(lambda: _sent(engine) > 60)
        engine.cuts_connection = True

        answer = await asking
        error = answer.json()["error"]
        assert (answer.status_code, error["code"]) == (502, "engine_failed")
        used = await _read_usage(served)
        assert 2 * 45 <= used[1] - before[1] < 600
        await until(lambda: _is_empty(served) and engine.running == 0)


async def test_refusal_of_one_piece_is_the_calls_answer_and_ends_the_others(serve: Serve) -> None:
    engine = Behaviour(
        refuses=lambda one: one == "17",
        refused_field="prompt",
        delays=lambda one: 60 if _number(one) > 17 else 0,
    )
    async with serve(engine, engine_sequences=16) as served:
        answer = await _complete(served, _numbers(100))

        error = answer.json()["error"]
        assert (answer.status_code, error["source"]) == (400, "engine")
        assert error["message"] == "this is not to my taste"
        await until(lambda: _is_empty(served) and engine.running == 0)
        assert _sent(engine) < 40
        used = await _read_usage(served)
        assert 0 < used[1] <= 2 * 17  # what has ended before it


async def test_hang_up_in_the_middle_is_charged_for_what_ended_and_what_ran(serve: Serve) -> None:
    engine = Behaviour(delays=lambda one: 60 if _number(one) >= 30 else 0)
    async with serve(engine, engine_sequences=16) as served:
        served.app[ACCOUNTS]._pace.learn(100, 1)
        asking = asyncio.create_task(_complete(served, _numbers(100), max_tokens=10))
        await until(lambda: engine.running == SHARE and _sent(engine) == 30 + SHARE)
        enough = time.perf_counter() + 0.2  # a token is made in 10 ms
        await until(lambda: time.perf_counter() > enough)
        asking.cancel()

        await until(lambda: _is_empty(served) and engine.running == 0)
        assert _sent(engine) == 30 + SHARE
        given = 30 * 2 + SHARE * 10
        await until(lambda: served.app[ACCOUNTS].sum_usage().completion_tokens == given)
        await asyncio.wait({asking})


@pytest.mark.parametrize("status", [400, 404, 500, 503])
@pytest.mark.parametrize("is_stream", [False, True])
async def test_list_that_a_bad_piece_ends_is_charged_like_one_that_is_left(
    serve: Serve, is_stream: bool, status: int
) -> None:
    """Fourteen run on beside the short ones, of which the last is refused."""

    def delay(prompt: str) -> float:
        number = _number(prompt)
        return 60 if 30 <= number < 44 else 0.2 if number == 59 else 0

    engine = Behaviour(delays=delay, statuses=lambda one: status if one == "60" else 200)
    async with serve(engine, engine_sequences=16, max_attempts=1) as served:
        served.app[ACCOUNTS]._pace.learn(100, 1)
        before = await _read_usage(served)
        answer = await _complete(served, _numbers(100), max_tokens=10, stream=is_stream)

        assert "error" in answer.text
        assert _sent(engine) == 61
        await until(lambda: _is_empty(served) and engine.running == 0)
        taken, given = await _read_usage(served)
        assert taken - before[0] >= 46
        assert given - before[1] == 46 * 2 + 14 * 10


@pytest.mark.parametrize("refusals", [2, 3])
@pytest.mark.parametrize("is_stream", [False, True])
async def test_piece_for_which_an_engine_has_no_room_is_asked_again(
    serve: Serve, monkeypatch: pytest.MonkeyPatch, is_stream: bool, refusals: int
) -> None:
    monkeypatch.setattr("gateway.engines.lists.long_lists._BUSY_PAUSE_S", 0.01)
    left = refusals

    def choose(prompt: str) -> int:
        nonlocal left
        if prompt != "20" or not left:
            return 200
        left -= 1
        return 503

    engine = Behaviour(statuses=choose)
    async with serve(engine, engine_sequences=16, max_attempts=3) as served:
        answer = await _complete(served, _numbers(40), stream=is_stream, temperature=1)

        assert sum(call["prompt"] == ["20"] for call in engine.calls) == 3
        if refusals == 3:
            assert "error" in answer.text
        elif is_stream:
            assert _read_texts(answer.text) == {n: f"answer:{n}" for n in range(40)}
        else:
            _check_answer(answer, _numbers(40))
        await until(lambda: _is_empty(served) and served.app[BODIES]._held == 0)


async def test_list_that_loses_its_engine_is_charged_for_what_ran_elsewhere(serve: Serve) -> None:
    steady = Behaviour(delays=lambda one: 60 if one.isdigit() else 0)
    lost = Behaviour(delays=lambda one: 0.2 if one.isdigit() else 0)
    async with serve(steady, lost, engine_sequences=16) as served:
        served.app[ACCOUNTS]._pace.learn(100, 1)
        lost.cuts_connection = True
        answer = await _complete(served, _numbers(100), max_tokens=10, temperature=1)

        assert answer.status_code == 502
        await until(lambda: _is_empty(served) and steady.running == 0)
        # Not by the clock for the piece that its engine has lost.
        given = (await _read_usage(served))[1]
        assert 10 * _sent(steady) <= given < 10 * _sent(steady, lost)


@pytest.mark.parametrize("fault", ["refusal", "event"])
async def test_refused_stream_is_charged_for_all_that_was_told(tmp_path: Path, fault: str) -> None:
    """No pace is known here: a token for each event."""
    told = asyncio.Event()
    open_calls = 0

    async def answer(call: Call) -> None:
        nonlocal open_calls
        if call.prompts == ["14"]:
            await told.wait()
            error = orjson.dumps(
                {"error": {"message": "no", "type": "BadRequestError", "code": 400}}
            )
            if fault == "refusal":
                await call.send(whole_answer(error, "400 Bad Request"))
            else:
                await call.send(stream_head() + chunk(b"data: " + error + b"\n\n") + chunk(b""))
            return
        event = {"choices": [{"index": 0, "text": "t", "finish_reason": None}]}
        await call.send(stream_head())
        for _ in range(10):
            await call.send(chunk(b"data: " + orjson.dumps(event) + b"\n\n"))
        open_calls += 1
        await call.wait_closed()

    async with serve_scripted(tmp_path, ScriptedEngine(answer), engine_sequences=16) as served:
        before = await _read_usage(served)
        body = {"model": "fake", "prompt": _numbers(20), "stream": True}
        async with served.client.stream("POST", "/v1/completions", json=body) as stream:
            seen = b""
            async for data in stream.aiter_bytes():
                seen += data
                if seen.count(b'"text":"t"') == 140:
                    told.set()
        assert b'"error"' in seen
        await until(lambda: _is_empty(served))
        assert (await _read_usage(served))[1] - before[1] == 140


async def test_list_left_in_the_middle_is_charged_by_the_start_of_each_piece(serve: Serve) -> None:
    """Short ones that come and go beside the long ones do not begin their time anew."""
    engine = Behaviour(delays=lambda one: 0 if not one.isdigit() else 60 if int(one) < 14 else 0.01)
    async with serve(engine, engine_sequences=16) as served:
        served.app[ACCOUNTS]._pace.learn(100, 1)
        before = await _read_usage(served)
        asking = asyncio.create_task(_complete(served, _numbers(900), max_tokens=10))
        await until(lambda: engine.running >= 14)
        enough = time.perf_counter() + 0.2
        await until(lambda: time.perf_counter() > enough and _sent(engine) > 20)
        asking.cancel()

        await until(lambda: _is_empty(served) and engine.running == 0)
        await asyncio.wait({asking})
        ended = _sent(engine) - 15
        given = (await _read_usage(served))[1] - before[1]
        assert 14 * 10 + 2 * ended <= given <= 15 * 10 + 2 * (ended + 1)


async def test_deadline_in_the_middle_leaves_nothing_behind(serve: Serve) -> None:
    async with serve(engine_sequences=16) as served:
        served.engine.delay_s = 60
        answer = await served.client.post(
            "/v1/completions",
            json={"model": "fake", "prompt": _numbers(100)},
            headers={"X-Deadline-Ms": "300"},
        )

        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_passed")
        await until(lambda: _is_empty(served) and served.engine.running == 0)


async def test_bytes_are_held_no_longer_than_their_pieces(serve: Serve) -> None:
    engine = Behaviour(delays=lambda one: 60 if "last" in one else 0, max_model_len=2**20)
    prompts = [*(f"{n} " + "x" * 1000 for n in range(100)), "last"]
    async with serve(engine, engine_sequences=16) as served:
        asking = asyncio.create_task(_complete(served, prompts))
        await until(lambda: _sent(engine) == 101 and engine.running == 1)

        await until(lambda: served.app[BODIES]._held < 2000)
        asking.cancel()
        await until(lambda: served.app[BODIES]._held == 0)


async def test_what_stands_beside_the_prompts_is_held_once_for_each_call(serve: Serve) -> None:
    engine = Behaviour(delays=lambda one: 60 if one.isdigit() else 0)
    async with serve(engine, engine_sequences=16, max_bytes_per_token=10_000) as served:
        asking = asyncio.create_task(_complete(served, _numbers(100), user="u" * 10_000))
        await until(lambda: engine.running == SHARE)

        assert SHARE * 10_000 <= served.app[BODIES]._held < (SHARE + 2) * 11_000
        asking.cancel()
        await until(lambda: _is_empty(served) and served.app[BODIES]._held == 0)


async def test_what_goes_with_each_of_many_prompts_is_bounded_by_their_number(serve: Serve) -> None:
    async with serve(engine_sequences=16, max_bytes_per_token=10_000) as served:
        refused = await _complete(served, _numbers(1024), user="u" * 2**16)
        error = refused.json()["error"]
        assert (refused.status_code, error["param"], error["source"]) == (400, "prompt", "gateway")
        assert f"at most {2**15} bytes" in error["message"]
        assert served.engine.calls == []
        fewer = await _complete(served, _numbers(100), user="u" * 2**16)
        assert fewer.status_code == 200


def _drop(choices: list[dict[str, Any]]) -> None:
    choices.pop()


def _double(choices: list[dict[str, Any]]) -> None:
    choices[-1] = choices[0]


def _add(choices: list[dict[str, Any]]) -> None:
    choices.append(choices[0])


def _misplace(choices: list[dict[str, Any]], index: object = 7) -> None:
    choices[0]["index"] = index


@pytest.mark.parametrize(
    "spoil",
    [
        _drop,
        _double,
        _add,
        *(partial(_misplace, index=one) for one in (7, -1, "0", None, 0.0, [0])),
    ],
)
async def test_piece_whose_indices_make_no_sense_is_garbled(tmp_path: Path, spoil: Any) -> None:
    async def answer(call: Call) -> None:
        if "13" not in call.prompts:
            await call.send(call.good_answer())
            return
        choices = [
            {"index": n, "text": "x", "finish_reason": "stop"} for n in range(len(call.prompts))
        ]
        spoil(choices)
        await call.send(whole_answer(orjson.dumps({"choices": choices})))

    engine = ScriptedEngine(answer)
    async with serve_scripted(tmp_path, engine, engine_sequences=384) as served:
        refused = await _complete(served, _numbers(400))
        calls = sum("13" in call.prompts for call in engine.calls)
        greedy = await _complete(served, _numbers(400), temperature=0)

        for one in (refused, greedy):
            assert (one.status_code, one.json()["error"]["code"]) == (502, "engine_garbled")
        assert calls == 1
        # The same answer would come again, so it was asked for again.
        assert sum("13" in call.prompts for call in engine.calls) == 1 + 3
        await until(lambda: _is_empty(served))


async def test_choices_of_any_form_are_moved_and_all_usage_is_summed(tmp_path: Path) -> None:
    """Another order of members, white space, details of usage; the rest is the first piece's."""
    usage = {
        "prompt_tokens": 2,
        "completion_tokens": 3,
        "prompt_tokens_details": {"cached_tokens": 1, "audio": None},
        "completion_tokens_details": None,
    }

    async def answer(call: Call) -> None:
        choices = [
            {"text": f'"index":5, {one}', "logprobs": {"a": [None, -1e-05]}, "index": n}
            for n, one in enumerate(call.prompts)
        ]
        if len(call.prompts) > 1:
            choices = [{"index": one.pop("index"), **one} for one in choices]
        told = {"usage": usage, "created": len(engine.calls), "choices": choices, "x": [1, None]}
        await call.send(whole_answer(orjson.dumps(told, option=orjson.OPT_INDENT_2)))

    engine = ScriptedEngine(answer)
    async with serve_scripted(tmp_path, engine, engine_sequences=384) as served:
        body = (await _complete(served, _numbers(400))).json()

        calls = len(engine.calls)
        assert [one["index"] for one in body["choices"]] == list(range(400))
        assert [one["text"] for one in body["choices"]] == [f'"index":5, {n}' for n in range(400)]
        assert body["choices"][7]["logprobs"] == {"a": [None, -1e-05]}
        assert body["usage"] == {
            "prompt_tokens": 2 * calls,
            "completion_tokens": 3 * calls,
            "prompt_tokens_details": {"cached_tokens": calls, "audio": None},
            "completion_tokens_details": None,
        }
        assert body["x"] == [1, None]


async def test_conversations_in_one_call_come_in_by_pieces_too(tmp_path: Path) -> None:
    engine = ScriptedEngine()
    async with serve_scripted(tmp_path, engine, engine_sequences=16) as served:
        turns = [[{"role": "user", "content": f"{n}"}] for n in range(50)]
        body = {"model": "fake", "messages": turns}
        answer = await served.client.post("/v1/chat/completions/batch", json=body)

        choices = answer.json()["choices"]
        assert [one["index"] for one in choices] == list(range(50))
        assert [one["message"]["content"] for one in choices] == [f"answer:{n}" for n in range(50)]
        assert len(engine.calls) == 50


async def test_conversations_in_one_call_are_no_stream_whatever_is_asked(tmp_path: Path) -> None:
    """The engine leaves `stream` aside on that path."""

    async def answer(call: Call) -> None:
        del call.fields["stream"]
        await call.send(call.good_answer())

    async with serve_scripted(tmp_path, ScriptedEngine(answer), engine_sequences=16) as served:
        turns = [[{"role": "user", "content": f"{n}"}] for n in range(50)]
        body = {"model": "fake", "messages": turns, "stream": True}
        answered = await served.client.post("/v1/chat/completions/batch", json=body)

        assert answered.status_code == 200
        assert [one["index"] for one in answered.json()["choices"]] == list(range(50))


def _read_events(text: str) -> list[dict[str, Any]]:
    *events, done, rest = text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    return [orjson.loads(event.removeprefix("data: ")) for event in events]


def _read_texts(text: str) -> dict[int, str]:
    texts: dict[int, str] = {}
    for event in _read_events(text):
        for choice in event.get("choices", ()):
            texts[choice["index"]] = texts.get(choice["index"], "") + choice["text"]
    return {index: text.strip() for index, text in sorted(texts.items())}


@pytest.mark.parametrize("asks_for_usage", [False, True])
async def test_streamed_list_is_fed_and_told_as_one_stream(
    serve: Serve, asks_for_usage: bool
) -> None:
    engines = [Behaviour(delays=lambda one: 0.001 * (_number(one) * 7 % 5)) for _ in range(2)]
    options = {"stream_options": {"include_usage": True}} if asks_for_usage else {}
    async with serve(*engines, engine_sequences=16) as served:
        answer = await _complete(served, _numbers(200), stream=True, **options)

        assert answer.headers["Content-Type"].startswith("text/event-stream")
        assert _read_texts(answer.text) == {n: f"answer:{n}" for n in range(200)}
        events = _read_events(answer.text)
        ends = [event for event in events if not event["choices"]]
        usage = {"prompt_tokens": 490, "completion_tokens": 400}
        assert [event["usage"] for event in ends] == ([usage] if asks_for_usage else [])
        assert not ends or events[-1] is ends[-1]
        assert await _read_usage(served) == (490, 400)
        await until(lambda: _is_empty(served))


async def test_streamed_list_makes_room_as_each_sequence_ends(serve: Serve) -> None:
    """Not when its piece does: one long answer keeps no places of others."""
    engine = Behaviour(delays=lambda one: 60 if _number(one) % 30 == 7 else 0)
    async with serve(engine, engine_sequences=384) as served:
        asking = asyncio.create_task(_complete(served, _numbers(700), stream=True))
        await until(lambda: _sent(engine) == 700 and engine.running == 24)
        await until(lambda: served.app[MODELS].count("batch") == (24, 0))
        asking.cancel()
        await until(lambda: _is_empty(served) and engine.running == 0)


async def test_streamed_list_refused_at_first_is_a_refusal(serve: Serve) -> None:
    async with serve(Behaviour(refuses=str.isdigit), engine_sequences=16) as served:
        answer = await _complete(served, _numbers(100), stream=True)

        assert (answer.status_code, answer.json()["error"]["source"]) == (400, "engine")
        await until(lambda: _is_empty(served) and served.engine.running == 0)


@pytest.mark.parametrize("fault", ["refusal", "event", "lost"])
async def test_streamed_list_that_fails_in_the_middle_ends_in_one_error_event(
    serve: Serve, fault: str
) -> None:
    engine = Behaviour(delays=lambda one: 0.01)
    async with serve(engine, engine_sequences=16) as served:
        asking = asyncio.create_task(_complete(served, _numbers(400), stream=True))
        await until(lambda: _sent(engine) > 60)
        if fault == "refusal":
            engine.refuses = lambda one: True
        elif fault == "event":
            engine.fails = lambda one: True
        else:
            engine.stream_cut_after = 0
        text = (await asking).text

        *_, last = _read_events(text)
        assert last["error"]["source"] == "engine"
        assert text.count('"error"') == 1
        assert (
            last["error"]["code"] == {"refusal": 400, "event": 500, "lost": "engine_failed"}[fault]
        )
        assert len(_read_texts(text)) < 400
        used = await _read_usage(served)
        assert used[1] >= 2 * 45
        await until(lambda: _is_empty(served) and engine.running == 0)


async def test_streamed_list_left_in_the_middle_is_charged_for_what_ended_and_what_ran(
    serve: Serve,
) -> None:
    engine = Behaviour(delays=lambda one: 60 if _number(one) >= 30 else 0)
    async with serve(engine, engine_sequences=16) as served:
        served.app[ACCOUNTS]._pace.learn(100, 1)
        body = {"model": "fake", "prompt": _numbers(100), "max_tokens": 10, "stream": True}
        async with served.client.stream("POST", "/v1/completions", json=body) as answer:
            chunks = answer.aiter_bytes()
            await anext(chunks)
            await until(lambda: engine.running == SHARE and _sent(engine) == 30 + SHARE)
            enough = time.perf_counter() + 0.2
            await until(lambda: time.perf_counter() > enough)
        await until(lambda: _is_empty(served) and engine.running == 0)
        assert _sent(engine) == 30 + SHARE
        given = 30 * 2 + SHARE * 10
        await until(lambda: served.app[ACCOUNTS].sum_usage().completion_tokens == given)


async def test_streamed_list_that_nobody_reads_waits_in_the_engines(serve: Serve) -> None:
    """A caller who takes nothing holds up their own stream, not the memory."""
    engine = Behaviour()
    async with serve(engine, engine_sequences=16, max_prompts_per_call=10_000) as served:
        long = [f"{n} " + "y" * 400 for n in range(1000)]
        body = {"model": "fake", "prompt": long, "stream": True}
        async with served.client.stream("POST", "/v1/completions", json=body) as answer:
            chunks = answer.aiter_bytes()
            seen = await anext(chunks)
            async for chunk in chunks:
                seen += chunk
        assert len(_read_texts(seen.decode())) == 1000


async def test_silent_engine_ends_a_streamed_list(serve: Serve) -> None:
    engine = Behaviour(delays=lambda one: 60 if _number(one) >= 30 else 0)
    async with serve(engine, engine_sequences=16, stream_idle_timeout_s=0.3) as served:
        text = (await _complete(served, _numbers(100), stream=True)).text

        *_, last = _read_events(text)
        assert last["error"]["code"] == "engine_timeout"
        await until(lambda: _is_empty(served) and engine.running == 0)


async def test_streamed_list_that_waits_for_its_turn_has_no_silent_engine(serve: Serve) -> None:
    """Others have the engine for longer than one may be silent."""
    engine = Behaviour(
        delays=lambda one: 0.2 if one.isdigit() else 0.9 if one.startswith("slow") else 0
    )
    async with serve(engine, engine_sequences=16, stream_idle_timeout_s=0.5) as served:
        asking = asyncio.create_task(_complete(served, _numbers(45), stream=True))
        await until(lambda: engine.running >= SHARE)
        slow = [
            asyncio.create_task(_complete(served, [f"slow {n}" for n in range(SHARE)]))
            for _ in range(2)
        ]

        assert _read_texts((await asking).text) == {n: f"answer:{n}" for n in range(45)}
        for one in slow:
            assert (await one).status_code == 200


async def test_time_of_a_streamed_list_is_that_of_each_piece(serve: Serve) -> None:
    engine = Behaviour(delays=lambda one: 0.1 if one.isdigit() else 0)
    async with serve(engine, engine_sequences=16, engine_timeout_s=0.5) as served:
        began = time.perf_counter()
        answer = await _complete(served, _numbers(SHARE * 8), stream=True)

        assert time.perf_counter() - began > 0.5
        assert len(_read_texts(answer.text)) == SHARE * 8


async def test_streamed_piece_that_takes_too_long_ends_its_list(serve: Serve) -> None:
    engine = Behaviour(delays=lambda one: 60 if _number(one) >= 30 else 0)
    async with serve(engine, engine_sequences=16, engine_timeout_s=0.5) as served:
        text = (await _complete(served, _numbers(100), stream=True)).text

        assert _read_events(text)[-1]["error"]["code"] == "engine_timeout"
        await until(lambda: _is_empty(served) and engine.running == 0)
