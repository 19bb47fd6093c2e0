"""No text is longer than the model's context could hold, on any route, before an engine has it."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from tests.fake_engine import Behaviour
from tests.gateway.conftest import Serve, Served, until

BYTES = 16 * 512  # what the fake engine's context may hold, by the setting's default
LONG = "a " * BYTES
FIELDS = [
    ("/v1/completions", "prompt", {"prompt": LONG}),
    ("/v1/completions", "prompt", {"prompt": LONG, "truncate_prompt_tokens": 1}),
    ("/v1/completions", "prompt", {"prompt": ["short", LONG]}),
    ("/v1/completions", "prompt", {"prompt": [[7] * BYTES]}),
    ("/v1/completions", "suffix", {"prompt": "short", "suffix": LONG}),
    ("/v1/chat/completions", "messages", {"messages": [{"role": "user", "content": LONG}]}),
    (
        "/v1/chat/completions",
        "messages",
        {"messages": [{"role": "user", "content": "ab " * 99}] * 99},
    ),
    (
        "/v1/chat/completions",
        "messages",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": LONG}]}]},
    ),
    (
        "/v1/chat/completions",
        "chat_template_kwargs",
        {"messages": [{"role": "user", "content": "hi"}], "chat_template_kwargs": {"a": LONG}},
    ),
    ("/v1/responses", "input", {"input": LONG}),
    ("/v1/responses", "instructions", {"input": "hi", "instructions": LONG}),
    ("/v1/messages", "system", {"messages": [], "system": LONG}),
    ("/v1/embeddings", "input", {"input": LONG}),
    ("/v1/embeddings", "input", {"input": ["a", LONG]}),
    ("/tokenize", "prompt", {"prompt": LONG}),
    ("/tokenize", "messages", {"messages": [{"role": "user", "content": LONG}]}),
    ("/detokenize", "tokens", {"tokens": [1] * BYTES}),
]


@pytest.mark.parametrize(("path", "field", "fields"), FIELDS)
async def test_text_longer_than_the_context_never_reaches_the_engine(
    served: Served, path: str, field: str, fields: dict[str, Any]
) -> None:
    answer = await served.client.post(path, json={"model": "fake", **fields})

    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["param"]) == (400, "prompt_too_long", field)
    assert error["source"] == "gateway"
    assert served.engine.calls == []


async def test_texts_that_fit_pass_whatever_they_are_together(served: Served) -> None:
    prompts = ["a" * (BYTES - 2)] * 100

    answer = await served.client.post("/v1/completions", json={"model": "fake", "prompt": prompts})

    assert answer.status_code == 200
    assert served.engine.calls[0]["prompt"] == prompts


async def test_pictures_are_no_text(served: Served) -> None:
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64," + "A" * 300_000}}
    sound = {"type": "input_audio", "input_audio": {"data": "A" * 100_000, "format": "wav"}}
    turns = [
        {"role": "user", "content": [picture, {"type": "text", "text": "what is it?"}, sound]},
        {"role": "user", "content": "hi"},
    ]
    body = {"model": "fake", "messages": turns}

    answer = await served.client.post("/v1/chat/completions", json=body)

    assert answer.status_code == 200
    assert served.engine.calls[0]["messages"] == turns


async def test_more_bytes_a_token_are_read_where_that_is_set(serve: Serve) -> None:
    async with serve(max_bytes_per_token=64) as served:
        answer = await served.client.post("/tokenize", json={"prompt": LONG})

    assert answer.status_code == 200


@pytest.mark.parametrize("body", [{"prompt": "a b"}, {"tokens": [5, 6]}])
async def test_tokenizer_waits_at_the_gate_like_others(
    serve: Serve, body: dict[str, object]
) -> None:
    path = "/tokenize" if "prompt" in body else "/detokenize"
    async with serve(max_running=1, queue_timeout_s=0.2) as served:
        served.engine.delay_s = 0.6
        first = asyncio.create_task(served.predict("a"))
        await until(lambda: served.engine.running == 1)

        refused = await served.client.post(path, json=body)
        assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_timeout")

        assert (await first).status_code == 200
        assert (await served.client.post(path, json=body)).status_code == 200


async def test_deadline_holds_while_no_engine_has_told_what_its_model_takes(serve: Serve) -> None:
    engine = Behaviour(is_healthy=False)
    async with serve(engine, wait_ready=False, restart_hold_s=15) as served:
        asked = {"model": "fake", "messages": [{"role": "user", "content": "x" * 10_000}]}
        answer = await served.client.post(
            "/v1/chat/completions", json=asked, headers={"X-Deadline-Ms": "200"}
        )

        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "deadline_passed")
