"""LoRA adapters: listed, served by name where they are loaded, changed by an admin key alone."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from gateway.admission.keys import make_key
from gateway.engines.pool import POOL
from tests.fake_engine import Behaviour
from tests.gateway.conftest import Serve, Served, until

LOAD, UNLOAD = "/v1/load_lora_adapter", "/v1/unload_lora_adapter"


@pytest.fixture
def keys(tmp_path: Path) -> tuple[Path, dict[str, dict[str, str]]]:
    """A keys file, and the headers of an admin and of somebody else."""
    path, headers = tmp_path / "keys.toml", {}
    for name, more in (("root", "admin = true\n"), ("alice", "")):
        key, entry = make_key(name)
        with path.open("a") as file:
            file.write(entry + more)
        headers[name] = {"Authorization": f"Bearer {key}"}
    return path, headers


async def list_models(served: Served, headers: dict[str, str]) -> list[str]:
    answer = await served.client.get("/v1/models", headers=headers)
    return [card["id"] for card in answer.json()["data"]]


async def ask(served: Served, headers: dict[str, str], model: str) -> httpx.Response:
    body = {"model": model, "messages": [{"role": "user", "content": "hi"}]}
    return await served.client.post("/v1/chat/completions", json=body, headers=headers)


async def test_adapter_is_loaded_into_all_engines_of_its_model_served_and_dropped(
    serve: Serve, keys: tuple[Path, dict[str, dict[str, str]]]
) -> None:
    path, headers = keys
    first, second, other = Behaviour(), Behaviour(), Behaviour(model="other")
    order = {"lora_name": "sql", "lora_path": "/adapters/sql"}
    async with serve(first, second, other, keys_file=path, default_model="fake") as served:
        root, post = headers["root"], served.client.post
        loaded = await post(LOAD, json=order, headers=root)
        listed = await list_models(served, headers["alice"])
        answers = [await ask(served, headers["alice"], "sql") for _ in range(4)]
        body = {"prompt": ["q"], "model": "sql"}
        predicted = await post("/predict", json=body, headers=headers["alice"])
        asked = [call["model"] for call in first.calls + second.calls if "model" in call]
        figures = (await served.client.get("/metrics")).text
        dropped = await post(UNLOAD, json={"lora_name": "sql"}, headers=root)
        gone = await ask(served, headers["alice"], "sql")

    assert loaded.status_code == 200
    assert (loaded.json()["model"], len(loaded.json()["engines"])) == ("fake", 2)
    assert listed == ["fake", "other", "sql"]
    assert [answer.status_code for answer in answers] == [200] * 4
    assert predicted.json() == {"response": ["answer:q"]}
    assert asked == ["sql"] * 5
    assert 'gateway_model_requests_total{model="sql"} 5.0' in figures
    assert [call for call in other.calls if "lora_name" in call] == []
    assert dropped.status_code == 200
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")


async def test_adapter_is_asked_for_where_it_is_loaded(serve: Serve) -> None:
    without, having = Behaviour(), Behaviour(adapters=["sql"])
    async with serve(without, having) as served:
        answers = [await served.chat("hi", model="sql") for _ in range(4)]
        listed = await list_models(served, {})
        plain = [await served.chat("hi") for _ in range(4)]

    assert listed == ["fake", "sql"]
    assert [answer.status_code for answer in (*answers, *plain)] == [200] * 8
    assert "sql" not in {call["model"] for call in without.calls}


async def test_adapter_takes_places_of_its_model(serve: Serve) -> None:
    async with serve(Behaviour(adapters=["sql"])) as served:
        models, pool = served.app[POOL].models, served.app[POOL].adapters["sql"]

        assert (list(models), pool.base) == (["fake"], "fake")
        assert "gateway_max_running_sequences 4096.0" in (await served.client.get("/metrics")).text


@pytest.mark.parametrize("path", [LOAD, UNLOAD])
async def test_adapters_are_changed_by_an_admin_key_alone(
    serve: Serve, keys: tuple[Path, dict[str, dict[str, str]]], path: str
) -> None:
    order = {"lora_name": "sql", "lora_path": "/adapters/sql"}
    engine = Behaviour(adapters=["sql"])
    async with serve(engine, keys_file=keys[0]) as served:
        stranger = await served.client.post(path, json=order)
        alice = await served.client.post(path, json=order, headers=keys[1]["alice"])
    async with serve(engine) as served:
        anybody = await served.client.post(path, json=order)

    assert [stranger.status_code, alice.status_code, anybody.status_code] == [401, 403, 403]
    assert anybody.json()["error"]["code"] == "not_admin"
    assert engine.adapters == ["sql"]


@pytest.mark.parametrize(
    ("path", "order", "expected"),
    [
        (LOAD, {"lora_name": "sql"}, (400, "lora_path must be a text")),
        (LOAD, {"lora_name": "fake", "lora_path": "/a"}, (400, "is the name of a model here")),
        (LOAD, {"lora_name": "x", "lora_path": "/a", "model": "sql"}, (400, "an adapter itself")),
        (LOAD, {"lora_name": "x", "lora_path": "/a", "model": "y"}, (404, "there is no model 'y'")),
        (LOAD, {"lora_name": "x", "lora_path": "/nowhere"}, (400, "0 of 1 engines have done it")),
        (UNLOAD, {"lora_name": "none"}, (404, "there is no adapter 'none'")),
        (UNLOAD, {"lora_name": 7}, (400, "lora_name must be a text")),
    ],
)
async def test_order_that_cannot_be_is_refused(
    serve: Serve,
    keys: tuple[Path, dict[str, dict[str, str]]],
    path: str,
    order: dict[str, object],
    expected: tuple[int, str],
) -> None:
    async with serve(Behaviour(adapters=["sql"]), keys_file=keys[0]) as served:
        answer = await served.client.post(path, json=order, headers=keys[1]["root"])

    assert answer.status_code == expected[0]
    assert expected[1] in answer.json()["error"]["message"]


async def test_engine_that_changes_no_adapters_is_named_with_what_to_do(
    serve: Serve, keys: tuple[Path, dict[str, dict[str, str]]]
) -> None:
    able, unable = Behaviour(), Behaviour(takes_adapters=False)
    order = {"lora_name": "sql", "lora_path": "/adapters/sql"}
    async with serve(able, unable, keys_file=keys[0]) as served:
        answer = await served.client.post(LOAD, json=order, headers=keys[1]["root"])
        listed = await list_models(served, keys[1]["alice"])

    message = answer.json()["error"]["message"]
    assert answer.status_code == 400
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING=1; 1 of 2 engines have done it" in message
    assert listed == ["fake", "sql"]


async def test_adapter_that_some_engines_have_already_is_known_and_dropped_in_all(
    serve: Serve, keys: tuple[Path, dict[str, dict[str, str]]]
) -> None:
    """As after a load that half succeeded, or through another gateway."""
    having, without = Behaviour(), Behaviour()
    async with serve(having, without, keys_file=keys[0]) as served:
        root, post = keys[1]["root"], served.client.post
        having.adapters.append("sql")
        nowhere = {"lora_name": "sql", "lora_path": "/nowhere"}
        refused = await post(LOAD, json=nowhere, headers=root)
        listed = await list_models(served, root)
        dropped = await post(UNLOAD, json={"lora_name": "sql"}, headers=root)
        rest = await list_models(served, root)

    assert refused.status_code == 400
    assert listed == ["fake", "sql"]
    assert (dropped.status_code, having.adapters) == (200, [])
    assert rest == ["fake"]


async def test_engine_that_does_not_say_what_it_serves_now_is_named(
    serve: Serve, keys: tuple[Path, dict[str, dict[str, str]]]
) -> None:
    quick, slow = Behaviour(), Behaviour()
    order = {"lora_name": "sql", "lora_path": "/adapters/sql"}
    async with serve(quick, slow, keys_file=keys[0], probe_timeout_s=1) as served:
        slow.models_delay_s = 60
        answer = await served.client.post(LOAD, json=order, headers=keys[1]["root"])
        listed = await list_models(served, keys[1]["root"])

    message = answer.json()["error"]["message"]
    assert answer.status_code == 502
    assert "does not say what it serves now (no answer in time); send the same again" in message
    assert "1 of 2 engines have done it" in message
    assert listed == ["fake", "sql"]


async def test_adapter_whose_caller_hangs_up_is_known_once_it_is_loaded(
    serve: Serve, keys: tuple[Path, dict[str, dict[str, str]]]
) -> None:
    may_answer = asyncio.Event()
    engine = Behaviour(adapters_answer=may_answer)
    order = {"lora_name": "sql", "lora_path": "/adapters/sql"}
    async with serve(engine, keys_file=keys[0]) as served:
        call = served.client.post(LOAD, json=order, headers=keys[1]["root"])
        asking = asyncio.create_task(call)
        await until(lambda: engine.adapters)
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)
        await list_models(served, keys[1]["root"])  # by now the gateway has seen the caller go
        assert "sql" not in served.app[POOL].adapters
        may_answer.set()
        await until(lambda: "sql" in served.app[POOL].adapters)
