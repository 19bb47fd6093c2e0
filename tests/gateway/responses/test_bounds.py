"""How much is stored, how long, who may read the file, and how long what is queued may wait."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import openai
import orjson
import pytest
from sqlalchemy import select

from gateway.admission.accounts import ACCOUNTS
from gateway.admission.served_models import MODELS
from gateway.engines.pool import POOL
from gateway.errors import NotFound
from gateway.middleware import OPEN_REQUESTS
from gateway.responses.access import RESPONSES
from gateway.responses.shapes import build_queued, split_output
from gateway.responses.store import Store
from gateway.responses.turns import Turn
from gateway.storage.database import Database, open_database
from gateway.storage.tables import RESPONSES as TABLE
from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.batches.conftest import open_sdk
from tests.gateway.conftest import Serve, make_settings
from tests.gateway.process import serve_process
from tests.gateway.responses.conftest import Caller, Keys, until


async def test_input_that_is_too_large_is_served_where_it_is_not_stored(
    serve: Serve, stored: dict[str, Any]
) -> None:
    bounds = {"responses_max_input_bytes": 1024, "max_new_tokens": 64}
    async with serve(**stored, **bounds) as served, open_sdk(served.url) as sdk:
        caller = Caller(served, sdk)
        with pytest.raises(openai.APIStatusError, match="store: false") as refused:
            await caller.ask("x" * 1024)
        answer = await caller.ask("x" * 1024, store=False)

    assert (refused.value.status_code, refused.value.code) == (413, "input_too_large")
    assert answer.status == "completed"


async def test_conversation_of_too_many_turns_is_refused(
    serve: Serve, stored: dict[str, Any]
) -> None:
    async with serve(**stored, responses_max_turns=2) as served, open_sdk(served.url) as sdk:
        caller = Caller(served, sdk)
        first = await caller.ask("one")
        second = await caller.ask("two", previous_response_id=first.id)
        with pytest.raises(openai.BadRequestError) as refused:
            await caller.ask("three", previous_response_id=second.id)
        with pytest.raises(openai.BadRequestError):
            await caller.ask("three", previous_response_id=second.id, background=True)

    assert refused.value.code == "conversation_too_long"


async def test_conversation_that_is_larger_than_a_body_may_be_is_refused(
    serve: Serve, stored: dict[str, Any]
) -> None:
    async with serve(**stored, max_body_bytes=2048) as served, open_sdk(served.url) as sdk:
        caller = Caller(served, sdk)
        first = await caller.ask("x" * 1000)
        with pytest.raises(openai.APIStatusError) as refused:
            await caller.ask("y" * 1000, previous_response_id=first.id)

    assert (refused.value.status_code, refused.value.code) == (413, "body_too_large")


async def test_large_conversation_is_put_together(serve: Serve, stored: dict[str, Any]) -> None:
    """Of bodies that are not parsed as a whole."""
    texts = ["一" * 100_000 + str(number) for number in range(2)]
    async with (
        serve(Behaviour(max_model_len=10**6), **stored) as served,
        open_sdk(served.url) as sdk,
    ):
        caller = Caller(served, sdk)
        first = await caller.ask(texts[0])
        await caller.ask(texts[1], previous_response_id=first.id)
        sent = caller.last_input()

    assert [item["content"] for item in sent[::2]] == texts


async def test_conversations_that_rest_longest_make_room(
    serve: Serve, stored: dict[str, Any]
) -> None:
    async with serve(**stored, responses_max_stored=3) as served, open_sdk(served.url) as sdk:
        caller = Caller(served, sdk)
        resting = await caller.ask("rests")
        first = await caller.ask("one")
        second = await caller.ask("two", previous_response_id=first.id)
        third = await caller.ask("three", previous_response_id=second.id)
        with pytest.raises(openai.NotFoundError):
            await sdk.responses.retrieve(resting.id)
        # What a newer one goes on from is kept, however old it is.
        fourth = await caller.ask("four", previous_response_id=third.id)
        await caller.ask("five", previous_response_id=fourth.id)

    assert [item["content"] for item in caller.last_input()[::2]] == [
        "one",
        "two",
        "three",
        "four",
        "five",
    ]


async def test_bytes_of_a_key_are_bounded(serve: Serve, stored: dict[str, Any]) -> None:
    bounds = {"responses_max_stored_bytes": 2**20}
    async with (
        serve(Behaviour(max_model_len=10**6), **stored, **bounds) as served,
        open_sdk(served.url) as sdk,
    ):
        caller = Caller(served, sdk)
        # Each is there twice: the fake engine says it again.
        ids = [(await caller.ask("x" * 200_000)).id for _ in range(3)]
        with pytest.raises(openai.NotFoundError):
            await sdk.responses.retrieve(ids[0])
        for one in ids[1:]:
            await sdk.responses.retrieve(one)


async def test_key_without_a_place_for_it_makes_no_room_in_anothers(
    serve: Serve, stored: dict[str, Any], keys: Keys
) -> None:
    options = keys.write(alice="", bob="")
    async with (
        serve(**stored, **options, responses_max_stored=1) as served,
        open_sdk(served.url, keys.keys["alice"]) as alice,
        open_sdk(served.url, keys.keys["bob"]) as bob,
    ):
        first = await Caller(served, alice).ask("one")
        for _ in range(2):
            await Caller(served, bob).ask("two")

        assert await alice.responses.retrieve(first.id) == first


async def test_patient_background_response_waits_longer_than_others_may(
    serve: Serve, stored: Any
) -> None:
    engine = Behaviour()
    bounds = {"max_running": 1, "engine_sequences": 1, "warmup_prompts": 1}
    async with (
        serve(engine, **stored, **bounds, queue_timeout_s=0.05) as served,
        open_sdk(served.url) as sdk,
    ):
        engine.slots = asyncio.Semaphore(0)
        caller = Caller(served, sdk)
        ids = [(await caller.ask("hi", background=True)).id for _ in range(2)]
        with pytest.raises(openai.RateLimitError) as refused:
            await caller.ask("hi")
        for _ in ids:
            engine.slots.release()
        states = [(await caller.wait(one)).status for one in ids]

    assert refused.value.code == "queue_timeout"
    assert states == ["completed"] * 2


async def test_background_response_keeps_its_call_alone_in_memory(plain: Caller) -> None:
    """Its items are in the database already."""
    slots = plain.served.engine.slots = asyncio.Semaphore(0)
    asked = await plain.ask("x" * 4000, background=True)
    await until(lambda: plain.served.app[OPEN_REQUESTS].count == 1)  # the response alone
    text = (await plain.served.client.get("/metrics")).text
    slots.release()
    await plain.wait(asked.id)
    async with plain.served.app[RESPONSES].database.read() as connection:
        (row,) = (await connection.execute(select(TABLE.c.bytes, TABLE.c.context_bytes))).all()

    (line,) = [one for one in text.splitlines() if one.startswith("gateway_held_body_bytes ")]
    assert 4000 < float(line.split()[1]) < 8000
    assert row.context_bytes > 8000  # the fake engine says it again
    assert row.bytes > row.context_bytes


@pytest.mark.parametrize(
    ("headers", "lane"), [({}, "batch"), ({"X-Priority": "interactive"}, "interactive")]
)
async def test_background_response_goes_behind_those_who_wait(
    plain: Caller, headers: dict[str, str], lane: Any
) -> None:
    slots = plain.served.engine.slots = asyncio.Semaphore(0)
    asked = await plain.ask("hi", background=True, extra_headers=headers)
    (served,) = plain.served.app[MODELS].all
    inside = served.queue.count(lane)
    slots.release()
    await plain.wait(asked.id)

    assert inside == (1, 0)


async def test_background_response_outlasts_an_outage_of_the_engine(
    serve: Serve, stored: Any
) -> None:
    async with (
        serve(**stored, restart_hold_s=0.05) as served,
        open_sdk(served.url) as sdk,
    ):
        caller, pool = Caller(served, sdk), served.app[POOL]
        (model,) = served.app[MODELS].all
        served.engine.is_healthy = False
        await until(lambda: not pool.has_engine)
        asked = await caller.ask("hi", background=True)
        await until(lambda: model.queue.count("batch") == (0, 0))  # no others wait behind it
        with pytest.raises(openai.InternalServerError):
            await caller.ask("hi")
        held, begun = model.pool.held, await sdk.responses.retrieve(asked.id)
        served.engine.is_healthy = True
        told = await caller.wait(asked.id)
        used = served.app[ACCOUNTS].sum_usage()
        calls = [one for one in served.engine.calls if "input" in one]  # the rest is a warm-up

    assert (held, begun.status in {"queued", "in_progress"}) == (1, True)
    assert (told.status, told.output_text) == ("completed", "answer:hi")
    assert (len(calls), used.prompt_tokens) == (1, told.usage.input_tokens)


async def test_background_response_of_a_model_that_has_left_fails(
    serve: Serve, tmp_path: Path
) -> None:
    place, engines = str(tmp_path / "responses.sqlite"), (Behaviour(), Behaviour(model="other"))
    async with (
        serve(*engines, responses_database=place, restart_hold_s=0.05) as served,
        open_sdk(served.url) as sdk,
    ):
        pool, other = served.app[POOL], served.app[POOL].models["other"]
        engines[1].is_healthy = False
        await until(lambda: not other.has_engine)
        asked = await sdk.responses.create(model="other", input="hi", background=True)
        await pool.set_engines(pool.engines[:1])
        told = await Caller(served, sdk).wait(asked.id)

    assert (told.status, told.error.code) == ("failed", "server_error")
    assert "no engine is" in told.error.message


async def test_background_responses_leave_room_for_others_bodies(
    serve: Serve, tmp_path: Path
) -> None:
    place = str(tmp_path / "responses.sqlite")
    async with (
        serve(responses_database=place, max_held_bytes=12_000) as served,
        open_sdk(served.url) as sdk,
    ):
        caller, engine = Caller(served, sdk), served.engine
        slots = engine.slots = asyncio.Semaphore(0)
        asked = await caller.ask("x" * 3100, background=True)
        with pytest.raises(openai.RateLimitError, match="in the background") as refused:
            await caller.ask("x" * 3100, background=True)
        other = asyncio.create_task(caller.ask("x" * 3100))
        await until(lambda: engine.running == 2)
        for _ in range(2):
            slots.release()
        states = ((await other).status, (await caller.wait(asked.id)).status)
        again = await caller.ask("x" * 3100, background=True)
        slots.release()
        await caller.wait(again.id)

    assert refused.value.code == "too_many_bodies"
    assert "Retry-After" in refused.value.response.headers
    assert states == ("completed", "completed")


def read_modes(folder: Path) -> set[int]:
    """Of the database and what lies beside it."""
    return {path.stat().st_mode & 0o777 for path in folder.glob("responses.sqlite*")}


async def test_file_of_stored_responses_is_nobody_elses(plain: Caller, tmp_path: Path) -> None:
    await plain.ask("one")

    assert read_modes(tmp_path) == {0o600}


@pytest.fixture
async def database(stored: dict[str, Any]) -> AsyncIterator[Database]:
    place = stored["responses_database"]
    opened = open_database(
        place, setting="RESPONSES_DATABASE", keeps="stored responses", busy_timeout_s=2.0
    )
    yield opened
    await opened.close()


MakeStore = Callable[..., Store]


@pytest.fixture
def make_store(database: Database) -> MakeStore:
    def make(worker: str = "one", **settings: Any) -> Store:
        return Store(database, make_settings(**settings), worker)

    return make


def make_turn(name: str, previous: str | None = None) -> Turn:
    depth = 2 if previous else 1
    return Turn(f"resp_{name}", "alice", True, True, previous, b"", input=b"[]", depth=depth)


async def test_responses_whose_time_is_over_are_swept_from_the_last(make_store: MakeStore) -> None:
    short, long = make_store(responses_retention_days=1e-9), make_store()
    for turn in (make_turn("1"), make_turn("2", "resp_1"), make_turn("4")):
        await short.add(turn, split_output({**build_queued(turn, "fake"), "status": "completed"}))
    kept = make_turn("5", "resp_4")
    await long.add(kept, split_output({**build_queued(kept, "fake"), "status": "completed"}))
    await long.sweep()

    sizes: list[int] = []
    kept_ids = [name for name, _ in await long.list_inputs("alice", "resp_5", sizes.append)]
    assert kept_ids == ["resp_4", "resp_4_out", "resp_5"]
    for gone in ("resp_1", "resp_2", "resp_4"):
        with pytest.raises(NotFound):
            await long.find("alice", gone)


async def test_response_of_a_gateway_that_is_gone_fails(
    serve: Serve, stored: dict[str, Any], make_store: MakeStore
) -> None:
    turn = make_turn("1")
    turn.owner = "anonymous"
    await make_store("gone").add(turn, split_output(build_queued(turn, "fake")))
    async with (
        serve(**stored, responses_lease_s=0.2) as served,
        open_sdk(served.url) as sdk,
    ):
        told = await Caller(served, sdk).wait("resp_1")

    assert (told.status, told.error.code) == ("failed", "server_error")
    assert "gone" in told.error.message


async def test_gateway_that_was_given_up_writes_nothing_any_more(make_store: MakeStore) -> None:
    slow, other, turn = make_store("slow"), make_store("other"), make_turn("1")
    await slow.add(turn, split_output(build_queued(turn, "fake")))
    (row,) = await other.look((), ())
    await slow.look(["resp_1"], ["resp_1"])

    assert not await other.give_up(row, "it is gone")  # it has moved since
    (row,) = await other.look((), ())
    assert await other.give_up(row, "it is gone")
    assert not await slow.end(
        turn, split_output({**build_queued(turn, "fake"), "status": "completed"})
    )
    told = orjson.loads(await slow.find("alice", "resp_1"))
    assert (told["status"], told["error"]["message"]) == ("failed", "it is gone")


@pytest.mark.programs
async def test_background_response_of_a_killed_gateway_has_failed(
    serve: Serve, tmp_path: Path
) -> None:
    place = str(tmp_path / "responses.sqlite")
    engine = Behaviour()
    async with serve_app(build_fake_engine(engine)) as engine_url:
        flags = ("--responses-database", place, "--warmup-prompts", "2")
        async with serve_process(tmp_path, engine_url, *flags) as gateway:
            async with open_sdk(gateway.url) as sdk:
                await until(lambda: engine.calls)
                engine.slots = asyncio.Semaphore(0)
                asked = await sdk.responses.create(model="fake", input="hi", background=True)
                await until(lambda: engine.running)
            gateway.process.kill()
        async with (
            serve(responses_database=place, responses_lease_s=0.2) as served,
            open_sdk(served.url) as sdk,
        ):
            told = await Caller(served, sdk).wait(asked.id)

    assert told.status == "failed"
