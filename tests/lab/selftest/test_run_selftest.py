"""The self-test: what passes passes, and each check fails for what it is there for."""

from __future__ import annotations

import asyncio
import itertools
import json
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from lab.records.record import read_record
from lab.selftest import contract_checks as contract
from lab.selftest import run_selftest as selftest
from lab.selftest.checked_gateway import open_gateway
from lab.selftest.contract_checks import _REFUSED_PLACES, CONTRACT_CHECKS
from lab.selftest.run_selftest import CHECKS, CheckOutcome, perform
from tests.fake_engine import Behaviour, serve_app
from tests.gateway.conftest import serve_gateway

pytestmark = pytest.mark.programs

ROOT = Path(__file__).parents[3]
Handler = Callable[[Any], tuple[int, Any]]
_NOBODY = "http://127.0.0.1:9"


def ask_one(url: str, name: str, status_url: str = _NOBODY) -> CheckOutcome:
    with open_gateway(url, status_url, "") as gateway:
        return perform(name, dict(CHECKS)[name], gateway)


async def check(url: str, name: str, status_url: str = _NOBODY) -> CheckOutcome:
    return await asyncio.to_thread(ask_one, url, name, status_url)


@pytest.mark.parametrize("name", [name for name, _ in CONTRACT_CHECKS])
async def test_contract_holds_at_the_gateway(name: str) -> None:
    async with serve_gateway(Behaviour(delay_s=0.2)) as served:
        outcome = await check(served.url, name)

    assert outcome.passed, outcome.text


@pytest.mark.parametrize(
    "name", ["tokenisation", "simple inference", "detokenisation", "batch inference"]
)
async def test_engine_checks_pass_where_the_stand_in_engine_is_right(name: str) -> None:
    async with serve_gateway() as served:
        outcome = await check(served.url, name)

    assert outcome.passed, outcome.text


async def test_sampling_without_chance_is_seen() -> None:
    """The stand-in gives one answer whatever the temperature."""
    async with serve_gateway() as served:
        outcome = await check(served.url, "sampling strategies")

    assert not outcome.passed
    assert "six seeds gave one and the same answer" in outcome.text


async def test_stream_that_is_cut_is_seen() -> None:
    async with serve_gateway(Behaviour(stream_cut_after=3)) as served:
        outcome = await check(served.url, "streaming")

    assert not outcome.passed


async def test_lost_choice_is_seen() -> None:
    async with serve_gateway(Behaviour()) as served:
        served.engine.drops_last_choice = True
        outcome = await check(served.url, "batch inference")

    assert not outcome.passed
    assert "indexes [0, 1, 2, 3, 4, 5, 6]" in outcome.text


async def test_broken_engine_fails_the_check_and_not_the_program() -> None:
    async with serve_gateway(Behaviour()) as served:
        served.engine.status = 500
        outcome = await check(served.url, "simple inference")

    assert not outcome.passed
    assert outcome.text.startswith("InternalServerError")


async def test_load_time_comes_from_the_launcher() -> None:
    async def status(_request: web.Request) -> web.Response:
        return web.json_response({"engine": {"state": "ready", "start_seconds": 12.34}})

    app = web.Application()
    app.router.add_get("/status", status)
    async with serve_gateway() as served, serve_app(app) as status_url:
        known = await check(served.url, "model loading", status_url)
        unknown = await check(served.url, "model loading")

    assert known.text == "fake, loaded in 12.3 s"
    assert known.figures == {"load_s": 12.34}
    assert "no launcher answers" in unknown.text


def build_server(handler: Handler) -> web.Application:
    """A server whose POST /predict is the handler."""

    async def models(_request: web.Request) -> web.Response:
        return web.json_response({"object": "list", "data": [{"id": "any", "object": "model"}]})

    async def predict(request: web.Request) -> web.Response:
        status, body = handler((await request.json())["prompt"])
        return web.json_response(body, status=status)

    async def root(_request: web.Request) -> web.Response:
        return web.json_response({"status": "batch"})

    app = web.Application(client_max_size=2**28)
    app.router.add_get("/", root)
    app.router.add_get("/v1/models", models)
    app.router.add_post("/predict", predict)
    return app


def answer(prompt: Any) -> tuple[int, Any]:
    """As the contract wants it."""
    if isinstance(prompt, str):
        return (400, {"error": {"message": "long"}}) if len(prompt) > 1000 else _say("fine")
    errors = {str(n): "bad" for n, one in enumerate(prompt) if not 0 < len(one) < 1000}
    texts = ["" if str(n) in errors else "fine" for n in range(len(prompt))]
    return 200, {"response": texts, "errors": errors}


def _say(response: Any, **others: Any) -> tuple[int, Any]:
    return 200, {"response": response, **others}


def cut(prompt: Any) -> tuple[int, Any]:
    """Only what one call of the engine takes."""
    return answer(prompt[:1024] if isinstance(prompt, list) else prompt)


def move(prompt: Any) -> tuple[int, Any]:
    """The errors of the second piece, counted from its own start."""
    status, body = answer(prompt)
    errors = body.get("errors", {})
    return status, {**body, "errors": {str(int(n) % 1024): why for n, why in errors.items()}}


def drown(prompt: Any) -> tuple[int, Any]:
    """One bad prompt spoils the list."""
    status, body = answer(prompt)
    return (400, {"error": {"message": "bad"}}) if body.get("errors") else (status, body)


@pytest.mark.parametrize(
    ("name", "handler", "complaint"),
    [
        ("empty list", lambda _: (400, {"error": {}}), "400: "),
        ("empty list", lambda _: _say([""]), "1 answers to 0 prompts"),
        ("empty list", lambda _: _say(""), "no list of texts"),
        ("one prompt", lambda p: _say({"text": p}), "the answer is {"),
        ("one prompt", lambda p: _say("a" if isinstance(p, str) else ["b"]), "differently"),
        ("unicode", lambda p: _say([one for one in p if one.isprintable()]), "answers to 7"),
        ("unicode", lambda p: _say([""] * len(p)), "the last text has an empty answer"),
        ("1,025 prompts", cut, "1024 answers to 1025 prompts"),
        ("1,025 prompts", move, "errors are at [0, 511, 1023]"),
        ("1,025 prompts", lambda p: _say([""] * len(p)), "1021 of 1025 answers are empty"),
        ("over-long", lambda p: (500, {"error": {"message": p[:3]}}), "alone it is answered 500"),
        ("over-long", lambda _: _say(""), "neither an answer nor an error"),
        ("over-long", lambda _: (400, {"detail": "no"}), "without a reason"),
        ("over-long", drown, "400: "),
        ("disconnect", answer, "no gateway_running_sequences"),
    ],
)
async def test_broken_contract_is_seen(name: str, handler: Handler, complaint: str) -> None:
    async with serve_app(build_server(handler)) as url:
        outcome = await check(url, name)

    assert not outcome.passed
    assert complaint in outcome.text


async def test_server_that_works_on_for_nobody_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contract, "_FREED_WITHIN_S", 0.3)
    app = build_server(answer)
    looks = itertools.count()

    async def metrics(_request: web.Request) -> web.Response:
        running = 400 if next(looks) else 0
        return web.Response(text=f'gateway_running_sequences{{lane="batch"}} {running}.0\n')

    app.router.add_get("/metrics", metrics)
    async with serve_app(app) as url:
        outcome = await check(url, "disconnect")

    assert outcome.text == "400 sequences run on 0 s later"


@pytest.mark.parametrize("name", [name for name, _ in CONTRACT_CHECKS if name != "disconnect"])
async def test_contract_of_the_server_above_holds(name: str) -> None:
    """So that it fails for its fault alone."""
    async with serve_app(build_server(answer)) as url:
        outcome = await check(url, name)

    assert outcome.passed, outcome.text
    assert 1024 in _REFUSED_PLACES


async def run(*options: str) -> tuple[int, str, str]:
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "lab", "selftest", *options),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    out, err = await process.communicate()
    assert process.returncode is not None
    return process.returncode, out.decode(), err.decode()


async def test_program_prints_a_line_a_check_and_json(tmp_path: Path) -> None:
    file = tmp_path / "outcomes.json"
    async with serve_gateway(Behaviour(delay_s=0.2)) as served:
        code, out, _ = await run(
            *("--server-url", served.url, "--status-url", _NOBODY, "--json", str(file)),
            *("--only", "list", "one prompt", "sampling"),
        )

    lines = out.splitlines()
    assert code == 1
    assert [line[:4] for line in lines[:-1]] == ["FAIL", "ok  ", "ok  "]
    assert lines[-1] == "2 of 3 passed"
    packed = json.loads(file.read_text(encoding="utf-8"))
    assert packed["passed"] is False
    assert [one["name"] for one in packed["checks"]] == [
        "sampling strategies",
        "empty list",
        "one prompt",
    ]


async def test_program_prints_json_alone_where_it_is_wanted() -> None:
    async with serve_app(build_server(answer)) as url:
        code, out, err = await run("--server-url", url, "--only", "empty", "--json", "-")

    assert code == 0
    assert json.loads(out)["passed"] is True
    assert "1 of 1 passed" in err


async def test_program_keeps_a_record_without_the_key(tmp_path: Path) -> None:
    file = tmp_path / "record.json"
    async with serve_app(build_server(answer)) as url:
        code, _, err = await run(
            *("--server-url", url, "--only", "empty", "1,025", "--record", str(file)),
            *("--api-key", "sk-secret"),
        )

    assert code == 0, err
    record = read_record(file)
    assert [figure.unit for figure in record.figures] == ["of 2", "s"]
    assert "sk-secret" not in file.read_text(encoding="utf-8")
    assert "--api-key …" in record.command


async def test_program_without_a_server_says_so() -> None:
    code, _, err = await run("--server-url", _NOBODY)

    assert code == 3
    assert err.startswith(f"selftest: {_NOBODY}/v1/models: ")
    assert "Traceback" not in err


@pytest.mark.parametrize("body", [b"<html>", b"null", b'{"data": []}', b"[" * 200_000])
async def test_program_before_something_else_than_a_gateway_says_so(body: bytes) -> None:
    app = web.Application()
    app.router.add_route("*", "/{path:.*}", _always(body))
    async with serve_app(app) as url:
        code, _, err = await run("--server-url", url)

    assert code == 3
    assert err.startswith(f"selftest: {url}/v1/models: CheckFailed: ")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("body", [b"<html>", b'{"choices": [{}], "response": 7}', b"[" * 200_000])
async def test_program_survives_every_answer(body: bytes) -> None:
    app = web.Application(client_max_size=2**28)
    app.router.add_get("/v1/models", _always(b'{"data": [{"id": "m", "max_model_len": "x"}]}'))
    app.router.add_route("*", "/{path:.*}", _always(body))
    async with serve_app(app) as url:
        code, out, err = await run("--server-url", url, "--status-url", _NOBODY)

    assert (code, err) == (1, "")
    assert len(out.splitlines()) == len(selftest.CHECKS) + 1
    assert out.splitlines()[-1] == "1 of 14 passed"


def _always(body: bytes) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(request: web.Request) -> web.Response:
        await request.read()
        return web.Response(body=body, content_type="application/json")

    return answer


async def test_program_says_at_once_what_it_cannot_write(tmp_path: Path) -> None:
    code, _, err = await run("--server-url", _NOBODY, "--json", str(tmp_path))

    assert code == 2
    assert err == f"selftest: cannot write {tmp_path}: it is a folder; name a file in it\n"


def test_program_refuses_options_that_name_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (
        ["--only", "nothing"],
        ["--server-url", "ftp://x"],
        ["--port", "99999"],
        ["--api-key", "密"],
    ):
        with pytest.raises(SystemExit) as caught:
            selftest.parse_arguments(words)
        assert caught.value.code == 2
    assert "no check is called like nothing" in capsys.readouterr().err


def test_status_page_is_one_above_the_engine_by_default() -> None:
    assert selftest.parse_arguments(["--port", "9000"]).status_url == "http://127.0.0.1:9002"
