"""POST /predict as the contract has it, against a fake engine."""

from __future__ import annotations

import asyncio
import time
import zlib

import httpx
import pytest

from gateway.config import SETTINGS
from tests.fake_engine import Behaviour
from tests.gateway.conftest import Serve, Served, until


async def test_predict_single_prompt_answers_a_string(served: Served) -> None:
    answer = await served.predict("什么是CUDA？")

    assert answer.status_code == 200
    assert answer.json() == {"response": "answer:什么是CUDA？"}


async def test_predict_single_prompt_as_list_answers_a_list_of_one(serve: Serve) -> None:
    async with serve(single_as_list=True) as served:
        assert (await served.predict("a")).json() == {"response": ["answer:a"]}


async def test_predict_list_keeps_length_and_order(served: Served) -> None:
    questions = [f"question {number}" for number in range(358)]

    answer = await served.predict(questions)

    assert answer.json() == {"response": [f"answer:{question}" for question in questions]}
    assert len(served.engine.calls) == 1


async def test_predict_reads_prompts_as_prompt(served: Served) -> None:
    answer = await served.client.post("/predict", json={"prompts": ["a", "b"]})

    assert answer.json() == {"response": ["answer:a", "answer:b"]}


async def test_predict_empty_list_answers_an_empty_list(served: Served) -> None:
    assert (await served.predict([])).json() == {"response": []}
    assert served.engine.calls == []


async def test_predict_many_prompts_are_cut_at_the_engines_cap(served: Served) -> None:
    questions = [f"q{number}" for number in range(3000)]

    answer = await served.predict(questions)

    assert answer.json()["response"] == [f"answer:{question}" for question in questions]
    assert sorted(len(call["prompt"]) for call in served.engine.calls) == [952, 1024, 1024]


async def test_predict_sends_token_ids_and_every_sampling_field(served: Served) -> None:
    await served.predict("a", max_tokens=7, temperature=0.5, top_p=0.9, top_k=3, stop="x", seed=1)

    call = served.engine.calls[0]
    assert all(isinstance(token, int) for token in call["prompt"][0])
    assert call["model"] == "fake"
    assert call["stop_token_ids"]
    assert {name: call[name] for name in ("max_tokens", "temperature", "top_p", "top_k")} == {
        "max_tokens": 7,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 3,
    }
    assert (call["stop"], call["seed"]) == (["x"], 1)


async def test_predict_defaults_are_greedy_and_come_from_settings(serve: Serve) -> None:
    async with serve(max_tokens=99) as served:
        await served.predict("a")

        call = served.engine.calls[0]
        assert (call["temperature"], call["max_tokens"], call["stop"]) == (0.0, 99, [])


async def test_predict_bad_prompts_cost_the_others_nothing(serve: Serve) -> None:
    engine = Behaviour(refuses=lambda question: "bad" in question)
    async with serve(engine) as served:
        prompts = [f"q{number}" for number in range(100)]
        prompts[3], prompts[50], prompts[51], prompts[70] = "", "bad one", "bad two", "长" * 4000

        answer = await served.predict(prompts)

        body = answer.json()
        assert answer.status_code == 200
        assert {index: error["code"] for index, error in body["errors"].items()} == {
            "3": "empty_prompt",
            "50": "engine_refused",
            "51": "engine_refused",
            "70": "prompt_too_long",
        }
        for index, text in enumerate(body["response"]):
            assert text == ("" if str(index) in body["errors"] else f"answer:q{index}")


async def test_predict_refused_sampling_is_one_error_for_all(serve: Serve) -> None:
    engine = Behaviour(refuses=lambda question: "q" in question, refused_field="temperature")
    async with serve(engine) as served:
        answer = await served.predict([f"q{number}" for number in range(2000)])

        assert (answer.status_code, answer.json()["error"]["param"]) == (400, "temperature")
        assert len(served.engine.calls) == 2


@pytest.mark.parametrize(
    ("prompt", "code"),
    [("", "empty_prompt"), (" \n", "empty_prompt"), ("长" * 4000, "prompt_too_long")],
)
async def test_predict_single_bad_prompt_is_an_error(
    served: Served, prompt: str, code: str
) -> None:
    answer = await served.predict(prompt)

    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == code
    assert answer.json()["error"]["param"] == "prompt"


async def test_predict_aborted_sequence_is_never_an_answer(serve: Serve) -> None:
    async with serve(Behaviour(aborts=lambda question: question == "b")) as served:
        body = (await served.predict(["a", "b"])).json()

        assert body["response"] == ["answer:a", ""]
        assert body["errors"]["1"]["code"] == "engine_aborted"
        assert body["errors"]["1"]["source"] == "engine"
        assert (await served.predict("b")).status_code == 502


@pytest.mark.parametrize(
    ("body", "param", "code"),
    [
        (b"not json", None, "invalid_json"),
        (b"[]", None, "invalid_type"),
        (b"{}", "prompt", "missing_field"),
        (b'{"prompt": 1}', "prompt", "invalid_type"),
        (b'{"prompt": null}', "prompt", "invalid_type"),
        (b'{"prompt": ["a", 1]}', "prompt[1]", "invalid_type"),
        (b'{"prompt": "a", "max_tokens": 0}', "max_tokens", "invalid_value"),
        (b'{"prompt": "a", "max_tokens": 1.5}', "max_tokens", "invalid_type"),
        (b'{"prompt": "a", "max_tokens": true}', "max_tokens", "invalid_type"),
        (b'{"prompt": "a", "max_tokens": 100000}', "max_tokens", "invalid_value"),
        (b'{"prompt": "a", "temperature": -1}', "temperature", "invalid_value"),
        (b'{"prompt": "a", "temperature": "hot"}', "temperature", "invalid_type"),
        (b'{"prompt": "a", "top_p": 0}', "top_p", "invalid_value"),
        (b'{"prompt": "a", "top_k": -2}', "top_k", "invalid_value"),
        (b'{"prompt": "a", "stop": [""]}', "stop", "invalid_value"),
        (b'{"prompt": "a", "stop": {}}', "stop", "invalid_type"),
        (b'{"prompt": "a", "seed": "x"}', "seed", "invalid_type"),
        (b'{"prompt": "a", "system": 1}', "system", "invalid_type"),
    ],
)
async def test_predict_bad_body_names_the_field(
    served: Served, body: bytes, param: str | None, code: str
) -> None:
    answer = await served.client.post("/predict", content=body)

    error = answer.json()["error"]
    assert answer.status_code == 400
    assert (error["param"], error["code"], error["source"]) == (param, code, "gateway")
    assert set(error) == {"message", "type", "code", "param", "source"}
    assert served.engine.calls == []


async def test_predict_unknown_field_is_named_in_a_header(served: Served) -> None:
    answer = await served.predict("a", max_token=3)

    assert answer.status_code == 200
    assert answer.headers["X-Ignored-Fields"] == "max_token"


async def test_predict_field_name_cannot_write_a_header(served: Served) -> None:
    body = {"prompt": "a", "x\r\nSet-Cookie: a": 1, "y" * 20_000: 1, "名": 1, "ok_name": 1}
    answer = await served.client.post("/predict", json=body)

    assert answer.status_code == 200
    assert answer.headers["X-Ignored-Fields"] == "ok_name"
    assert "Set-Cookie" not in answer.headers


async def test_predict_half_a_surrogate_costs_one_prompt(served: Served) -> None:
    answer = await served.client.post("/predict", content=b'{"prompt": ["a", "\\ud800", "b"]}')

    assert answer.json()["response"] == ["answer:a", "", "answer:b"]
    assert answer.json()["errors"]["1"]["code"] == "not_text"


async def test_predict_short_context_answers_with_what_it_has(serve: Serve) -> None:
    async with serve(Behaviour(max_model_len=128), max_tokens=256) as served:
        answer = await served.predict("hi")

        assert answer.json() == {"response": "answer:hi"}
        assert served.engine.calls[0]["max_tokens"] == 127


async def test_predict_broken_gzip_is_400(served: Served) -> None:
    answer = await served.client.post(
        "/predict", content=b"\x1f\x8bxxxx", headers={"Content-Encoding": "gzip"}
    )

    assert answer.status_code == 400


async def test_relay_schema_nested_deep_is_400(served: Served) -> None:
    """What is only passed on may be, see test_streaming.py; what is weighed may not."""
    nested = b"[" * 300 + b"]" * 300
    body = b'{"model":"fake","prompt":"a","stream":true,"response_format":%s}' % nested

    answer = await served.client.post("/v1/completions", content=body)

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_json")


async def test_predict_too_many_prompts_are_refused(serve: Serve) -> None:
    async with serve(max_prompts=10) as served:
        answer = await served.predict(["a"] * 11)

        assert answer.status_code == 400
        assert answer.json()["error"]["code"] == "too_many_prompts"


async def test_predict_body_over_the_limit_is_413(serve: Serve) -> None:
    async with serve(max_body_bytes=2048) as served:
        answer = await served.predict("a" * 4096)

        assert answer.status_code == 413
        assert answer.json()["error"]["code"] == "body_too_large"


@pytest.mark.parametrize(
    ("behaviour", "status", "code"),
    [
        ({"status": 500}, 502, "engine_failed"),
        ({"status": 404}, 502, "engine_failed"),
        ({"status": 503}, 503, "engine_busy"),
        ({"body": b"<html>"}, 502, "engine_garbled"),
        ({"body": b'{"choices": 1}'}, 502, "engine_garbled"),
        ({"drops_last_choice": True}, 502, "engine_garbled"),
        ({"cuts_connection": True}, 502, "engine_failed"),
    ],
)
async def test_predict_failing_engine_is_an_error_not_blanks(
    served: Served, behaviour: dict[str, object], status: int, code: str
) -> None:
    for name, value in behaviour.items():
        setattr(served.engine, name, value)

    answer = await served.predict(["a", "b"])

    assert (answer.status_code, answer.json()["error"]["code"]) == (status, code)
    assert answer.json()["error"]["source"] in {"engine", "gateway"}


async def test_predict_slow_engine_times_out(serve: Serve) -> None:
    async with serve(engine_timeout_s=0.5) as served:
        served.engine.delay_s = 30

        answer = await served.predict("a")

        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "engine_timeout")
        await until(lambda: served.engine.running == 0)


async def test_predict_gone_caller_cancels_the_engines_work(served: Served) -> None:
    served.engine.delay_s = 30
    call = asyncio.create_task(served.predict(list("abcde")))
    await until(lambda: served.engine.running == 5)

    call.cancel()

    await until(lambda: served.engine.running == 0, timeout_s=1)
    assert served.engine.cancelled == 5


async def test_predict_output_options_clean_the_answer(serve: Serve) -> None:
    async with serve(single_line=True) as served:
        assert (await served.predict("a\n\nb")).json()["response"] == "answer:a b"
    text = "<think>\nlong thought\n</think>\n\nb"
    async with serve() as served:
        answer = (await served.predict(text)).json()["response"]
        assert answer == "b"
    async with serve(strip_thinking=False) as served:
        assert "long thought" in (await served.predict(text)).json()["response"]


async def test_predict_over_the_gate_waits_and_then_is_refused(serve: Serve) -> None:
    async with serve(max_running=4, max_waiting=2, queue_timeout_s=0.3) as served:
        served.engine.delay_s = 1.0
        # Each counts for half of the places.
        first = [asyncio.create_task(served.predict(list(text))) for text in ("abcd", "ijkl")]
        await until(lambda: served.engine.running == 8)
        second = asyncio.create_task(served.predict(list("efgh")))
        await until(lambda: _metric(served, 'gateway_waiting_sequences{lane="batch"} 2.0'))

        third = await served.predict("c")

        assert (third.status_code, third.json()["error"]["code"]) == (429, "overloaded")
        assert third.headers["Retry-After"] == "1"
        assert (await second).json()["error"]["code"] == "queue_timeout"
        assert [(await one).status_code for one in first] == [200, 200]
        served.engine.delay_s = 0
        assert (await served.predict(list("abcdefghi"))).status_code == 200


async def _metric(served: Served, line: str) -> bool:
    return line in (await served.client.get("/metrics")).text


async def test_predict_answers_carry_id_and_timing(served: Served) -> None:
    given = await served.client.post(
        "/predict", json={"prompt": "a"}, headers={"X-Request-Id": "abc-1"}
    )
    made = await served.client.post(
        "/predict", json={"prompt": "a"}, headers={"X-Request-Id": "a b\tc"}
    )

    assert given.headers["X-Request-Id"] == "abc-1"
    assert len(made.headers["X-Request-Id"]) == 32
    names = [part.split(";")[0] for part in given.headers["Server-Timing"].split(", ")]
    assert names == ["queue", "engine", "gateway"]


async def test_predict_wrong_method_and_path_are_named(served: Served) -> None:
    wrong_method = await served.client.get("/predict")
    wrong_path = await served.client.get("/v1/nothing")

    assert (wrong_method.status_code, wrong_path.status_code) == (405, 404)
    assert wrong_method.headers["Allow"] == "POST"
    assert wrong_path.json()["error"]["code"] == "not_found"


async def test_predict_unreachable_engine_is_503(serve: Serve) -> None:
    async with serve(wait_ready=False, engines=("http://127.0.0.1:9",)) as served:
        answer = await served.predict("a")

        assert (answer.status_code, answer.json()["error"]["code"]) == (503, "not_ready")
        assert int(answer.headers["Retry-After"]) >= 1
        assert isinstance(answer, httpx.Response)


async def test_body_that_unfolds_to_gigabytes_is_refused_unfolded(served: Served) -> None:
    bomb = zlib.compress(b" " * 2**28, 9)
    headers = {"Content-Encoding": "deflate", "Content-Type": "application/json"}
    assert len(bomb) < served.app[SETTINGS].max_body_bytes // 100

    # Also where nobody reads the body.
    for path, status in (("/predict", 413), ("/nosuch", 404)):
        started = time.monotonic()
        answer = await served.client.post(path, content=bomb, headers=headers)
        assert answer.status_code == status
        assert time.monotonic() - started < 2


@pytest.mark.parametrize(("encoding", "window"), [("gzip", 31), ("deflate", 15)])
async def test_body_in_an_encoding_is_read(served: Served, encoding: str, window: int) -> None:
    packer = zlib.compressobj(wbits=window)
    body = packer.compress(b'{"prompt": "hi"}') + packer.flush()
    answer = await served.client.post(
        "/predict", content=body, headers={"Content-Encoding": encoding}
    )

    assert answer.json() == {"response": "answer:hi"}


@pytest.mark.parametrize(
    ("encoding", "body"), [("br", b"{}"), ("gzip", b"{}"), ("deflate", zlib.compress(b"{}")[:-2])]
)
async def test_body_in_an_encoding_that_it_has_not_is_400(
    served: Served, encoding: str, body: bytes
) -> None:
    answer = await served.client.post(
        "/predict", content=body, headers={"Content-Encoding": encoding}
    )

    assert (answer.status_code, answer.json()["error"]["code"]) == (400, "bad_encoding")


async def test_prompt_of_megabytes_is_refused_before_it_is_tokenised(served: Served) -> None:
    started = time.monotonic()
    answer = await served.predict(["hi", "什么 " * 2_000_000])

    assert answer.json()["response"] == ["answer:hi", ""]
    assert answer.json()["errors"]["1"]["code"] == "prompt_too_long"
    assert time.monotonic() - started < 2


async def test_prompt_of_megabytes_is_cut_where_that_is_asked_for(serve: Serve) -> None:
    async with serve(max_input_tokens=40) as served:
        started = time.monotonic()
        answer = await served.predict("a " * 3_000_000)

    assert answer.json()["response"].startswith("answer:a a")
    assert time.monotonic() - started < 2
