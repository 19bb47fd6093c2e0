"""Several models behind one address: whose engine a call goes to, and what they do not share."""

from __future__ import annotations

import asyncio
import shutil
from pathlib import Path
from typing import Any

import pytest

from common.ports import find_free_ports
from gateway.admission.keys import make_key
from gateway.admission.served_models import MODELS
from gateway.app import build_app
from gateway.config import SETTINGS, SettingsError, load_settings
from gateway.engines.engine import Engine, EngineState
from gateway.engines.pool import POOL
from gateway.observability.metrics import METRICS
from gateway.schemas.vllm import ModelCard
from lab.faults.servers.name_server import NameServer, run_name_server
from tests.fake_engine import MODEL_FOLDER, Behaviour, build_fake_engine, serve_app
from tests.gateway.conftest import Serve, Served, make_settings, until

NAME = "_http._tcp.vllm.test"
LONG_S = 60.0  # longer than any test takes


def _pair(**fields: Any) -> tuple[Behaviour, Behaviour]:
    return Behaviour(model="small", **fields), Behaviour(model="large", **fields)


async def test_call_goes_to_the_engine_of_its_model(serve: Serve) -> None:
    small, large = _pair()
    async with serve(small, large) as served:
        answers = [await served.chat("hi", model=name) for name in ("large", "small", "large")]

    assert [answer.status_code for answer in answers] == [200] * 3
    assert [call["model"] for call in small.calls] == ["small"]
    assert [call["model"] for call in large.calls] == ["large"] * 2


async def test_models_of_all_engines_are_one_list(serve: Serve) -> None:
    small, large = _pair()
    async with serve(small, large, Behaviour(model="small"), aliases=("gpt=large",)) as served:
        listed = (await served.client.get("/v1/models")).json()
        one = (await served.client.get("/v1/models/gpt")).json()
        none = await served.client.get("/v1/models/other")

    assert listed["object"] == "list"
    assert [card["id"] for card in listed["data"]] == ["small", "large", "gpt"]
    assert one["id"] == "gpt"
    assert one["max_model_len"] == 512
    assert (none.status_code, none.json()["error"]["code"]) == (404, "model_not_found")


async def test_default_model_is_the_first_of_the_list(serve: Serve) -> None:
    """Wherever its engine stands among the others."""
    async with serve(*_pair(), default_model="large") as served:
        listed = (await served.client.get("/v1/models")).json()["data"]

    assert [card["id"] for card in listed] == ["large", "small"]


async def test_unknown_model_is_refused_with_the_names_that_exist(serve: Serve) -> None:
    small, large = _pair()
    async with serve(small, large, aliases=("gpt=large", "gone=none")) as served:
        answer = await served.chat("hi", model="other")

    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
    assert error["message"] == "there is no model 'other' here; there are: small, large, gpt"
    assert error["source"] == "gateway"
    assert not small.calls
    assert not large.calls


async def test_alias_finds_its_model(serve: Serve) -> None:
    small, large = _pair()
    async with serve(small, large, aliases=("gpt=large",)) as served:
        answer = await served.chat("hi", model="gpt")

    assert answer.status_code == 200
    assert [call["model"] for call in large.calls] == ["large"]


async def test_key_sees_and_uses_its_own_models_alone(serve: Serve, tmp_path: Path) -> None:
    key, entry = make_key("alice")
    path = tmp_path / "keys.toml"
    path.write_text(entry + 'models = ["large"]\n')
    async with serve(*_pair(), keys_file=path, default_model="small") as served:
        served.client.headers["Authorization"] = f"Bearer {key}"
        listed = (await served.client.get("/v1/models")).json()["data"]
        own, other = await served.chat("hi", model="large"), await served.chat("hi", model="small")
        default, named = await served.predict("q"), await served.predict("q", model="large")

    assert [card["id"] for card in listed] == ["large"]
    assert [own.status_code, other.status_code] == [200, 403]
    assert [default.status_code, named.status_code] == [403, 200]


@pytest.mark.parametrize(("allowed", "status"), [("fake", 403), ("sql", 200)])
async def test_key_for_a_model_is_none_for_its_adapter(
    serve: Serve, tmp_path: Path, allowed: str, status: int
) -> None:
    key, entry = make_key("alice")
    path = tmp_path / "keys.toml"
    path.write_text(entry + f'models = ["{allowed}"]\n')
    async with serve(Behaviour(adapters=["sql"]), keys_file=path) as served:
        served.client.headers["Authorization"] = f"Bearer {key}"
        predicted, told = (
            await served.predict("q", model="sql"),
            await served.chat("q", model="sql"),
        )

    assert [predicted.status_code, told.status_code] == [status] * 2


async def test_predict_asks_the_default_model_or_the_one_that_is_named(serve: Serve) -> None:
    small, large = _pair()
    async with serve(small, large, default_model="large") as served:
        default = await served.predict(["q"])
        named = await served.predict(["q"], model="small")
        none = await served.predict(["q"], model="other")
        odd = await served.predict(["q"], model=7)

    assert default.json() == named.json() == {"response": ["answer:q"]}
    assert [len(large.calls), len(small.calls)] == [1, 1]
    assert "X-Ignored-Fields" not in named.headers
    assert (none.status_code, none.json()["error"]["code"]) == (404, "model_not_found")
    assert (odd.status_code, odd.json()["error"]["param"]) == (400, "model")


@pytest.mark.parametrize("asked", [{}, {"model": None}])
@pytest.mark.parametrize("default", ["sql", "gpt"])
async def test_call_without_a_model_is_answered_by_the_adapter_that_is_the_default(
    serve: Serve, default: str, asked: dict[str, Any]
) -> None:
    engine = Behaviour(adapters=["sql"])
    body = {"messages": [{"role": "user", "content": "q"}], **asked}
    async with serve(engine, default_model=default, aliases=("gpt=sql",)) as served:
        answer = await served.client.post("/v1/chat/completions", json=body)
        predicted = await served.predict(["q"])

    assert [answer.status_code, predicted.status_code] == [200, 200]
    assert [call["model"] for call in engine.calls] == ["sql", "sql"]


@pytest.mark.parametrize("data", [{}, {"model": ""}])
async def test_form_without_a_model_is_answered_by_the_default(
    serve: Serve, data: dict[str, str]
) -> None:
    engine = Behaviour(adapters=["sql"])
    async with serve(engine, default_model="sql") as served:
        answer = await served.client.post(
            "/v1/audio/transcriptions", files={"file": ("a.wav", b"sound")}, data=data
        )

    assert answer.status_code == 200
    assert [call["model"] for call in engine.calls] == ["sql"]


async def test_predict_without_a_default_model_says_what_is_missing(serve: Serve) -> None:
    async with serve(*_pair()) as served:
        answer = await served.predict("q")

    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "model")
    assert "small, large" in error["message"]
    assert "GATEWAY_DEFAULT_MODEL" in error["message"]


async def test_predict_names_a_model_that_no_engine_has_told_yet_and_is_held(
    serve: Serve,
) -> None:
    small, large = _pair()
    (port,) = find_free_ports(1)
    async with serve_app(build_fake_engine(small)) as url:
        engines = (url, f"http://127.0.0.1:{port}")
        async with serve(engines=engines, wait_ready=False, restart_hold_s=LONG_S) as served:
            await until(lambda: served.app[POOL].is_ready)
            small.calls.clear()
            asked = asyncio.create_task(served.predict("q", model="large"))
            assert (await served.predict("q", model="small")).status_code == 200
            assert not asked.done()
            async with serve_app(build_fake_engine(large), port):
                answer = await asked

    assert answer.status_code == 200
    assert "X-Ignored-Fields" not in answer.headers
    assert [call["model"] for call in small.calls] == ["small"]


async def test_only_model_takes_whatever_it_is_called_as_before(serve: Serve) -> None:
    async with serve(Behaviour(), Behaviour()) as served:
        ignored = await served.predict("q", model="any")
        refused = await served.chat("hi", model="any")

    assert (ignored.status_code, ignored.headers["X-Ignored-Fields"]) == (200, "model")
    assert refused.status_code == 404
    assert refused.json()["error"]["source"] == "engine"


async def test_each_model_has_its_own_tokenizer(serve: Serve, tmp_path: Path) -> None:
    folder = shutil.copytree(MODEL_FOLDER, tmp_path / "other")
    (folder / "chat_template.jinja").write_text("<{{ messages[0].content }}>")
    one, two, plain = Behaviour(model="one"), Behaviour(model="two"), Behaviour(model="plain")
    settings = {"default_model": "one", "tokenizers": (f"two={folder}",)}
    async with serve(one, two, plain, **settings) as served:
        for name in ("one", "two", "plain"):
            assert (await served.predict(["q"], model=name)).status_code == 200

    prompts = [engine.calls[0]["prompt"][0] for engine in (one, two, plain)]
    assert len(prompts[0]) > len(prompts[1])  # token ids, the first with the demo's template
    assert prompts[2] == "q"


async def test_prompt_held_for_an_engine_is_built_for_the_model_that_comes(
    serve: Serve, tmp_path: Path
) -> None:
    folder = shutil.copytree(MODEL_FOLDER, tmp_path / "other")
    (folder / "chat_template.jinja").write_text("<{{ messages[0].content }}>")
    behaviour, ports = Behaviour(model="two"), find_free_ports(2)
    settings = {
        "engines": tuple(f"http://127.0.0.1:{port}" for port in ports),
        "tokenizers": (f"two={folder}",),
    }
    async with serve(**settings, wait_ready=False, restart_hold_s=LONG_S) as served:
        held = asyncio.create_task(served.predict(["q"]))
        await until(lambda: any(one.pool.held for one in served.app[MODELS].all))
        async with serve_app(build_fake_engine(behaviour), ports[0]):
            assert (await held).status_code == 200
            assert (await served.predict(["q"])).status_code == 200

    prompts = [call["prompt"][0] for call in behaviour.calls[-2:]]
    assert prompts[0] == prompts[1]


async def test_long_text_is_judged_by_the_context_of_its_model(serve: Serve) -> None:
    small, large = Behaviour(model="small"), Behaviour(model="large", max_model_len=4096)
    text = "a" * (512 * 16 + 100)
    async with serve(small, large) as served:
        refused, taken = (
            await served.chat(text, model="small"),
            await served.chat(text, model="large"),
        )

    assert (refused.status_code, refused.json()["error"]["code"]) == (400, "prompt_too_long")
    assert taken.status_code == 200


async def test_long_text_without_a_model_is_judged_by_the_context_of_the_default(
    serve: Serve,
) -> None:
    small, large = Behaviour(model="small"), Behaviour(model="large", max_model_len=4096)
    messages = [{"role": "user", "content": "a" * (512 * 16 + 100)}]
    async with serve(small, large, default_model="large") as served:
        passed = await served.client.post("/v1/chat/completions", json={"messages": messages})
    async with serve(small, large, default_model="small") as served:
        refused = await served.client.post("/v1/chat/completions", json={"messages": messages})

    assert passed.status_code == 200
    assert refused.json()["error"]["code"] == "prompt_too_long"


@pytest.mark.parametrize("is_expected", [True, False])
async def test_long_text_for_a_model_that_has_not_told_is_held(
    serve: Serve, is_expected: bool
) -> None:
    """Not judged by the context of another."""
    small, large = Behaviour(model="small"), Behaviour(model="large", max_model_len=4096)
    text = "a" * (512 * 16 + 100)
    expected = ("small", "large") if is_expected else ()
    (port,) = find_free_ports(1)
    async with serve_app(build_fake_engine(small)) as url:
        settings = {"engines": (url, f"http://127.0.0.1:{port}"), "expected_models": expected}
        async with serve(**settings, wait_ready=False, restart_hold_s=LONG_S) as served:
            await until(lambda: served.app[POOL].is_ready)
            asked = asyncio.create_task(served.chat(text, model="large"))
            assert (await served.chat("hi", model="small")).status_code == 200
            assert not asked.done()
            async with serve_app(build_fake_engine(large), port):
                assert (await asked).status_code == 200
            if is_expected:
                longer = await served.chat(text * 8, model="large")
                assert longer.json()["error"]["code"] == "prompt_too_long"


async def test_busy_model_keeps_nobody_from_another(serve: Serve) -> None:
    small, large = _pair()
    async with serve(small, large, max_running=1) as served:
        small.slots = asyncio.Semaphore(0)
        waiting = [asyncio.create_task(served.chat(f"q{i}", model="small")) for i in range(3)]
        await until(lambda: small.running == 1)

        assert (await served.chat("hi", model="large")).status_code == 200

        for _ in waiting:
            small.slots.release()
        assert [answer.status_code for answer in await asyncio.gather(*waiting)] == [200] * 3


async def test_same_greedy_prompt_is_shared_within_a_model_alone(serve: Serve) -> None:
    small, large = _pair()
    async with serve(small, large, default_model="small") as served:
        small.slots = asyncio.Semaphore(0)
        asked = asyncio.create_task(served.predict("q"))
        await until(lambda: small.running == 1)

        assert (await served.predict("q", model="large")).json() == {"response": "answer:q"}

        small.slots.release()
        assert (await asked).status_code == 200


async def test_model_whose_engine_is_away_holds_its_own_callers_alone(serve: Serve) -> None:
    small, large = _pair()
    async with serve(small, large, restart_hold_s=0.1) as served:
        small.is_healthy = False
        await until(lambda: not served.app[POOL].models["small"].is_ready)

        away, there = await served.chat("hi", model="small"), await served.chat("hi", model="large")
        listed = (await served.client.get("/v1/models")).json()["data"]
        ready = await served.client.get("/readyz")

    assert (away.status_code, away.json()["error"]["code"]) == (503, "not_ready")
    assert there.status_code == 200
    assert [card["id"] for card in listed] == ["small", "large"]
    assert ready.status_code == 200


async def test_call_waits_for_an_engine_that_may_come_to_serve_its_model(serve: Serve) -> None:
    small, large = _pair()
    (port,) = find_free_ports(1)
    async with serve_app(build_fake_engine(small)) as url:
        engines = (url, f"http://127.0.0.1:{port}")
        async with serve(engines=engines, wait_ready=False, restart_hold_s=LONG_S) as served:
            await until(lambda: served.app[POOL].is_ready)
            asked = asyncio.create_task(served.chat("hi", model="large"))
            assert (await served.chat("hi", model="small")).status_code == 200
            assert not asked.done()
            async with serve_app(build_fake_engine(large), port):
                assert (await asked).status_code == 200
    assert [call["model"] for call in small.calls if "messages" in call] == ["small"]


async def test_expected_model_is_held_until_an_engine_comes_for_it(serve: Serve) -> None:
    small, large = Behaviour(model="small"), Behaviour(model="large", max_model_len=4096)
    text = "a" * (512 * 16 + 100)  # more than the small one takes
    options = {"expected_models": ("small", "large"), "restart_hold_s": LONG_S}
    async with serve(small, **options, default_model="small") as served:
        pool = served.app[POOL]
        asked = asyncio.create_task(served.chat("hi", model="large"))
        await until(lambda: pool.models["large"].held == 1)
        listed = (await served.client.get("/v1/models")).json()["data"]
        held = await _read_figures(served, "gateway_model_held_calls")
        unknown = await served.chat("hi", model="other")
        async with serve_app(build_fake_engine(large)) as url:
            known = pool.engines[0]
            engine = Engine(url, served.app[SETTINGS], known.client._connector, served.app[METRICS])
            engine.cards = (ModelCard("large", 4096, {"id": "large", "max_model_len": 4096}),)
            engine.enter_state(EngineState.READY, "")
            await pool.set_engines([known, engine])
            assert (await asked).status_code == 200
            await pool.set_engines([known])
            again = asyncio.create_task(served.chat(text, model="large"))
            await until(lambda: pool.models["large"].held == 1)
            told = (await served.client.get("/v1/models/large")).json()
            await pool.set_engines([known, engine])
            assert (await again).status_code == 200

    assert [card["id"] for card in listed] == ["small", "large"]
    assert held == {"small": 0, "large": 1}
    assert unknown.status_code == 404
    assert told["max_model_len"] == 4096


def _build_engine(served: Served, behaviour: Behaviour, url: str) -> tuple[Engine, ModelCard]:
    known = served.app[POOL].engines[0]
    engine = Engine(url, served.app[SETTINGS], known.client._connector, served.app[METRICS])
    return engine, ModelCard(behaviour.model, 512, {"id": behaviour.model})


async def test_call_waits_for_the_engine_that_replaces_its_models_only_one(serve: Serve) -> None:
    small, large = _pair()
    async with serve(small, large, restart_hold_s=LONG_S) as served:
        pool = served.app[POOL]
        staying, leaving = pool.engines
        await pool.set_engines([staying])
        asked = asyncio.create_task(served.chat("hi", model="large"))
        predicted = asyncio.create_task(served.predict("q", model="large"))
        await until(lambda: pool.models["large"].held == 2)
        listed = (await served.client.get("/v1/models")).json()["data"]
        unknown = await served.chat("hi", model="other")

        engine, card = _build_engine(served, large, leaving.url)
        await pool.set_engines([staying, engine])
        await pool.set_cards(engine, [card])
        await pool.set_state(engine, EngineState.READY)
        answers = await asyncio.gather(asked, predicted)

    assert [answer.status_code for answer in answers] == [200, 200]
    assert [call["model"] for call in large.calls] == ["large"] * 2
    assert [card["id"] for card in listed] == ["small", "large"]
    assert unknown.status_code == 404


async def test_model_whose_engines_have_left_is_forgotten_after_the_hold(serve: Serve) -> None:
    third = Behaviour(model="third")
    async with serve(*_pair(), third, restart_hold_s=0.2) as served:
        pool = served.app[POOL]
        await pool.set_engines(pool.engines[:2])
        held = await served.chat("hi", model="third")
        await until(lambda: "third" not in pool.models)
        gone = await served.chat("hi", model="third")

    assert (held.status_code, held.json()["error"]["code"]) == (503, "not_ready")
    assert (gone.status_code, gone.json()["error"]["code"]) == (404, "model_not_found")


async def test_call_waits_for_the_engine_that_replaces_its_adapters_only_one(serve: Serve) -> None:
    small, large = Behaviour(model="small"), Behaviour(model="large", adapters=["sql"])
    async with serve(small, large, restart_hold_s=LONG_S) as served:
        pool = served.app[POOL]
        staying, leaving = pool.engines
        await pool.set_engines([staying])
        asked = asyncio.create_task(served.chat("hi", model="sql"))
        await until(lambda: pool.adapters["sql"].held == 1)
        await pool.set_engines([staying, leaving])
        answer = await asked

    assert answer.status_code == 200


async def test_model_that_is_alone_is_replaced_by_another_without_a_name(serve: Serve) -> None:
    """Nothing of the first one is kept: there are no two of them for a while."""
    small, large = _pair()
    async with (
        serve(small, restart_hold_s=LONG_S) as served,
        serve_app(build_fake_engine(large)) as url,
    ):
        pool = served.app[POOL]
        engine, card = _build_engine(served, large, url)
        await pool.set_engines([engine])
        asked = asyncio.create_task(served.predict("q"))
        await until(lambda: any(one.held for one in pool.models.values()))
        await pool.set_cards(engine, [card])
        await pool.set_state(engine, EngineState.READY)
        answer = await asked

        assert list(pool.models) == ["large"]
    assert answer.status_code == 200


async def test_call_before_the_first_engine_is_found_is_held(serve: Serve) -> None:
    server = NameServer()
    (port,) = find_free_ports(1)
    async with run_name_server(server):
        place = {"engines": (f"srv+http://{NAME}",), "dns_server": server.address}
        async with serve(
            **place, wait_ready=False, restart_hold_s=LONG_S, discovery_interval_s=0.05
        ) as served:
            asked = [
                asyncio.create_task(served.predict("q")),
                asyncio.create_task(served.chat("hi", model="fake")),
            ]
            await until(lambda: len(server.asked) > 1)
            server.records[NAME, "SRV"] = [f"0 0 {port} localhost."]
            async with serve_app(build_fake_engine(Behaviour()), port):
                answers = await asyncio.gather(*asked)
    assert [answer.status_code for answer in answers] == [200, 200]


async def test_engine_that_comes_back_with_another_model_is_moved(serve: Serve) -> None:
    small, large = _pair()
    async with serve(small, large) as served:
        large.model = "larger"
        large.is_healthy = False
        await until(lambda: not served.app[POOL].models["large"].is_ready)
        large.is_healthy = True
        await until(lambda: "larger" in served.app[POOL].models)
        await until(lambda: served.app[POOL].models["larger"].is_ready)

        gone, new = await served.chat("hi", model="large"), await served.chat("hi", model="larger")

    assert (gone.status_code, new.status_code) == (404, 200)


async def test_second_model_takes_nothing_from_what_waits_for_the_first(serve: Serve) -> None:
    """Its queue and its engines stay the same when there are several from now on."""
    small, large = _pair()
    (port,) = find_free_ports(1)
    async with serve_app(build_fake_engine(small)) as url:
        engines = (url, f"http://127.0.0.1:{port}")
        async with serve(engines=engines, wait_ready=False, max_running=1) as served:
            await until(lambda: served.app[POOL].is_ready)
            small.slots = asyncio.Semaphore(0)
            waiting = [asyncio.create_task(served.chat(f"q{i}", model="small")) for i in range(3)]
            await until(lambda: small.running == 1)
            async with serve_app(build_fake_engine(large), port):
                await until(lambda: len(served.app[POOL].models) == 2)
                for _ in waiting:
                    small.slots.release()
                answers = await asyncio.gather(*waiting)
    assert [answer.status_code for answer in answers] == [200] * 3


async def test_metrics_and_page_tell_each_model(serve: Serve) -> None:
    async with serve(*_pair()) as served:
        await served.chat("hi", model="large")
        status = (await served.client.get("/ui/status")).json()

        assert await _read_figures(served, "gateway_model_ready") == {"small": 1, "large": 1}
        assert await _read_figures(served, "gateway_model_requests_total") == {
            "small": 0,
            "large": 1,
        }
        tokens = 'gateway_model_tokens_total{direction="out",model="large"} 4.0'
        assert tokens in (await served.client.get("/metrics")).text
    assert [engine["model"] for engine in status["engines"]] == ["small", "large"]


async def _read_figures(served: Served, name: str) -> dict[str, float]:
    lines = (await served.client.get("/metrics")).text.splitlines()
    rows = [line.removeprefix(name + '{model="') for line in lines if line.startswith(name + "{")]
    return {row.split('"')[0]: float(row.split(" ")[1]) for row in rows}


@pytest.mark.parametrize(
    ("value", "told"), [("x", "is not model=folder"), ("x=/nowhere", "there is no folder")]
)
def test_tokenizers_that_cannot_be_stop_the_start(value: str, told: str) -> None:
    with pytest.raises(SettingsError, match=told):
        load_settings(["--prompt-style", "raw", "--tokenizers", value])


def test_tokenizer_without_a_template_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="has no chat template"):
        build_app(make_settings(default_model="a", tokenizers=(f"b={tmp_path}",)))
