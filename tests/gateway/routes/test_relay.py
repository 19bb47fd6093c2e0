"""/v1/*: what the engine says, as it says it, and nothing administrative."""

from __future__ import annotations

import asyncio

import httpx
import openai
import pytest

from gateway.engines.pool import POOL
from lab.fuzz.raw_http import build_request, connect
from tests.fake_engine import Behaviour
from tests.gateway.conftest import Serve, Served, until
from tests.plain_http import NO_TLS


def _sdk(served: Served) -> openai.AsyncOpenAI:
    return openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0)


async def test_relay_sdk_lists_models_and_completes(served: Served) -> None:
    async with _sdk(served) as client:
        models = [model.id async for model in await client.models.list()]
        completion = await client.completions.create(model="fake", prompt="hello")

    assert models == ["fake"]
    assert completion.choices[0].text == " answer:hello "


async def test_relay_sdk_retrieves_one_model(serve: Serve) -> None:
    async with (
        serve(Behaviour(model="org/fake"), aliases=("gpt-4o=org/fake",)) as served,
        _sdk(served) as client,
    ):
        models = [await client.models.retrieve(name) for name in ("org/fake", "gpt-4o")]
        with pytest.raises(openai.NotFoundError, match="no model 'nope'") as failure:
            await client.models.retrieve("nope")

    assert [model.id for model in models] == ["org/fake", "gpt-4o"]
    assert failure.value.code == "model_not_found"


async def test_relay_sdk_streams_piece_by_piece(served: Served) -> None:
    async with _sdk(served) as client:
        stream = await client.chat.completions.create(
            model="fake", messages=[{"role": "user", "content": "hi"}], stream=True
        )
        pieces = [chunk.choices[0].delta.content async for chunk in stream]

    assert pieces == list("answer:hi")


async def test_relay_unknown_model_is_the_engines_404(served: Served) -> None:
    async with _sdk(served) as client:
        with pytest.raises(openai.NotFoundError, match="`nope` does not exist"):
            await client.chat.completions.create(
                model="nope", messages=[{"role": "user", "content": "hi"}]
            )


async def test_relay_passes_the_body_on_unchanged(served: Served) -> None:
    direct = await _post(served.engine_url, {"model": "fake", "prompt": "x", "unknown": [1]})
    through = await _post(served.url, {"model": "fake", "prompt": "x", "unknown": [1]})

    assert through.content == direct.content
    assert served.engine.calls[-1] == {"model": "fake", "prompt": "x", "unknown": [1]}


async def _post(url: str, body: object) -> httpx.Response:
    async with httpx.AsyncClient(verify=NO_TLS) as client:
        return await client.post(f"{url}/v1/completions", json=body)


async def test_relay_keeps_the_callers_secrets_from_the_engine(served: Served) -> None:
    await served.client.post(
        "/v1/completions",
        json={"model": "fake", "prompt": "x"},
        headers={"Authorization": "Bearer secret", "Cookie": "a=b", "X-Request-Id": "r1"},
    )

    sent = {name.lower(): value for name, value in served.engine.headers[-1].items()}
    assert "authorization" not in sent
    assert "cookie" not in sent
    assert sent["x-request-id"] == "r1"


@pytest.mark.parametrize(
    "path", ["/collective_rpc", "/v1/../collective_rpc", "/v1/%2e%2e/collective_rpc", "/load"]
)
async def test_relay_administrative_path_is_404(served: Served, path: str) -> None:
    answer = await served.client.post(path, json={})

    assert answer.status_code == 404


async def test_relay_gone_caller_cancels_the_engines_work(served: Served) -> None:
    served.engine.delay_s = 30
    call = asyncio.create_task(
        served.client.post(
            "/v1/chat/completions",
            json={"model": "fake", "messages": [{"role": "user", "content": "x"}]},
        )
    )
    await until(lambda: served.engine.running == 1)

    call.cancel()

    await until(lambda: served.engine.running == 0, timeout_s=1)


async def test_relay_half_closed_caller_is_taken_for_gone(served: Served) -> None:
    """He looks like one who has closed for good, and for that one no engine may work on."""
    served.engine.delay_s = 30
    body = b'{"model": "fake", "messages": [{"role": "user", "content": "x"}]}'
    async with connect(served.url) as (_, writer):
        writer.write(build_request("POST", "/v1/chat/completions", body))
        await until(lambda: served.engine.running == 1)

        writer.write_eof()

        await until(lambda: served.engine.running == 0, timeout_s=1)


@pytest.mark.parametrize(("told_s", "passed_on"), [(7, "7"), (None, "1")])
async def test_relay_busy_engine_says_when_to_come_back(
    served: Served, told_s: int | None, passed_on: str
) -> None:
    served.engine.status, served.engine.retry_after_s = 503, told_s

    answer = await served.chat("x")

    assert (answer.status_code, answer.headers["Retry-After"]) == (503, passed_on)


async def test_relay_dead_engine_is_an_error_in_the_envelope(served: Served) -> None:
    served.engine.cuts_connection = True

    answer = await served.client.post("/v1/completions", json={"model": "fake", "prompt": "x"})

    assert answer.status_code == 502
    assert answer.json()["error"]["source"] == "engine"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "m", "code": 400}}', "m"),
        (
            b'{"detail": "Not Found"}',
            "the engine answered 404: Not Found; the model that it serves is not for "
            "/v1/completions",
        ),
        (b"<html>gone</html>", "the engine answered 404: <html>gone</html>"),
    ],
)
async def test_relay_refusal_of_the_engine_says_that_it_is_the_engines(
    served: Served, body: bytes, message: str
) -> None:
    served.engine.status, served.engine.body = 404, body
    answer = await _post(served.url, {"model": "fake", "prompt": "x"})

    assert answer.status_code == 404
    assert answer.headers["content-type"] == "application/json"
    assert answer.json()["error"]["source"] == "engine"
    assert answer.json()["error"]["message"] == message


@pytest.mark.parametrize("path", ["/v1/embeddings", "/v1/chat/completions"])
async def test_relay_route_that_the_engine_lacks_is_no_failure_of_it(
    serve: Serve, path: str
) -> None:
    """However often it is asked for: neither breaker nor trial has anything to do with it."""
    async with serve(Behaviour(routes=frozenset(("/v1/completions",)))) as served:
        (engine,) = served.app[POOL].engines
        for _ in range(10):
            answer = await served.client.post(path, json={"input": "x"})

        error = answer.json()["error"]
        assert (answer.status_code, error["code"], error["source"]) == (
            404,
            "route_not_served",
            "engine",
        )
        assert error["type"] == "invalid_request_error"
        assert path in error["message"]
        assert engine.is_usable
        assert not engine.is_on_trial


async def test_relay_route_without_its_model_is_no_failure_of_the_engine(served: Served) -> None:
    """vLLM has some routes for every model, and answers 501 where the model is not for them."""
    (engine,) = served.app[POOL].engines
    body = b'{"error": {"message": "The model does not support Score API", "code": 501}}'
    served.engine.status, served.engine.body = 501, body
    for _ in range(10):
        answer = await _post(served.url, {"model": "fake", "prompt": "x"})

    assert answer.status_code == 501
    assert (engine.is_usable, engine.is_on_trial) == (True, False)


@pytest.mark.parametrize(
    ("body", "status", "kind"),
    [
        (b"{", 400, "invalid_request_error"),
        (b'{"max_tokens": "many"}', 400, "invalid_request_error"),
        (b'{"x": "' + b"x" * 3000 + b'"}', 413, "request_too_large"),
    ],
)
async def test_messages_errors_of_the_gateway_are_anthropics(
    serve: Serve, body: bytes, status: int, kind: str
) -> None:
    async with serve(max_body_bytes=2000) as served:
        answer = await served.client.post("/v1/messages", content=body)

    told = answer.json()
    assert answer.status_code == status
    assert (told["type"], told["error"]["type"], told["error"]["source"]) == (
        "error",
        kind,
        "gateway",
    )


async def test_messages_without_an_engine_are_overloaded(serve: Serve) -> None:
    async with serve(Behaviour(is_healthy=False), wait_ready=False) as served:
        answer = await served.client.post("/v1/messages", json={"messages": []})

    assert (answer.status_code, answer.json()["error"]["type"]) == (503, "overloaded_error")


async def test_relay_error_without_a_word_says_who_failed(served: Served) -> None:
    """As vLLM answers to some calls that it cannot hand on to its core."""
    served.engine.status = 500
    served.engine.body = b'{"error": {"message": "", "type": "InternalServerError", "code": 500}}'
    answer = await _post(served.url, {"model": "fake", "prompt": "x"})

    error = answer.json()["error"]
    assert (answer.status_code, error["source"]) == (500, "engine")
    assert error["message"] == "the engine answered 500 and said nothing"
