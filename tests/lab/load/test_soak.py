"""The soak: what it says of a gateway that holds, and of three that do not."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path

import aiohttp
import pytest
from aiohttp import web

from lab.__main__ import run_command
from lab.intervals import Point
from lab.load import run_load
from lab.load.soak_slices import SoakSlice, read_slices, write_slices
from tests.fake_engine import serve_app
from tests.gateway.conftest import serve_gateway

pytestmark = pytest.mark.programs

Forward = Callable[[web.Request, bytes], Awaitable[web.Response]]


async def soak(url: str, known_questions: Path, *options: str) -> int:
    fixed = ["--url", url, "--status", "http://127.0.0.1:9"]  # nobody's
    fixed += ["--questions", str(known_questions), "--callers", "6"]
    words = [*fixed, "--duration", "1.5", *options]
    return await asyncio.to_thread(run_command, "load", run_load.main, words)


async def soak_through(
    known_questions: Path, answer: Callable[[web.Request, bytes, Forward], Awaitable[web.Response]]
) -> int:
    """With something between the callers and a gateway."""

    async def forward(request: web.Request, body: bytes) -> web.Response:
        url, headers = served.url + request.path, {"Content-Type": request.content_type}
        async with session.request(request.method, url, data=body, headers=headers) as reply:
            return web.Response(
                status=reply.status, body=await reply.read(), content_type=reply.content_type
            )

    async def handle(request: web.Request) -> web.Response:
        return await answer(request, await request.read(), forward)

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", handle)
    async with (
        serve_gateway() as served,
        aiohttp.ClientSession() as session,
        serve_app(app) as url,
    ):
        return await soak(url, known_questions)


async def test_soak_of_a_gateway_that_holds(
    known_questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record = tmp_path / "soak.json"
    async with serve_gateway() as served:
        assert await soak(served.url, known_questions, "--json", str(record)) == 0

    assert "all held" in capsys.readouterr().out
    figures = {row["name"]: row["value"] for row in json.loads(record.read_text())["figures"]}
    assert figures["requests"] > 20
    assert (figures["wrong answers"], figures["sums that did not add up"]) == (0, 0)


async def test_second_slice_counts_with_the_first(known_questions: Path, tmp_path: Path) -> None:
    record, slices = tmp_path / "soak.json", tmp_path / "slices.json"
    options = ("--slices", str(slices), "--record", str(record), "--pause", "0.02")
    requests, hours = [], []
    async with serve_gateway() as served:
        for _ in range(2):
            assert await soak(served.url, known_questions, *options) == 0
            written = json.loads(record.read_text())
            figures = {row["name"]: row["value"] for row in written["figures"]}
            requests.append(figures["requests"])
            hours.append(sum(one["seconds"] for one in json.loads(slices.read_text())))

    assert requests[1] > 1.2 * requests[0]
    assert hours[1] >= hours[0] + 1
    assert "in 2 slices" in written["about"]


async def test_slice_after_one_that_did_not_hold_does_not_hold_either(
    known_questions: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    record, slices = tmp_path / "soak.json", tmp_path / "slices.json"
    growing: list[Point] = [(60.0 * minute, 10.0 * minute) for minute in range(60)]
    earlier = SoakSlice(
        *("yesterday", "abc", 3600, {"chat: wrong": 7}, 0, [], ["7 requests wrong"]),
        lives={"gateway: memory_mb": [growing]},
    )
    write_slices([earlier], slices)
    options = ("--slices", str(slices), "--record", str(record))
    async with serve_gateway() as served:
        assert await soak(served.url, known_questions, *options) == 1

    out = capsys.readouterr().out
    assert "NOT HELD  yesterday: 7 requests wrong" in out
    assert "NOT HELD  gateway: memory_mb grows by" in out
    assert "2 did not hold" in out
    assert "all held" not in out
    figures = {row["name"]: row["value"] for row in json.loads(record.read_text())["figures"]}
    assert figures["sums that did not add up"] == 2
    assert [one.problems for one in read_slices(slices)] == [["7 requests wrong"], []]


async def test_soak_of_a_gateway_with_keys_brings_one_and_does_not_write_it_down(
    known_questions: Path, tmp_path: Path
) -> None:
    record = tmp_path / "soak.json"
    async with serve_gateway(api_keys=("sk-one",)) as served:
        options = ("--api-key", "sk-one", "--record", str(record))
        assert await soak(served.url, known_questions, *options) == 0

    assert "sk-one" not in record.read_text()


async def test_soak_sees_another_callers_answer(
    known_questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    last: list[web.Response] = []

    async def mix_up(request: web.Request, body: bytes, forward: Forward) -> web.Response:
        response = await forward(request, body)
        if request.path == "/v1/completions" and response.status == 200:
            last.append(response)
            if len(last) % 3 == 0:
                return web.Response(body=last[-2].body, content_type="application/json")
        return response

    assert await soak_through(known_questions, mix_up) == 1
    out = capsys.readouterr().out
    assert "requests wrong" in out
    assert "asked number-" in out


async def test_soak_sees_a_request_that_was_made_twice(
    known_questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def repeat(request: web.Request, body: bytes, forward: Forward) -> web.Response:
        if request.path == "/tokenize":
            await forward(request, body)
        return await forward(request, body)

    assert await soak_through(known_questions, repeat) == 1
    assert "NOT HELD  /tokenize: " in capsys.readouterr().out


async def test_soak_sees_errors_where_no_fault_was(
    known_questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def refuse(request: web.Request, body: bytes, forward: Forward) -> web.Response:
        if request.path == "/detokenize":
            return web.json_response({"error": {"message": "no"}}, status=503)
        return await forward(request, body)

    assert await soak_through(known_questions, refuse) == 1
    assert "requests failed" in capsys.readouterr().out


async def test_soak_of_a_model_that_knows_nothing_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "questions.jsonl"
    path.write_text('{"question": "q", "answer": "something else"}\n', encoding="utf-8")
    async with serve_gateway() as served:
        assert await soak(served.url, path) == 1

    assert "load: the model knows 0 of the 1 answers" in capsys.readouterr().err


async def test_soak_without_a_gateway_says_so(
    known_questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert await soak("http://127.0.0.1:9", known_questions) == 2
    assert "is the gateway running" in capsys.readouterr().err


@pytest.mark.parametrize("body", [b"<html>", b"null", b'{"data": []}', b"[" * 200_000])
async def test_soak_of_something_else_than_a_gateway_says_so(
    known_questions: Path, capsys: pytest.CaptureFixture[str], body: bytes
) -> None:
    async def answer(_request: web.Request) -> web.Response:
        return web.Response(body=body, content_type="application/json")

    app = web.Application()
    app.router.add_route("*", "/{path:.*}", answer)
    async with serve_app(app) as url:
        assert await soak(url, known_questions) == 2
    assert "does not answer as a gateway" in capsys.readouterr().err


async def test_soak_counts_answers_of_another_shape_as_wrong(
    known_questions: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    async def misshape(request: web.Request, body: bytes, forward: Forward) -> web.Response:
        answer = await forward(request, body)
        is_single = request.path == "/predict" and isinstance(json.loads(body)["prompt"], str)
        return web.json_response({"response": None}) if is_single else answer

    async def answer(request: web.Request, body: bytes, forward: Forward) -> web.Response:
        try:
            return await misshape(request, body, forward)
        except ValueError:  # of a body that is no JSON on purpose
            return await forward(request, body)

    assert await soak_through(known_questions, answer) == 1
    said = capsys.readouterr().out
    assert "predict one: wrong: TypeError" in said
    assert "requests wrong" in said


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        (("--url", "nonsense"), "--url/--server-url: nonsense is no http address"),
        (("--callers", "0"), "0 is no whole number from 1 on"),
        (("--duration", "nan"), "nan is no time in seconds"),
    ],
)
def test_soak_refuses_options_that_mean_nothing(
    capsys: pytest.CaptureFixture[str], options: tuple[str, ...], complaint: str
) -> None:
    with pytest.raises(SystemExit) as caught:
        run_load.parse_arguments(options)
    assert caught.value.code == 2
    assert complaint in capsys.readouterr().err


async def test_soak_without_questions_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    assert await soak("http://127.0.0.1:9", Path("/nowhere")) == 2
    assert capsys.readouterr().err == "load: /nowhere: No such file or directory\n"
