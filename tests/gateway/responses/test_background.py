"""`background`: accepted at once, run on its key's account, found by whoever asks for it."""

from __future__ import annotations

import asyncio
from typing import Any

import openai
import pytest

from gateway.admission.accounts import ACCOUNTS
from gateway.admission.served_models import MODELS
from gateway.admission.tickets import Claims
from gateway.middleware import OPEN_REQUESTS
from tests.fake_engine import Behaviour
from tests.gateway.batches.conftest import open_sdk
from tests.gateway.conftest import Serve, Served
from tests.gateway.responses.conftest import Caller, Keys, check_shape, until


async def test_background_response_is_queued_at_once_and_answered(caller: Caller) -> None:
    slots = caller.served.engine.slots = asyncio.Semaphore(0)
    asked = await caller.ask("hi", background=True, metadata={"a": "b"}, instructions="Be brief.")
    begun = await caller.wait(asked.id, "in_progress")
    slots.release()
    told = await caller.wait(asked.id)

    assert (asked.status, asked.output, asked.usage) == ("queued", [], None)
    assert (begun.status, told.status, told.output_text) == (
        "in_progress",
        "completed",
        "answer:hi",
    )
    for one in (asked, begun, told):
        assert (one.id, one.background, one.store) == (asked.id, True, True)
        assert (one.metadata, one.instructions) == ({"a": "b"}, "Be brief.")
        assert one.created_at == asked.created_at
        check_shape(one)
    assert told.usage.total_tokens == 7


async def test_conversation_goes_on_in_the_background(caller: Caller) -> None:
    first = await caller.ask("one", background=True)
    await caller.wait(first.id)
    second = await caller.ask("two", background=True, previous_response_id=first.id)
    told = await caller.wait(second.id)

    assert [item["role"] for item in caller.last_input()] == ["user", "assistant", "user"]
    assert told.previous_response_id == first.id
    assert "background" not in caller.served.engine.calls[-1]


async def test_nothing_goes_on_from_what_has_not_ended(plain: Caller) -> None:
    slots = plain.served.engine.slots = asyncio.Semaphore(0)
    first = await plain.ask("one", background=True)

    with pytest.raises(openai.BadRequestError) as failure:
        await plain.ask("two", previous_response_id=first.id)
    slots.release()
    assert failure.value.code == "previous_response_not_ended"


async def test_background_response_is_cancelled(caller: Caller) -> None:
    engine = caller.served.engine
    engine.slots = asyncio.Semaphore(0)
    asked = await caller.ask("hi", background=True)
    await until(lambda: engine.running)
    cancelled = await caller.sdk.responses.cancel(asked.id)
    again = await caller.sdk.responses.cancel(asked.id)
    await until(lambda: engine.cancelled == 1)

    told = await caller.sdk.responses.retrieve(asked.id)
    assert [one.status for one in (cancelled, again, told)] == ["cancelled"] * 3
    check_shape(told)


async def test_background_response_that_has_ended_is_not_cancelled(plain: Caller) -> None:
    asked = await plain.ask("hi", background=True)
    await plain.wait(asked.id)

    assert (await plain.sdk.responses.cancel(asked.id)).status == "completed"


async def test_deleted_background_response_runs_no_longer(plain: Caller) -> None:
    engine = plain.served.engine
    engine.slots = asyncio.Semaphore(0)
    asked = await plain.ask("hi", background=True)
    await until(lambda: engine.running)
    await plain.sdk.responses.delete(asked.id)

    await until(lambda: engine.cancelled == 1)


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        ({"status": 500}, "server_error"),
        ({"status": 503}, "server_error"),
        ({"refuses": lambda _: True}, "invalid_prompt"),
        ({"body": b"nonsense"}, "server_error"),
    ],
)
async def test_background_response_that_fails_says_why(
    plain: Caller, fault: dict[str, Any], code: str
) -> None:
    for name, value in fault.items():
        setattr(plain.served.engine, name, value)
    asked = await plain.ask("hi", background=True)
    told = await plain.wait(asked.id)

    assert (told.status, told.error.code, told.output) == ("failed", code, [])
    assert told.error.message
    check_shape(told)


async def test_background_response_outlives_its_caller(serve: Serve, stored: Any) -> None:
    """And the gateway that stops waits for it, as for any request."""
    engine = Behaviour(delays=lambda text: 0.5 if text == "hi" else 0.0)
    async with serve(engine, **stored) as served, open_sdk(served.url) as sdk:
        asked = await Caller(served, sdk).ask("hi", background=True)
    async with serve(**stored) as served, open_sdk(served.url) as sdk:
        told = await sdk.responses.retrieve(asked.id)

    assert (told.status, told.output_text) == ("completed", "answer:hi")


async def test_background_response_of_a_gateway_that_stops_has_failed(
    serve: Serve, stored: Any
) -> None:
    engine = Behaviour()
    options = {**stored, "drain_timeout_s": 0.0}
    async with serve(engine, **options) as served, open_sdk(served.url) as sdk:
        engine.slots = asyncio.Semaphore(0)
        asked = await Caller(served, sdk).ask("hi", background=True)
        await until(lambda: engine.running)
    async with serve(**stored) as served, open_sdk(served.url) as sdk:
        told = await sdk.responses.retrieve(asked.id)

    assert told.status == "failed"
    assert "stopped" in told.error.message


async def test_background_response_is_seen_and_cancelled_through_another_gateway(
    serve: Serve, stored: Any
) -> None:
    engine = Behaviour()
    async with (
        serve(engine, **stored) as one,
        serve(**stored) as other,
        open_sdk(one.url) as sdk,
        open_sdk(other.url) as elsewhere,
    ):
        engine.slots = asyncio.Semaphore(0)
        asked = await Caller(one, sdk).ask("hi", background=True)
        await Caller(other, elsewhere).wait(asked.id, "in_progress")
        await elsewhere.responses.cancel(asked.id)
        await until(lambda: engine.cancelled == 1)


async def test_background_response_holds_its_keys_place(
    serve: Serve, keys: Keys, stored: Any
) -> None:
    engine = Behaviour()
    options = keys.write(alice="max_concurrency = 1")
    async with (
        serve(engine, **stored, **options) as served,
        open_sdk(served.url, keys.keys["alice"]) as sdk,
    ):
        engine.slots = asyncio.Semaphore(0)
        caller = Caller(served, sdk)
        asked = await caller.ask("one", background=True)
        for background in (False, True):
            with pytest.raises(openai.RateLimitError) as refused:
                await caller.ask("two", background=background)
            assert refused.value.code == "key_concurrency"
        engine.slots.release()
        await caller.wait(asked.id)
        engine.slots.release()
        again = await caller.ask("three", background=True)
        await caller.wait(again.id)


async def test_background_response_is_charged_to_its_keys_minute(
    serve: Serve, keys: Keys, stored: Any
) -> None:
    options = keys.write(alice="tokens_per_minute = 7")
    async with (
        serve(**stored, **options) as served,
        open_sdk(served.url, keys.keys["alice"]) as sdk,
    ):
        await Caller(served, sdk).ask("one", background=True)
        await until(lambda: served.app[ACCOUNTS].sum_usage().completion_tokens == 4)
        with pytest.raises(openai.RateLimitError) as refused:
            await Caller(served, sdk).ask("two", background=True)

    assert refused.value.code == "tokens_per_minute"


async def test_background_response_that_takes_too_long_is_charged(
    serve: Serve, keys: Keys, stored: Any
) -> None:
    engine = Behaviour()
    options = keys.write(alice="")
    async with (
        serve(engine, **stored, **options, engine_timeout_s=1.0) as served,
        open_sdk(served.url, keys.keys["alice"]) as sdk,
    ):
        engine.slots = asyncio.Semaphore(0)
        caller = Caller(served, sdk)
        asked = await caller.ask("one", background=True)
        told = await caller.wait(asked.id)
        used = served.app[ACCOUNTS].sum_usage()

    assert (told.status, "in time" in told.error.message) == ("failed", True)
    assert used.prompt_tokens > 0


async def test_background_responses_that_are_too_many_are_refused_at_once(
    serve: Serve, stored: Any
) -> None:
    engine = Behaviour()
    bounds = {"max_running": 1, "engine_sequences": 1, "warmup_prompts": 1}
    async with (
        serve(engine, **stored, **bounds, responses_max_background=2) as served,
        open_sdk(served.url) as sdk,
    ):
        engine.slots = asyncio.Semaphore(0)
        caller = Caller(served, sdk)
        ids = [(await caller.ask("hi", background=True)).id for _ in range(2)]
        with pytest.raises(openai.RateLimitError, match="at most 2") as refused:
            await caller.ask("hi", background=True)
        waiting = await caller.sdk.responses.retrieve(ids[1])
        for _ in ids:
            engine.slots.release()
        for one in ids:
            assert (await caller.wait(one)).status == "completed"

    assert refused.value.code == "too_many_background"
    assert "Retry-After" in refused.value.response.headers
    assert waiting.status == "queued"


async def test_background_responses_that_wait_turn_no_caller_away(
    serve: Serve, stored: Any
) -> None:
    """They have no time-out, so the queue's bound would be theirs for ever."""
    engine = Behaviour()
    bounds = {"max_running": 1, "max_waiting": 1, "engine_sequences": 1, "warmup_prompts": 1}
    async with serve(engine, **stored, **bounds) as served, open_sdk(served.url) as sdk:
        slots = engine.slots = asyncio.Semaphore(0)
        caller = Caller(served, sdk)
        ids = [(await caller.ask("hi", background=True)).id for _ in range(4)]
        waiting = asyncio.create_task(caller.ask("me"))
        (model,) = served.app[MODELS].all
        await until(lambda: model.queue.count("interactive")[1] == 1)
        with pytest.raises(openai.RateLimitError, match="1 sequences are waiting") as refused:
            await caller.ask("me too")
        for _ in range(5):
            slots.release()
        answered = await waiting
        states = [(await caller.wait(one)).status for one in ids]

    assert refused.value.code == "overloaded"
    assert (answered.output_text, states) == ("answer:me", ["completed"] * 4)


async def test_background_response_of_a_key_that_is_withdrawn_ends(
    serve: Serve, keys: Keys, stored: Any
) -> None:
    engine = Behaviour()
    options = keys.write(alice="", bob="")
    async with (
        serve(engine, **stored, **options) as served,
        open_sdk(served.url, keys.keys["alice"]) as sdk,
    ):
        engine.slots = asyncio.Semaphore(0)
        asked = await Caller(served, sdk).ask("hi", background=True)
        await until(lambda: engine.running)
        text = keys.path.read_text()
        keys.path.write_text(text[text.rindex("[[keys]]") :])
        await until(lambda: engine.cancelled == 1)
        keys.path.write_text(text)

        async def told() -> Any:
            try:
                return (await sdk.responses.retrieve(asked.id)).status == "failed"
            except openai.AuthenticationError:
                return False

        await until(told)


async def test_background_response_is_one_request_with_its_tokens(
    serve: Serve, keys: Keys, stored: Any, tmp_path: Any
) -> None:
    options = keys.write(alice="audit_text = true", root="admin = true")
    usage = {"usage_database": str(tmp_path / "usage.sqlite"), "usage_interval_s": 0.05}
    async with (
        serve(**stored, **options, **usage, audit=True) as served,
        open_sdk(served.url, keys.keys["alice"]) as sdk,
    ):
        caller = Caller(served, sdk)
        asked = await caller.ask("hi", background=True)
        await caller.wait(asked.id)
        root = {"Authorization": f"Bearer {keys.keys['root']}"}
        rows = await wait_for_rows(served, root)
        answer = await served.client.get("/usage?group=day&key=alice", headers=root)

    (row,) = rows
    assert (row["prompt"], row["answer"]) == ("hi", "answer:hi")
    assert (row["prompt_tokens"], row["completion_tokens"]) == (3, 4)
    (used,) = [one for one in answer.json()["data"] if one["model"] == "fake"]
    assert (used["requests"], used["prompt_tokens"], used["completion_tokens"]) == (1, 3, 4)


async def wait_for_rows(served: Served, root: dict[str, str]) -> list[Any]:
    """Of calls of alice's that have been answered."""
    rows: list[Any] = []

    async def is_written() -> bool:
        answer = await served.client.get("/audit?key=alice", headers=root)
        rows[:] = [one for one in answer.json()["data"] if one["route"] == "/v1/responses"]
        return any(one["status"] == 200 for one in rows)

    await until(is_written)
    return rows


async def test_background_response_whose_caller_hangs_up_at_once_is_one_request(
    serve: Serve, keys: Keys, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Before it is accepted, for the limits of its key take their time."""
    has_asked, may_go_on = asyncio.Event(), asyncio.Event()
    open_claims = Claims.open

    async def open_slowly(*args: Any) -> None:
        has_asked.set()
        await may_go_on.wait()
        await open_claims(*args)

    monkeypatch.setattr(Claims, "open", open_slowly)
    options = keys.write(alice="max_concurrency = 9", root="admin = true")
    places = {"responses_database": "responses.sqlite", "usage_database": "usage.sqlite"}
    places = {name: str(tmp_path / file) for name, file in places.items()}
    async with (
        serve(**places, **options, usage_interval_s=0.05, audit=True) as served,
        open_sdk(served.url, keys.keys["alice"]) as sdk,
    ):
        asking = asyncio.create_task(Caller(served, sdk).ask("hi", background=True))
        await has_asked.wait()
        asking.cancel()
        await until(lambda: served.app[OPEN_REQUESTS].count == 1)  # the response alone
        may_go_on.set()
        rows = await wait_for_rows(served, {"Authorization": f"Bearer {keys.keys['root']}"})

    assert [(one["status"], one["completion_tokens"]) for one in rows] == [(200, 4)]
