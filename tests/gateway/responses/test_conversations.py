"""`store` and `previous_response_id`: a conversation outlives its engine and its gateway."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import orjson
import pytest
from openai.types.responses.response_item_list import ResponseItemList

from gateway.observability.request_record import RequestRecord
from gateway.request_body import BODIES
from gateway.request_context import RequestContext
from gateway.responses.events import sign_events
from gateway.responses.items import list_page
from gateway.responses.shapes import read_response
from gateway.responses.turns import Turn
from gateway.schemas.pages import Page
from tests.fake_engine import Behaviour
from tests.gateway.batches.conftest import open_sdk
from tests.gateway.conftest import Serve, Served
from tests.gateway.responses.conftest import Caller, Keys, check_shape, until


def said(role: str, text: str) -> dict[str, Any]:
    return {"type": "message", "role": role, "content": text}


async def test_conversation_goes_on_with_another_engine_after_a_restart(
    serve: Serve, stored: dict[str, Any]
) -> None:
    async with serve(**stored) as served, open_sdk(served.url) as sdk:
        first = await Caller(served, sdk).ask("one", instructions="Be brief.")
    async with serve(**stored) as served, open_sdk(served.url) as sdk:
        caller = Caller(served, sdk)
        second = await caller.ask("two", previous_response_id=first.id)
        third = await caller.ask("three", previous_response_id=second.id)
        (call,) = served.engine.calls[-1:]

    assert (second.previous_response_id, third.previous_response_id) == (first.id, second.id)
    assert third.output_text == "answer:three"
    roles = [(item["role"], item["content"]) for item in call["input"]]
    assert [role for role, _ in roles] == ["user", "assistant"] * 2 + ["user"]
    assert [text for role, text in roles if role == "user"] == ["one", "two", "three"]
    assert [text[0]["text"] for role, text in roles if role == "assistant"] == [
        "answer:one",
        "answer:two",
    ]
    # The engine stores nothing, and instructions are those of the call alone.
    assert call["store"] is False
    assert "previous_response_id" not in call
    assert "instructions" not in call


async def test_stored_response_is_told_as_it_was_answered(caller: Caller) -> None:
    answered = await caller.ask("hi", metadata={"a": "b"}, instructions="Be brief.")
    told = await caller.sdk.responses.retrieve(answered.id)

    assert told == answered
    assert answered.id.startswith("resp_")
    assert (told.metadata, told.instructions) == ({"a": "b"}, "Be brief.")
    assert (told.status, told.store, told.background) == ("completed", True, False)
    check_shape(told)


async def test_call_that_stores_nothing_reaches_the_engine_as_it_is(plain: Caller) -> None:
    answer = await plain.ask("hi", store=False)

    assert plain.served.engine.calls == [{"model": "fake", "input": "hi", "store": False}]
    assert answer.id == "resp-1"
    with pytest.raises(openai.BadRequestError, match="'resp-1' not found"):
        await plain.ask("more", previous_response_id=answer.id)


async def test_call_that_stores_nothing_may_go_on(plain: Caller) -> None:
    first = await plain.ask("one")
    second = await plain.ask("two", previous_response_id=first.id, store=False)

    assert [item["role"] for item in plain.last_input()] == ["user", "assistant", "user"]
    assert (second.previous_response_id, second.store) == (first.id, False)
    with pytest.raises(openai.NotFoundError):
        await plain.sdk.responses.retrieve(second.id)


async def test_first_call_of_a_conversation_has_its_input_as_it_was(plain: Caller) -> None:
    items = [said("user", "\U0001f600 one")]
    await plain.ask("hi")
    text = plain.last_input()
    await plain.sdk.responses.create(model="fake", input=items)

    assert (text, plain.last_input()) == ("hi", items)


async def test_outputs_of_tools_go_on(plain: Caller) -> None:
    first = await plain.ask("one")
    output = {"type": "function_call_output", "call_id": "call_1", "output": "42"}
    await plain.sdk.responses.create(model="fake", input=[output], previous_response_id=first.id)

    assert plain.last_input()[-1] == output


async def test_conversation_may_branch(plain: Caller) -> None:
    first = await plain.ask("one")
    await plain.ask("two", previous_response_id=first.id)
    await plain.ask("three", previous_response_id=first.id)

    assert [item["content"] for item in plain.last_input()[::2]] == ["one", "three"]


async def test_input_items_are_listed_page_by_page(caller: Caller) -> None:
    first = await caller.ask("one")
    second = await caller.sdk.responses.create(
        model="fake",
        input=[said("system", "Be brief."), {"role": "user", "content": "two"}],
        previous_response_id=first.id,
    )
    items = caller.sdk.responses.input_items

    page = await items.list(second.id, order="asc", limit=2)
    everything = [item async for item in items.list(second.id, order="asc", limit=1)]
    newest = await items.list(second.id, limit=1)

    assert [item.role for item in everything] == ["user", "assistant", "system", "user"]
    assert [item.content[0].text for item in everything] == [
        "one",
        "answer:one",
        "Be brief.",
        "two",
    ]
    assert len({item.id for item in everything}) == 4
    assert [item.content[0].type for item in everything[:2]] == ["input_text", "output_text"]
    assert (len(page.data), page.has_more, newest.data[0]) == (2, True, everything[-1])
    ResponseItemList.model_validate(
        (await items.with_raw_response.list(second.id)).http_response.json()
    )


async def test_input_items_after_one_that_is_not_there_are_refused(plain: Caller) -> None:
    first = await plain.ask("one")

    with pytest.raises(openai.BadRequestError, match="after"):
        await plain.sdk.responses.input_items.list(first.id, after="msg_x")


async def test_input_item_whose_type_is_no_word_is_listed(plain: Caller) -> None:
    odd = {"type": {"a": "b"}, "role": "user", "content": "hi"}
    first = await plain.sdk.responses.create(model="fake", input=[odd])
    answer = await plain.served.client.get(f"/v1/responses/{first.id}/input_items")

    assert answer.status_code == 200, answer.text
    (item,) = answer.json()["data"]
    assert (item["type"], item["content"][0]["text"]) == ("message", "hi")


async def test_input_items_that_are_read_count_among_the_bytes_in_memory(
    serve: Serve, tmp_path: Path
) -> None:
    place, most = str(tmp_path / "responses.sqlite"), 100_000
    async with (
        serve(responses_database=place, max_held_bytes=most) as served,
        open_sdk(served.url) as sdk,
    ):
        first = await Caller(served, sdk).ask("x" * 4000)
        bodies, others = served.app[BODIES], RequestContext("", RequestRecord(""))
        bodies.hold(others, most - 4000)
        path = f"/v1/responses/{first.id}/input_items"
        refused = await served.client.get(path)
        bodies.release(others)
        answer = await served.client.get(path)

    assert (refused.status_code, answer.status_code) == (429, 200)
    assert refused.json()["error"]["code"] == "too_many_bodies"


@pytest.mark.parametrize("ascending", [True, False])
async def test_others_have_the_event_loop_while_a_page_is_read(ascending: bool) -> None:
    texts = ["x" * 100] * 60_000
    items = orjson.dumps([said("user", text) for text in texts])
    reading = asyncio.create_task(list_page([("resp_1", items)], Page(None, 2, ascending)))
    turns = 0
    while not reading.done():
        await asyncio.sleep(0)
        turns += 1
    page = orjson.loads(await reading)

    assert turns > len(items) / 2**19  # what is passed over at once
    ends = ["msg_1_0", "msg_1_1"] if ascending else ["msg_1_59999", "msg_1_59998"]
    assert ([one["id"] for one in page["data"]], page["has_more"]) == (ends, True)
    assert (page["first_id"], page["last_id"]) == tuple(ends)


async def test_others_have_the_event_loop_while_a_large_answer_is_stored() -> None:
    chances = [{"token": "a", "logprob": -0.1}] * 200_000
    output = [{"type": "message", "content": [{"text": "a", "logprobs": chances}]}]
    answer = {"id": "a", "output": output, "status": "completed", "model": "fake"}
    body = orjson.dumps(answer)
    reading = asyncio.create_task(read_response(body, {"id": "resp_1"}))
    turns = 0
    while not reading.done():
        await asyncio.sleep(0)
        turns += 1
    told = await reading

    assert turns > len(body) / 2**20
    assert orjson.loads(told.build()) == {**answer, "id": "resp_1"}
    assert orjson.loads(told.rest)["output"] == []
    assert orjson.loads(told.output) == output


async def test_others_have_the_event_loop_while_the_end_of_a_large_stream_is_read() -> None:
    chances = [{"token": "a", "logprob": -0.1}] * 200_000
    output = [{"type": "message", "content": [{"text": "a", "logprobs": chances}]}]
    answer = {"id": "a", "output": output, "status": "completed", "model": "fake"}
    event = orjson.dumps({"type": "response.completed", "response": answer, "sequence_number": 9})
    turn = Turn("resp_1", "alice", True, False, None, b"")
    reading = asyncio.create_task(sign_events(turn, b"data: {}\n\ndata: " + event + b"\n\n"))
    turns = 0
    while not reading.done():
        await asyncio.sleep(0)
        turns += 1
    passed, withheld, told = await reading

    assert turns > len(event) / 2**20
    assert passed == b"data: {}\n\n"
    assert orjson.loads(withheld.removeprefix(b"data: "))["response"]["id"] == "resp_1"
    assert told is not None
    assert orjson.loads(told.output) == output


async def test_deleted_response_is_gone_and_nothing_goes_on_from_it(caller: Caller) -> None:
    first = await caller.ask("one")
    second = await caller.ask("two", previous_response_id=first.id)
    raw = await caller.sdk.responses.with_raw_response.delete(first.id)

    assert raw.http_response.json() == {"id": first.id, "object": "response", "deleted": True}
    for gone in (
        caller.sdk.responses.retrieve(first.id),
        caller.sdk.responses.delete(first.id),
        caller.sdk.responses.input_items.list(first.id),
    ):
        with pytest.raises(openai.NotFoundError):
            await gone
    for previous in (first.id, second.id):
        with pytest.raises(openai.BadRequestError) as failure:
            await caller.ask("three", previous_response_id=previous)
        assert failure.value.code == "previous_response_not_found"
    assert (await caller.sdk.responses.retrieve(second.id)).output_text == "answer:two"


async def test_response_that_was_not_in_the_background_cannot_be_cancelled(plain: Caller) -> None:
    first = await plain.ask("one")

    with pytest.raises(openai.BadRequestError, match="Cannot cancel a synchronous response"):
        await plain.sdk.responses.cancel(first.id)


async def test_stream_is_stored_before_it_ends(caller: Caller) -> None:
    first = await caller.ask("one")
    stream = await caller.ask("two", previous_response_id=first.id, stream=True)
    events = [event async for event in stream]
    told = await caller.sdk.responses.retrieve(events[-1].response.id)

    kinds = [event.type for event in events]
    assert kinds[:2] == ["response.created", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert "".join(e.delta for e in events if e.type.endswith(".delta")) == "answer:two"
    assert told == events[-1].response
    assert told.output_text == "answer:two"
    shown = [event.response for event in events if hasattr(event, "response")]
    assert {(one.id, one.previous_response_id) for one in shown} == {(told.id, first.id)}


async def test_stream_that_breaks_is_not_stored(plain: Caller) -> None:
    plain.served.engine.stream_cut_after = 6
    stream = await plain.ask("one", stream=True)
    events = [event async for event in stream]

    assert events[-1].type == "error"
    with pytest.raises(openai.NotFoundError):
        await plain.sdk.responses.retrieve(events[0].response.id)


async def test_response_that_the_engine_refused_is_told_so(plain: Caller) -> None:
    plain.served.engine.refuses = lambda text: text == "bad"

    with pytest.raises(openai.BadRequestError, match="not to my taste"):
        await plain.ask("bad")


async def test_responses_are_their_keys_alone(
    serve: Serve, stored: dict[str, Any], keys: Keys
) -> None:
    options = keys.write(alice="", bob="")
    async with (
        serve(**stored, **options) as served,
        open_sdk(served.url, keys.keys["alice"]) as alice,
        open_sdk(served.url, keys.keys["bob"]) as bob,
    ):
        first = await Caller(served, alice).ask("one")
        for stranger in (
            bob.responses.retrieve(first.id),
            bob.responses.delete(first.id),
            bob.responses.cancel(first.id),
            bob.responses.input_items.list(first.id),
        ):
            with pytest.raises(openai.NotFoundError):
                await stranger
        with pytest.raises(openai.BadRequestError):
            await Caller(served, bob).ask("two", previous_response_id=first.id)
        assert await alice.responses.retrieve(first.id) == first

        keys.path.write_text("")
        refused = None
        while refused is None:
            try:
                await alice.responses.retrieve(first.id)
            except openai.AuthenticationError as error:
                refused = error


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"previous_response_id": "a b"}, "previous_response_id"),
        ({"previous_response_id": 3}, "previous_response_id"),
        ({"store": "perhaps"}, "store"),
        ({"background": True, "store": False}, "background"),
        ({"background": True, "stream": "perhaps"}, "stream"),
        ({"conversation": "conv_1"}, "conversation"),
        ({"input": {"a": 1}, "background": True}, "input"),
        ({"input": None, "background": True}, "input"),
    ],
)
async def test_call_with_a_mistake_is_refused(
    plain: Caller, fields: dict[str, Any], param: str
) -> None:
    body = {"model": "fake", "input": "hi", **fields}
    answer = await plain.served.client.post("/v1/responses", json=body)

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)
    assert plain.served.engine.calls == []


async def test_gateway_without_a_database_says_which_setting_it_needs(served: Served) -> None:
    body = {"model": "fake", "input": "hi", "previous_response_id": "resp_1"}
    answers = [
        await served.client.post("/v1/responses", json=body),
        await served.client.delete("/v1/responses/resp_1"),
        await served.client.get("/v1/responses/resp_1/input_items"),
        await served.client.post("/v1/responses", json={"input": "hi", "background": True}),
    ]

    assert [one.status_code for one in answers] == [400, 404, 404, 400]
    for one in answers:
        assert "GATEWAY_RESPONSES_DATABASE" in one.json()["error"]["message"]
    assert answers[0].json()["error"]["param"] == "previous_response_id"


async def test_engine_that_stores_goes_on_without_a_database(serve: Serve) -> None:
    async with serve(Behaviour(responses=("resp_1",))) as served:
        body = {"model": "fake", "input": "hi", "previous_response_id": "resp_1"}
        answer = await served.client.post("/v1/responses", json=body)

    assert answer.status_code == 200


async def test_folder_that_is_not_there_stops_the_start(serve: Serve, tmp_path: Path) -> None:
    with pytest.raises(Exception, match="GATEWAY_RESPONSES_DATABASE"):
        async with serve(responses_database=str(tmp_path / "none" / "x.sqlite")):
            pass


@pytest.mark.parametrize("path", ["", "/input_items"])
async def test_page_of_another_site_reads_no_stored_response(plain: Caller, path: str) -> None:
    first = await plain.ask("one")
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}
    answer = await plain.served.client.get(f"/v1/responses/{first.id}{path}", headers=link)

    assert (answer.status_code, answer.json()["error"]["code"]) == (403, "cross_site")


async def test_bytes_that_wait_to_be_stored_are_counted(plain: Caller) -> None:
    """And are let go of when they are, in the background, too."""
    slots = plain.served.engine.slots = asyncio.Semaphore(0)

    async def read() -> float:
        text = (await plain.served.client.get("/metrics")).text
        (line,) = [one for one in text.splitlines() if one.startswith("gateway_held_body_bytes ")]
        return float(line.split()[1])

    async def is_held() -> bool:
        return await read() >= 2000

    async def is_released() -> bool:
        return await read() == 0

    first = await plain.ask("x" * 2000, background=True)
    await until(is_held)
    slots.release()
    await plain.wait(first.id)
    await until(is_released)
    stream = await plain.ask("y" * 2000, stream=True, previous_response_id=first.id)
    [event async for event in stream]
    await until(is_released)
