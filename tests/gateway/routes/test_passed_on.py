"""Routes for what is no completion: passed on as the engine has them, counted and bounded."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from gateway.admission.keys import make_key
from tests.fake_engine import Behaviour
from tests.gateway.conftest import Serve, Served, until

TEXTS = ["a", "bc"]
ROUTES: dict[str, tuple[str, dict[str, Any]]] = {
    "/v1/embeddings": ("input", {}),
    "/v2/embed": ("texts", {"input_type": "document"}),
    "/pooling": ("input", {}),
    "/classify": ("input", {}),
    "/v1/classify": ("input", {}),
    "/score": ("text_2", {"text_1": "a"}),
    "/v1/score": ("text_2", {"text_1": "a"}),
    "/rerank": ("documents", {"query": "a"}),
    "/v1/rerank": ("documents", {"query": "a"}),
    "/v2/rerank": ("documents", {"query": "a"}),
}
TURNS = [{"role": "user", "content": "hi"}]
KeysFile = Callable[[str], tuple[Path, str]]


@pytest.fixture
def keys_file(tmp_path: Path) -> KeysFile:
    """A file with one key that has the limits given, and that key."""

    def write(limits: str) -> tuple[Path, str]:
        key, entry = make_key("one")
        (tmp_path / "keys.toml").write_text(f"{entry}{limits}\n")
        return tmp_path / "keys.toml", key

    return write


@pytest.mark.parametrize("path", ROUTES)
async def test_pooling_call_reaches_the_engine_as_it_is(served: Served, path: str) -> None:
    name, more = ROUTES[path]
    body = {"model": "fake", name: TEXTS, **more}

    answer = await served.client.post(path, json=body)

    assert answer.status_code == 200
    assert len(answer.json()["data"]) == 2
    assert served.engine.calls == [body]


@pytest.mark.parametrize("path", ROUTES)
async def test_pooling_call_of_too_many_texts_is_refused(serve: Serve, path: str) -> None:
    name, more = ROUTES[path]
    async with serve(max_prompts_per_call=3) as served:
        most = await served.client.post(path, json={name: ["a"] * 3, **more})
        above = await served.client.post(path, json={name: ["a"] * 4, **more})

    error = above.json()["error"]
    assert (most.status_code, above.status_code) == (200, 400)
    assert error["code"] == "too_many_prompts"
    assert error["param"] in {name, "prompt"}
    assert len(served.engine.calls) == 1


@pytest.mark.parametrize("path", ["/v1/chat/completions/batch", "/v1/embeddings"])
async def test_conversations_of_a_batch_count_each(serve: Serve, path: str) -> None:
    async with serve(max_prompts_per_call=3) as served:
        above = await served.client.post(path, json={"messages": [TURNS] * 4})
        one = await served.client.post(path, json={"messages": TURNS * 4, "input": "x"})

    assert (above.status_code, above.json()["error"]["param"]) == (400, "messages")
    assert one.status_code == 200


@pytest.mark.parametrize("path", ["/v1/chat/completions/batch", "/v1/messages/count_tokens"])
async def test_further_call_reaches_the_engine_as_it_is(served: Served, path: str) -> None:
    body = {"model": "fake", "messages": [TURNS]}

    answer = await served.client.post(path, json=body)

    assert answer.json() == {"path": path, "call": body, "usage": {"completion_tokens": 7}}


async def test_tokenizer_info_is_that_of_the_model_that_is_named(
    serve: Serve, tmp_path: Path
) -> None:
    key, entry = make_key("alice")
    path = tmp_path / "keys.toml"
    path.write_text(entry + 'models = ["large"]\n')
    models = Behaviour(model="small"), Behaviour(model="large")
    async with serve(*models, aliases=("gpt=large",)) as served:
        names = ("small", "large", "gpt")
        answers = [await served.client.get(f"/tokenizer_info?model={name}") for name in names]
        unnamed = await served.client.get("/tokenizer_info")
        unknown = await served.client.get("/tokenizer_info?model=other")
    async with serve(*models, default_model="small", keys_file=path) as served:
        served.client.headers["Authorization"] = f"Bearer {key}"
        allowed = await served.client.get("/tokenizer_info?model=large")
        refused = await served.client.get("/tokenizer_info?model=small")

    told = [answer.json()["tokenizer_class"] for answer in (*answers, allowed)]
    assert told == ["Small", "Large", "Large", "Large"]
    assert (unnamed.status_code, unnamed.json()["error"]["param"]) == (400, "model")
    assert (unknown.status_code, unknown.json()["error"]["code"]) == (404, "model_not_found")
    assert (refused.status_code, refused.json()["error"]["code"]) == (403, "model_not_allowed")


async def test_tokenizer_info_is_the_engines(served: Served) -> None:
    answer = await served.client.get("/tokenizer_info")

    assert answer.json() == {"tokenizer_class": "Fake"}


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/rerank", {"query": "a", "documents": TEXTS}),
        ("/classify", {"input": TEXTS}),
        ("/v1/chat/completions/batch", {"messages": [TURNS, TURNS]}),
    ],
)
async def test_call_by_another_route_takes_as_many_places(
    serve: Serve, keys_file: KeysFile, path: str, body: dict[str, Any]
) -> None:
    """Of its key too: what is counted cannot be got around."""
    file, key = keys_file("max_concurrency = 3")
    async with serve(keys_file=file) as served:
        served.client.headers["Authorization"] = f"Bearer {key}"
        served.engine.delay_s = 60
        first = asyncio.create_task(served.client.post(path, json=body))
        await until(lambda: served.engine.running)

        refused = await served.client.post(path, json=body)

        first.cancel()
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "key_concurrency")


@pytest.mark.parametrize(
    ("path", "body", "tokens"),
    [
        ("/rerank", {"query": "a", "documents": TEXTS}, {"prompt_tokens": 3}),
        ("/v2/embed", {"texts": TEXTS}, {"prompt_tokens": 3}),
        ("/v1/chat/completions/batch", {"messages": [TURNS]}, {"completion_tokens": 7}),
    ],
)
async def test_call_by_another_route_is_charged(
    serve: Serve, keys_file: KeysFile, path: str, body: dict[str, Any], tokens: dict[str, int]
) -> None:
    file, key = keys_file("admin = true")
    async with serve(keys_file=file) as served:
        served.client.headers["Authorization"] = f"Bearer {key}"
        await served.client.post(path, json=body)
        used = (await served.client.get("/usage")).json()["keys"]["one"]

    assert {name: used[name] for name in tokens} == tokens


async def test_vectors_as_bytes_are_charged_and_described(
    serve: Serve, keys_file: KeysFile
) -> None:
    """The engine tells their places and its usage in a header."""
    file, key = keys_file("admin = true")
    async with serve(keys_file=file) as served:
        served.client.headers["Authorization"] = f"Bearer {key}"
        body = {"input": TEXTS, "encoding_format": "bytes"}
        answer = await served.client.post("/pooling", json=body)
        told = (await served.client.get("/usage")).json()["keys"]["one"]["prompt_tokens"]
        await served.client.post("/pooling", json={**body, "encoding_format": "bytes_only"})
        guessed = (await served.client.get("/usage")).json()["keys"]["one"]["prompt_tokens"]

    assert (answer.content, answer.headers["content-type"]) == (
        b"\x01\x02",
        "application/octet-stream",
    )
    assert json.loads(answer.headers["metadata"])["usage"] == {"prompt_tokens": 3}
    assert told == 3
    assert guessed > told
