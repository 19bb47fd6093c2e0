"""What an engine may say that makes no sense: a clear 502, or an error as a stream's last event."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import orjson
import pytest

from gateway.admission.accounts import ACCOUNTS
from lab.fuzz.raw_http import RawAnswer, ask, build_request
from tests.gateway.conftest import Served
from tests.gateway.scripted_engine import (
    Call,
    Fault,
    ScriptedEngine,
    chunk,
    serve_scripted,
    stream_events,
    stream_head,
    whole_answer,
)

_LONGEST_ANSWER_S = 60.0
_DONE = b"data: [DONE]\n\n"


async def _ask(served: Served, path: str, **fields: Any) -> RawAnswer:
    body = {"model": "fake", "prompt": "a", "input": "a", **fields}
    if path in {"/v1/chat/completions", "/v1/messages"}:
        body |= {"messages": [{"role": "user", "content": "a"}]}
    request = build_request("POST", path, orjson.dumps(body))
    return await ask(served.url, request, timeout_s=_LONGEST_ANSWER_S)


def _answers(value: object) -> Fault:
    async def answer(call: Call) -> None:
        await call.send(whole_answer(orjson.dumps(value)))

    return answer


def _streams(*pieces: bytes, end: bytes = b"0\r\n\r\n") -> Fault:
    async def answer(call: Call) -> None:
        await call.send(stream_head() + b"".join(map(chunk, pieces)))
        await asyncio.sleep(0.02)  # or a broken end would come with the head
        await call.send(end)
        if end != b"0\r\n\r\n":
            call.writer.close()

    return answer


def _choice(index: int, text: object = "x") -> dict[str, Any]:
    return {"index": index, "text": text, "finish_reason": "stop"}


def _usage(taken: int, given: int) -> dict[str, Any]:
    message = {"content": "x"}
    return {
        "choices": [{**_choice(0), "message": message}],
        "usage": {"prompt_tokens": taken, "completion_tokens": given},
    }


@pytest.mark.parametrize(
    "answer",
    [
        {"choices": [_choice(0, None)]},
        {"choices": [_choice(0, 7)]},
        {"choices": [_choice(0), _choice(0)]},
        {"choices": [_choice(0), None]},
        _usage(-5, 3),
        _usage(5, -3),
        {"choices": [_choice(0)], "usage": "much"},
        {"choices": [_choice(0)], "usage": {"prompt_tokens": "7"}},
    ],
    ids=["null", "number", "doubled", "none", "taken", "given", "word", "text"],
)
async def test_predict_answer_that_makes_no_sense_is_a_502(
    tmp_path: Path, answer: dict[str, Any]
) -> None:
    async with serve_scripted(tmp_path, ScriptedEngine(usual=_answers(answer))) as served:
        got = await _ask(served, "/predict")

        used = served.app[ACCOUNTS].read_usage()["anonymous"]
        assert (got.status, orjson.loads(got.body)["error"]["code"]) == (502, "engine_garbled")
        assert (used.prompt_tokens, used.completion_tokens) == (0, 0)


@pytest.mark.parametrize("usage", [(-5, 3), (5, -3)])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_relayed_answer_with_negative_usage_is_a_502_and_credits_nobody(
    tmp_path: Path, path: str, usage: tuple[int, int]
) -> None:
    async with serve_scripted(tmp_path, ScriptedEngine(usual=_answers(_usage(*usage)))) as served:
        got = await _ask(served, path)

        used = served.app[ACCOUNTS].read_usage()["anonymous"]
        assert (got.status, orjson.loads(got.body)["error"]["code"]) == (502, "engine_garbled")
        assert (used.prompt_tokens, used.completion_tokens) == (0, 0)


async def test_stream_with_negative_usage_ends_in_an_error_and_credits_nobody(
    tmp_path: Path,
) -> None:
    told = b'data: {"choices":[],"usage":{"prompt_tokens":-9,"completion_tokens":2}}\n\n'
    engine = ScriptedEngine(usual=_streams(stream_events("answer:a")[0], told, _DONE))
    async with serve_scripted(tmp_path, engine) as served:
        got = await _ask(served, "/v1/chat/completions", stream=True)

        assert _read_error(got)["code"] == "engine_garbled"
        used = served.app[ACCOUNTS].read_usage()["anonymous"]
        assert min(used.prompt_tokens, used.completion_tokens) >= 0


_PIECE = b'data: {"choices": [{"index": 0, "delta": {"content": "answer:"}}]}\n\n'
_RESPONSE = b'event: response.output_text.delta\ndata: {"type":"response.output_text.delta"}\n\n'
_MESSAGE = b'event: content_block_delta\ndata: {"type":"content_block_delta"}\n\n'
_RESPONSE_OVER = b'event: response.completed\ndata: {"type":"response.completed"}\n\n'
_MESSAGE_OVER = b'event: message_stop\ndata: {"type":"message_stop"}\n\n'
_STREAMS = {
    "/v1/completions": (_PIECE, _DONE),
    "/v1/chat/completions": (_PIECE, _DONE),
    "/v1/responses": (_RESPONSE, _RESPONSE_OVER),
    "/v1/messages": (_MESSAGE, _MESSAGE_OVER),
}


@pytest.mark.parametrize("path", _STREAMS)
async def test_stream_that_ends_without_its_end_says_so(tmp_path: Path, path: str) -> None:
    piece, end = _STREAMS[path]
    faults = [_streams(piece), _streams(piece, end[:9]), _streams()]
    engine = ScriptedEngine(faults=faults)
    async with serve_scripted(tmp_path, engine) as served:
        for _ in range(3):
            got = await _ask(served, path, stream=True)
            assert _read_error(got)["code"] == "engine_failed"
            assert "without its end" in _read_error(got)["message"]
        metrics = (await served.client.get("/metrics")).text
        assert (
            f'gateway_errors_total{{code="engine_failed",route="{path}",source="engine"}} 3.0'
            in (metrics)
        )


@pytest.mark.parametrize("path", _STREAMS)
async def test_stream_that_ends_well_is_passed_on_as_it_is(tmp_path: Path, path: str) -> None:
    """However the engine cuts it, and without the last line break too."""
    piece, end = _STREAMS[path]
    whole = piece + end
    cuts = [
        _streams(piece, end),
        _streams(whole),
        _streams(whole[:-3], whole[-3:]),
        _streams(*(whole[n : n + 1] for n in range(len(whole)))),
        _streams(whole[:-2]),
    ]
    async with serve_scripted(tmp_path, ScriptedEngine(faults=cuts)) as served:
        for _ in cuts:
            got = await _ask(served, path, stream=True)
            assert got.body.rstrip() == whole.rstrip()


@pytest.mark.parametrize("end", [b"zz\r\nnonsense", b"-5\r\n", b"5\r\nabc"], ids=repr)
async def test_stream_with_a_broken_chunk_ends_in_an_error(tmp_path: Path, end: bytes) -> None:
    engine = ScriptedEngine(usual=_streams(_PIECE, end=end))
    async with serve_scripted(tmp_path, engine) as served:
        got = await _ask(served, "/v1/chat/completions", stream=True)

    assert _read_error(got)["code"] == "engine_failed"


async def test_answer_with_a_broken_chunk_is_a_502(tmp_path: Path) -> None:
    async def breaks(call: Call) -> None:
        head = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
        await call.send(head + b"Transfer-Encoding: chunked\r\n\r\n3\r\nabc\r\nzz\r\n")

    async with serve_scripted(tmp_path, ScriptedEngine(usual=breaks)) as served:
        for path in ("/v1/chat/completions", "/predict"):
            got = await _ask(served, path)
            assert (got.status, orjson.loads(got.body)["error"]["code"]) == (502, "engine_failed")


async def test_engine_that_switches_protocols_is_a_502_at_once(tmp_path: Path) -> None:
    async def switches(call: Call) -> None:
        await call.send(
            b"HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\n\r\n\x81\x05hello"
        )
        await call.wait_closed()

    async with serve_scripted(tmp_path, ScriptedEngine(usual=switches)) as served:
        async with asyncio.timeout(_LONGEST_ANSWER_S):
            answers = [await _ask(served, path) for path in ("/v1/chat/completions", "/predict")]

    for got in answers:
        assert (got.status, orjson.loads(got.body)["error"]["code"]) == (502, "engine_garbled")


def _read_error(answer: RawAnswer) -> dict[str, Any]:
    """The error that a stream ends with, whatever its dialect."""
    assert answer.status == 200
    events = [one for one in answer.body.decode().split("\n\n") if one and "[DONE]" not in one]
    lines = events[-1].split("\n")
    data = orjson.loads(lines[-1].removeprefix("data: "))
    found: dict[str, Any] = data.get("error") or data
    return found


def _page() -> Fault:
    """As of a proxy between, which thinks that all is well."""
    page = b"<html>502 Bad Gateway</html>"
    head = "HTTP/1.1 200 OK\r\nContent-Type: text/html; charset=utf-8\r\nContent-Length: "

    async def answer(call: Call) -> None:
        await call.send(head.encode() + b"%d\r\n\r\n" % len(page) + page)

    return answer


@pytest.mark.parametrize("fields", [{}, {"stream": True}], ids=["whole", "stream"])
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"])
async def test_page_of_html_is_no_answer(tmp_path: Path, path: str, fields: dict[str, Any]) -> None:
    async with serve_scripted(tmp_path, ScriptedEngine(usual=_page())) as served:
        got = await _ask(served, path, temperature=0.5, **fields)

    assert (got.status, orjson.loads(got.body)["error"]["code"]) == (502, "engine_garbled")


async def test_page_of_html_is_asked_again_where_the_answer_would_be_the_same(
    tmp_path: Path,
) -> None:
    engine = ScriptedEngine(faults=[_page()])
    async with serve_scripted(tmp_path, engine) as served:
        got = await _ask(served, "/v1/chat/completions", temperature=0)

    assert got.status == 200
    assert orjson.loads(got.body)["choices"]
    assert len(engine.calls) == 2
