"""Ready means warm, whatever the engine's model is for."""

from __future__ import annotations

import pytest

from gateway.engines.pool import POOL
from tests.fake_engine import Behaviour
from tests.gateway.conftest import Serve, until

_EMBEDS = frozenset(("/v1/embeddings", "/pooling", "/score"))
_CLASSIFIES = frozenset(("/classify", "/pooling", "/score"))


@pytest.mark.parametrize(
    ("routes", "warmed_at", "field"),
    [
        (_EMBEDS, "/v1/embeddings", "input"),
        (_CLASSIFIES, "/classify", "input"),
        (frozenset(("/score", "/pooling")), "/score", "text_2"),
        (frozenset(("/pooling",)), "/pooling", "input"),
        (frozenset(("/v1/audio/transcriptions",)), "/v1/audio/transcriptions", None),
    ],
)
async def test_warmup_engine_without_completions_is_warmed_by_what_it_serves(
    serve: Serve, routes: frozenset[str], warmed_at: str, field: str | None
) -> None:
    engine = Behaviour(routes=routes)
    async with serve(engine, wait_ready=False, warmup_prompts=3) as served:
        (pooled,) = served.app[POOL].engines
        await until(lambda: pooled.is_usable)

        (call,) = engine.calls
        ready = await served.client.get("/readyz")

    assert pooled.pools_at == warmed_at
    assert len(call[field]) == 3 if field else call["file"].startswith(b"RIFF")
    assert ready.status_code == 200


async def test_warmup_engine_that_takes_no_texts_is_ready_all_the_same(serve: Serve) -> None:
    engine = Behaviour(routes=frozenset(("/v1/embeddings",)), refuses=lambda _: True)
    async with serve(engine) as served:
        assert served.app[POOL].is_ready


async def test_warmup_engine_without_any_known_route_says_so(serve: Serve) -> None:
    engine = Behaviour(routes=frozenset())
    async with serve(engine, wait_ready=False) as served:
        (nothing,) = served.app[POOL].engines
        await until(lambda: "warm-up failed" in nothing.reason)

    assert "/v1/completions, /v1/embeddings" in nothing.reason


async def test_predict_at_an_engine_for_vectors_says_what_is_amiss(serve: Serve) -> None:
    async with serve(Behaviour(routes=_EMBEDS)) as served:
        answer = await served.predict("hello")
        metrics = (await served.client.get("/metrics")).text

    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["source"]) == (
        404,
        "route_not_served",
        "engine",
    )
    assert "not for /v1/completions" in error["message"]
    assert f'gateway_engine_errors_total{{engine="{served.engine_url}"}} 0.0' in metrics


async def test_trial_of_an_engine_for_vectors_asks_for_some(serve: Serve) -> None:
    """So many errors in a row that a question of the gateway's decides whose fault they are."""
    engine = Behaviour(routes=_EMBEDS, fails=lambda text: text == "bad")
    async with serve(engine, breaker_failures=2) as served:
        (pooled,) = served.app[POOL].engines
        for _ in range(2):
            answer = await served.client.post("/v1/embeddings", json={"input": ["bad"]})
            assert answer.status_code == 500
        await until(lambda: not pooled.is_on_trial)

        asked = engine.calls[-1]
        is_usable = pooled.is_usable

    assert (len(asked["input"]), asked["input"] != ["bad"]) == (1, True)
    assert is_usable
