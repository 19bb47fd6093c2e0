"""/openapi.json and /docs: every route there is, no other, and of each what the engine says."""

from __future__ import annotations

import re
from typing import Any

import pytest

from gateway.engines.engine import EngineState
from gateway.engines.pool import POOL
from gateway.schemas.predict import PREDICT_FIELDS
from tests.fake_engine import Behaviour
from tests.gateway.conftest import Serve, Served, until

_PAGE = re.compile(r"/ui.*")


def _list(document: dict[str, Any]) -> set[tuple[str, str]]:
    return {
        (method.upper(), path) for path, methods in document["paths"].items() for method in methods
    }


async def _read(served: Served) -> dict[str, Any]:
    document: dict[str, Any] = (await served.client.get("/openapi.json")).json()
    return document


async def test_openapi_has_every_route_and_no_other(served: Served) -> None:
    """Whoever adds a route says what it is for."""
    routes = {
        (route.method, route.resource.canonical)
        for route in served.app.router.routes()
        if route.resource is not None and route.method != "HEAD"
    }

    told = _list(await _read(served))

    assert told == {(method, path) for method, path in routes if not _PAGE.fullmatch(path)}


async def test_openapi_says_of_a_route_what_the_engine_says(served: Served) -> None:
    document = await _read(served)
    schemas = document["components"]["schemas"]

    body = document["paths"]["/v1/completions"]["post"]["requestBody"]
    schema = body["content"]["application/json"]["schema"]
    assert schema == {"$ref": "#/components/schemas/Call"}
    assert schemas["Call"]["required"] == ["x"]
    assert schemas["Part"] == {"type": "string"}
    assert "Secret" not in schemas
    assert "/collective_rpc" not in document["paths"]


async def test_openapi_has_what_the_engines_model_is_for_alone(serve: Serve) -> None:
    async with serve(Behaviour(routes=frozenset(("/v1/embeddings", "/classify")))) as served:
        paths = (await _read(served))["paths"]

    assert {"/v1/embeddings", "/classify", "/v1/classify", "/predict"} < paths.keys()
    assert "/v1/chat/completions" not in paths


async def test_openapi_has_what_any_of_several_models_is_for(serve: Serve) -> None:
    texts = Behaviour(model="texts", routes=frozenset(("/v1/chat/completions", "/v1/completions")))
    vectors = Behaviour(model="vectors", routes=frozenset(("/v1/embeddings",)))
    async with serve(texts, vectors) as served:
        document, _ = [await _read(served) for _ in range(2)]
        asked = texts.described, vectors.described
        served.engine.is_healthy = False
        await until(lambda: not served.app[POOL].models["texts"].is_ready)
        without, _ = [(await _read(served))["paths"] for _ in range(2)]
        assert (texts.described, vectors.described) == (1, 2)

    paths = document["paths"]
    assert {"/v1/chat/completions", "/v1/embeddings"} < paths.keys()
    assert "/classify" not in paths
    assert asked == (1, 1)
    assert "/v1/chat/completions" in without  # held, not gone


async def test_openapi_without_an_engine_has_all_that_may_be(serve: Serve) -> None:
    async with serve(Behaviour(is_healthy=False), wait_ready=False) as served:
        paths = (await _read(served))["paths"]

    assert {"/v1/embeddings", "/v1/chat/completions", "/v1/audio/transcriptions"} < paths.keys()


async def test_openapi_of_an_engine_that_tells_nothing_is_asked_for_once(serve: Serve) -> None:
    async with serve(Behaviour(describes=False)) as served:
        documents = [await _read(served) for _ in range(3)]

    assert "/v1/chat/completions" in documents[0]["paths"]
    assert documents[0] == documents[2]
    assert served.engine.described == 1


async def test_openapi_of_predict_has_its_fields(served: Served) -> None:
    schema = (await _read(served))["components"]["schemas"]["PredictRequest"]

    assert schema["properties"].keys() == PREDICT_FIELDS


async def test_openapi_is_asked_of_an_engine_once_in_its_life(served: Served) -> None:
    (engine,) = served.app[POOL].engines
    for _ in range(3):
        await _read(served)
        await served.client.get("/docs")
    assert served.engine.described == 1

    served.engine.is_healthy = False
    engine.suspect.set()
    await until(lambda: engine.state is EngineState.DOWN)
    served.engine.is_healthy = True
    await until(lambda: engine.is_usable)
    await _read(served)

    assert served.engine.described == 2


async def test_openapi_says_that_keys_are_wanted_and_needs_none(serve: Serve) -> None:
    async with serve(api_keys=("secret",)) as served:
        answer = await served.client.get("/openapi.json")

    assert answer.status_code == 200
    assert answer.json()["components"]["securitySchemes"]["key"]["scheme"] == "bearer"


@pytest.mark.parametrize("path", ["/predict", "/v1/completions", "/v1/responses/{response_id}"])
async def test_docs_name_each_route(served: Served, path: str) -> None:
    answer = await served.client.get("/docs")

    assert answer.headers["content-type"] == "text/html; charset=utf-8"
    assert f"<code>{path}</code>" in answer.text


async def test_docs_bring_nothing_from_elsewhere(served: Served) -> None:
    answer = await served.client.get("/docs")

    assert "default-src 'none'" in answer.headers["content-security-policy"]
    assert "<script" not in answer.text
    assert re.findall(r"(?:src|href)=.(?!openapi)", answer.text) == []
    assert "Required." in answer.text
