"""Streams: bytes as they come, honest about failures, no caller can hold the others up."""

from __future__ import annotations

import asyncio
import json
import time

import httpx
import openai
import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.engines.event_stream import UnfinishedEvent
from gateway.engines.pool import POOL
from gateway.errors import EngineError
from gateway.schemas.openai import build_stream_error, name_stream_errors, parse_usage
from tests.fake_engine import Behaviour
from tests.gateway.conftest import Serve, Served, until
from tests.plain_http import NO_TLS

CHAT = {"model": "fake", "messages": [{"role": "user", "content": "hi"}], "stream": True}


async def test_stream_equals_the_engines_bytes(served: Served) -> None:
    body = CHAT | {"stream_options": {"include_usage": True}}
    async with httpx.AsyncClient(verify=NO_TLS) as client:
        direct = await client.post(f"{served.engine_url}/v1/chat/completions", json=body)

    through = await served.client.post("/v1/chat/completions", json=body)

    assert through.content == direct.content
    assert b'"usage"' in through.content


async def test_stream_hides_usage_that_nobody_asked_for(served: Served) -> None:
    async with httpx.AsyncClient(verify=NO_TLS) as client:
        direct = await client.post(f"{served.engine_url}/v1/chat/completions", json=CHAT)

    through = await served.client.post("/v1/chat/completions", json=CHAT)

    assert through.content == direct.content
    assert served.engine.calls[-1]["stream_options"] == {"include_usage": True}


def _time_event(size: int) -> float:
    """Of the processor, for one event of so many bytes that comes in pieces of 16 KiB."""
    piece, rest = b"x" * 2**14, UnfinishedEvent()
    began = time.process_time()
    for _ in range(size // len(piece)):
        assert rest.complete(piece) == b""
    assert len(rest.complete(b"\n\ndata: ")) == size + 2
    assert rest.take() == b"data: "
    return time.process_time() - began


def test_event_of_many_pieces_takes_time_by_its_size() -> None:
    """Put together anew with each, four times as large would be sixteen times as long."""
    small, large = (min(_time_event(size) for _ in range(3)) for size in (2**23, 2**25))

    assert large < 10 * small


@given(pieces=st.lists(st.sampled_from([b"\n", b"\r\n", b"\r", b"a", b"\n\n", b"b\r\n\r"])))
def test_events_are_cut_as_if_put_together_anew(pieces: list[bytes]) -> None:
    event, rest = UnfinishedEvent(), b""
    for piece in pieces:
        rest += piece
        ends = [rest.rfind(mark) + len(mark) for mark in (b"\n\n", b"\r\n\r\n") if mark in rest]
        whole, rest = rest[: max(ends, default=0)], rest[max(ends, default=0) :]

        assert event.complete(piece) == whole
        assert event.is_there == bool(rest)
    assert event.take() == rest


async def test_stream_cut_by_the_engine_ends_in_one_error_event(served: Served) -> None:
    served.engine.stream_cut_after = 3

    answer = await served.client.post("/v1/chat/completions", json=CHAT)

    events = answer.text.strip().split("\n\n")
    assert answer.status_code == 200
    assert len(events) == 5
    error = orjson.loads(events[3].removeprefix("data: "))["error"]
    assert (error["code"], error["source"]) == ("engine_failed", "engine")
    assert events[4] == "data: [DONE]"


async def test_stream_cut_raises_in_the_sdk(served: Served) -> None:
    served.engine.stream_cut_after = 3
    async with openai.AsyncOpenAI(
        base_url=f"{served.url}/v1", api_key="none", max_retries=0
    ) as client:
        stream = await client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        with pytest.raises(openai.APIError, match="broke the connection off"):
            async for _ in stream:
                pass


async def test_stream_in_silence_gets_comments_that_clients_skip(serve: Serve) -> None:
    engine = Behaviour(stream_gap_s=0.25)
    async with serve(engine, keepalive_comment_s=0.1) as served:
        answer = await served.client.post("/v1/chat/completions", json=CHAT)

        assert answer.text.count(": keep-alive\n\n") >= 9
        data = [line for line in answer.text.split("\n\n") if line.startswith("data: {")]
        assert len(data) == len("answer:hi")


async def test_stream_silent_for_too_long_is_an_error(serve: Serve) -> None:
    async with serve(keepalive_comment_s=0.1, stream_idle_timeout_s=0.3) as served:
        served.engine.stream_gap_s = 30

        answer = await served.client.post("/v1/chat/completions", json=CHAT)

        assert '"code":"engine_timeout"' in answer.text
        await until(lambda: served.engine.running == 0)


async def test_stream_gone_caller_frees_the_engine_at_once(served: Served) -> None:
    served.engine.stream_gap_s = 0.2
    async with served.client.stream("POST", "/v1/chat/completions", json=CHAT) as answer:
        async for _ in answer.aiter_bytes():
            break

    await until(lambda: served.engine.running == 0, timeout_s=1)


async def test_stream_reader_who_takes_nothing_is_given_up(serve: Serve) -> None:
    """Nothing is queued for them: the engine is held back, then their stream is ended."""
    async with serve(client_write_timeout_s=0.5, max_bytes_per_token=1000) as served:
        content = "x" * 200_000
        host, port = served.url.removeprefix("http://").split(":")
        body = orjson.dumps(CHAT | {"messages": [{"role": "user", "content": content}]})
        reader, writer = await asyncio.open_connection(host, int(port), limit=1024)
        writer.write(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\n"
            + f"Content-Length: {len(body)}\r\n\r\n".encode()
            + body
        )
        await until(lambda: served.engine.running == 1)

        await until(lambda: served.engine.running == 0, timeout_s=15)

        writer.close()
        assert (await served.predict("still here")).status_code == 200
        assert reader is not None


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"n": 1000}, "n"),
        ({"best_of": 1000}, "best_of"),
        ({"n": "500"}, "n"),
        ({"n": 500.0}, "n"),
        ({"logprobs": "99"}, "logprobs"),
        ({"logprobs": 100}, "logprobs"),
        ({"logprobs": -1}, "logprobs"),
        ({"prompt_logprobs": -1}, "prompt_logprobs"),
        ({"max_tokens": 2**31}, "max_tokens"),
        ({"max_completion_tokens": 1e9}, "max_completion_tokens"),
        ({"prompt": ["a"] * 1025}, "prompt"),
        ({"input": ["a"] * 1025}, "prompt"),
        ({"stop": ["x"] * 5}, "stop"),
        ({"stop": "x" * 20_000}, "stop"),
        ({"response_format": {"schema": "x" * 70_000}}, "response_format"),
        ({"model": 3}, "model"),
        ({"stream": "maybe"}, "stream"),
        ({"stream": 2}, "stream"),
        ({"stream": []}, "stream"),
        ({"max_tokens": "many"}, "max_tokens"),
        ({"max_tokens": 5.5}, "max_tokens"),
        ({"max_tokens": "9" * 12}, "max_tokens"),
        (
            {"stream": True, "stream_options": {"include_usage": "maybe"}},
            "stream_options.include_usage",
        ),
    ],
)
async def test_dangerous_field_is_bounded(
    served: Served, fields: dict[str, object], param: str
) -> None:
    body = {"model": "fake", "prompt": "a"} | fields

    answer = await served.client.post("/v1/completions", json=body)

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert served.engine.calls == []


async def test_priority_of_the_caller_does_not_reach_the_engine(served: Served) -> None:
    await served.client.post(
        "/v1/completions",
        json={"model": "fake", "prompt": "a", "priority": -5, "top_k": 3},
        headers={"X-Vllm-Priority": "-5", "X-Data-Parallel-Rank": "1"},
    )

    assert served.engine.calls[-1] == {"model": "fake", "prompt": "a", "top_k": 3}
    names = {name.lower() for name in served.engine.headers[-1]}
    assert not names & {"x-vllm-priority", "x-data-parallel-rank"}


async def test_alias_stands_for_a_model(serve: Serve) -> None:
    async with serve(aliases=("gpt-4o=fake",)) as served:
        body = {"model": "gpt-4o", "messages": CHAT["messages"]}
        answer = await served.client.post("/v1/chat/completions", json=body)
        models = (await served.client.get("/v1/models")).json()["data"]

        assert answer.status_code == 200
        assert served.engine.calls[-1]["model"] == "fake"
        assert [model["id"] for model in models] == ["fake", "gpt-4o"]


async def test_body_that_never_ends_is_408(serve: Serve) -> None:
    async with serve(body_timeout_s=0.3) as served:
        host, port = served.url.removeprefix("http://").split(":")
        reader, writer = await asyncio.open_connection(host, int(port))
        writer.write(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")

        status = await asyncio.wait_for(reader.readline(), 5)

        assert b" 408 " in status
        writer.close()


async def test_deadline_that_has_passed_is_504_and_frees_the_engine(served: Served) -> None:
    served.engine.delay_s = 5

    answer = await served.client.post(
        "/predict", json={"prompt": "a"}, headers={"X-Deadline-Ms": "300"}
    )

    assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_passed")
    await until(lambda: served.engine.running == 0)


async def test_deadline_holds_while_no_engine_is_ready(serve: Serve) -> None:
    async with serve(restart_hold_s=20) as served:
        served.engine.is_healthy = False
        await until(lambda: not served.app[POOL].is_ready)
        headers, started = {"X-Deadline-Ms": "200"}, time.monotonic()
        chat = {"model": "fake", "messages": [{"role": "user", "content": "a"}]}

        for url, body in (("/predict", {"prompt": "a"}), ("/v1/chat/completions", chat)):
            answer = await served.client.post(url, json=body, headers=headers)
            code = answer.json()["error"]["code"]
            assert (answer.status_code, code) == (504, "deadline_passed")
        assert time.monotonic() - started < 3


_SOON = {"X-Deadline-Ms": "200"}


async def test_deadline_before_the_engine_is_back_is_refused_at_once(serve: Serve) -> None:
    async with serve(restart_hold_s=20) as served:
        pool = served.app[POOL]
        pool.engines[0].typical_start_s = 40.0
        served.engine.is_healthy = False
        await until(lambda: not pool.is_ready)
        chat = {"model": "fake", "messages": [{"role": "user", "content": "a"}]}

        # Perhaps it has only missed a look: who knows yet that it must start?
        held = await served.client.post("/predict", json={"prompt": "a"}, headers=_SOON)
        assert (held.status_code, held.json()["error"]["code"]) == (504, "deadline_passed")

        pool.engines[0].down_since -= 4
        started = time.monotonic()
        for url, body in (("/predict", {"prompt": "a"}), ("/v1/chat/completions", chat)):
            answer = await served.client.post(url, json=body, headers={"X-Deadline-Ms": "9000"})
            code = answer.json()["error"]["code"]
            assert (answer.status_code, code) == (503, "deadline_unreachable")
            assert 35 <= int(answer.headers["Retry-After"]) <= 40
        assert time.monotonic() - started < 3

        # By what was learnt the engine should be back: then waiting is worth it.
        pool.engines[0].down_since -= 36
        waiting = asyncio.create_task(
            served.client.post("/predict", json={"prompt": "a"}, headers={"X-Deadline-Ms": "9000"})
        )
        await asyncio.sleep(0.1)
        served.engine.is_healthy = True
        assert (await waiting).status_code == 200


async def test_deadline_in_mid_stream_ends_it_as_a_stream(served: Served) -> None:
    served.engine.stream_gap_s = 0.2

    answer = await served.client.post(
        "/v1/chat/completions", json=CHAT, headers={"X-Deadline-Ms": "500"}
    )

    events = answer.text.strip().split("\n\n")
    assert '"code":"deadline_passed"' in events[-2]
    assert events[-1] == "data: [DONE]"
    assert "HTTP/1.1" not in answer.text


async def test_callers_who_hang_up_are_no_failures_of_the_engine(served: Served) -> None:
    served.engine.stream_gap_s = 0.02
    host, port = served.url.removeprefix("http://").split(":")
    body = orjson.dumps(CHAT | {"messages": [{"role": "user", "content": "x" * 100}]})
    for _ in range(12):
        _, writer = await asyncio.open_connection(host, int(port))
        head = (
            f"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await until(lambda: served.engine.running == 1)
        await asyncio.sleep(0.05)
        writer.transport.abort()
        await until(lambda: served.engine.running == 0)
        assert served.app[POOL].engines[0].is_usable

    assert (await served.predict("fine")).status_code == 200


@pytest.mark.parametrize(
    ("header", "value"), [("X-Deadline-Ms", "soon"), ("X-Priority", "highest")]
)
async def test_bad_header_is_named(served: Served, header: str, value: str) -> None:
    answer = await served.client.post("/predict", json={"prompt": "a"}, headers={header: value})

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, header)


def test_stream_error_of_the_engine_itself_is_named() -> None:
    event = b'data: {"error":{"message":"core died","code":500}}\n\ndata: [DONE]\n\n'
    named = event.replace(b"500}", b'500,"source":"engine"}')
    assert name_stream_errors(event) == (named, True)
    assert name_stream_errors(event.replace(b"500", b"400"))[1] is False
    assert name_stream_errors(b"data: {}\n\n") == (b"data: {}\n\n", False)


@pytest.mark.parametrize("route", ["/v1/responses", "/v1/responses/{id}"])
def test_stream_error_of_a_response_is_of_the_type_that_its_sdk_knows(route: str) -> None:
    event = build_stream_error(EngineError("it broke"), route, 7)

    data = orjson.loads(event.partition(b"data: ")[2])
    assert (data["type"], data["sequence_number"]) == ("error", 7)
    assert (data["code"], data["message"]) == ("engine_failed", "it broke")


def test_usage_of_a_response_is_its_own_and_not_what_it_repeats() -> None:
    tool = b'"tools":[{"usage":{"input_tokens":1000,"output_tokens":1000}}]'
    begin = b'event: response.created\ndata: {"type":"response.created","response":{"object":'
    begin += b'"response",' + tool + b',"usage":null}}\n\n'
    end = begin.replace(b"created", b"completed")
    end = end.replace(b'"usage":null', b'"usage":{"input_tokens":3,"output_tokens":4}')

    assert parse_usage(begin) is None
    assert parse_usage(end) == (3, 4)


@pytest.mark.parametrize(
    "options",
    [None, {}, {"continuous_usage_stats": True}, {"include_usage": 0}, {"include_usage": "no"}],
)
async def test_stream_without_usage_is_the_engines_to_the_byte(
    served: Served, options: dict[str, object] | None
) -> None:
    """Fingerprint and all, though the engine is asked for its usage for the gateway's sake."""
    body = CHAT if options is None else CHAT | {"stream_options": options}
    quiet = CHAT | {"stream_options": {}}
    async with httpx.AsyncClient(verify=NO_TLS) as client:
        direct = await client.post(f"{served.engine_url}/v1/chat/completions", json=quiet)

    through = await served.client.post("/v1/chat/completions", json=body)

    assert through.content == direct.content
    assert through.text.count("vllm-fake") == 1
    assert b'"usage"' not in through.content


@pytest.mark.parametrize(
    ("fields", "sent"),
    [
        ({"max_tokens": 5.0}, {"max_tokens": 5}),
        ({"max_tokens": "5"}, {"max_tokens": 5}),
        ({"n": "2", "top_logprobs": 3.0}, {"n": 2, "top_logprobs": 3}),
        ({"stream": 0}, {"stream": False}),
        ({"stream": "off"}, {"stream": False}),
        ({"stop": "x" * 1000}, {"stop": "x" * 1000}),
        ({"logprobs": 5, "best_of": None}, {"logprobs": 5, "best_of": None}),
    ],
)
async def test_value_that_the_engine_takes_is_taken(
    served: Served, fields: dict[str, object], sent: dict[str, object]
) -> None:
    answer = await served.client.post("/v1/completions", json={"prompt": "a"} | fields)

    assert answer.status_code == 200
    assert served.engine.calls[-1] == {"prompt": "a"} | sent


async def test_number_of_copies_is_nobodys_where_it_means_nothing(served: Served) -> None:
    body = {"model": "fake", "input": ["a", "b"], "n": 5000, "best_of": "x"}

    answer = await served.client.post("/v1/embeddings", json=body)

    assert answer.status_code == 200
    assert served.engine.calls[-1] == body


async def test_logprobs_without_a_bound_are_the_engines_affair(serve: Serve) -> None:
    async with serve(max_logprobs=-1) as served:
        await served.client.post("/v1/completions", json={"prompt": "a", "top_logprobs": -1})

        assert served.engine.calls[-1]["top_logprobs"] == -1


@pytest.mark.parametrize("stream", [True, 1])
async def test_stream_of_a_body_nested_deep_is_passed_on(served: Served, stream: object) -> None:
    """Deeper than the writer of JSON goes: what is nested is copied, not written anew."""
    deep: object = 1
    for _ in range(300):
        deep = [deep]
    body = {"prompt": "a", "metadata": deep, "stream": stream}
    text = json.dumps(body).encode()

    answer = await served.client.post("/v1/completions", content=text)

    assert answer.text.endswith("data: [DONE]\n\n")
    assert served.engine.calls[-1]["metadata"] == deep
    assert served.engine.calls[-1]["stream"] is True


async def test_byte_order_mark_before_a_body_is_nothing(served: Served) -> None:
    body = b"\xef\xbb\xbf" + orjson.dumps({"prompt": "a"})

    through = await served.client.post("/v1/completions", content=body)
    predicted = await served.client.post("/predict", content=body)

    assert (through.status_code, predicted.status_code) == (200, 200)


@pytest.mark.parametrize(("size", "status"), [(8_192, 200), (32_000, 200), (40_000, 400)])
async def test_header_field_may_be_long(served: Served, size: int, status: int) -> None:
    answer = await served.client.get("/readyz", headers={"Cookie": "a" * size})

    assert answer.status_code == status
