"""`background` with `stream`: events that are numbered and kept, read again from any of them."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy import func, select

from gateway.admission.accounts import ACCOUNTS
from gateway.responses.access import RESPONSES
from gateway.responses.event_log import EventLog
from gateway.storage.tables import RESPONSE_EVENTS
from tests.fake_engine import Behaviour, build_fake_engine, serve_app
from tests.gateway.batches.conftest import open_sdk
from tests.gateway.conftest import Serve
from tests.gateway.process import serve_process
from tests.gateway.responses.conftest import Caller, Keys, check_shape, until

_FIRST_DELTAS = 7  # what the engine has told when it pauses


class Pause:
    """An engine that stops in the middle of a stream until it may go on."""

    def __init__(self, engine: Behaviour) -> None:
        self.is_there, self.may_go_on = asyncio.Event(), asyncio.Event()
        engine.before_event = self._wait

    async def _wait(self, number: int) -> None:
        if number == _FIRST_DELTAS:
            self.is_there.set()
            await self.may_go_on.wait()


def tell_text(events: list[Any]) -> str:
    return "".join(one.delta for one in events if one.type == "response.output_text.delta")


async def read_some(stream: Any, count: int) -> list[Any]:
    events: list[Any] = []
    async for event in stream:
        events.append(event)
        if len(events) == count:
            break
    return events


async def test_background_stream_is_told_and_stored(caller: Caller) -> None:
    stream = await caller.ask("hi", background=True, stream=True, metadata={"a": "b"})
    events = [event async for event in stream]
    told = await caller.sdk.responses.retrieve(events[0].response.id)
    again = await caller.sdk.responses.retrieve(told.id, stream=True)

    kinds = [one.type for one in events]
    assert kinds[:3] == ["response.created", "response.queued", "response.in_progress"]
    assert kinds[-1] == "response.completed"
    assert kinds.count("response.created") == 1
    assert [one.sequence_number for one in events] == list(range(len(events)))
    assert tell_text(events) == told.output_text == "answer:hi"
    assert events[-1].response == told
    shown = [one.response for one in events if hasattr(one, "response")]
    for one in shown:
        check_shape(one)
        assert (one.id, one.background, one.created_at) == (told.id, True, told.created_at)
    assert [one.status for one in shown[:2]] == ["queued", "queued"]
    assert [event async for event in again] == events


async def test_background_stream_goes_on_when_its_caller_hangs_up(caller: Caller) -> None:
    engine = caller.served.engine
    pause = Pause(engine)
    stream = await caller.ask("hi", background=True, stream=True)
    first = await read_some(stream, _FIRST_DELTAS + 1)
    await stream.close()
    name, last = first[0].response.id, first[-1].sequence_number
    going_on = await caller.sdk.responses.retrieve(name, stream=True, starting_after=last - 1)
    once_more = await read_some(going_on, 1)
    pause.may_go_on.set()
    rest = [event async for event in going_on]
    ended = await caller.sdk.responses.retrieve(name, stream=True, starting_after=last)
    nothing = await caller.sdk.responses.retrieve(
        name, stream=True, starting_after=rest[-1].sequence_number
    )

    assert once_more == first[-1:]
    assert [one.sequence_number for one in rest] == list(range(last + 1, last + 1 + len(rest)))
    assert tell_text(first + rest) == "answer:hi"
    assert rest[-1].response.status == "completed"
    assert [event async for event in ended] == rest
    assert [event async for event in nothing] == []
    assert engine.cancelled == 0


async def test_background_stream_is_followed_through_another_gateway(
    serve: Serve, stored: Any
) -> None:
    engine = Behaviour()
    async with (
        serve(engine, **stored, responses_lease_s=0.5) as one,
        serve(**stored) as other,
        open_sdk(one.url) as sdk,
        open_sdk(other.url) as elsewhere,
    ):
        pause = Pause(engine)
        stream = await Caller(one, sdk).ask("hi", background=True, stream=True)
        (created,) = await read_some(stream, 1)
        following = await elsewhere.responses.retrieve(created.response.id, stream=True)
        first = await read_some(following, _FIRST_DELTAS + 1)
        pause.may_go_on.set()
        rest = [event async for event in following]
        mine = [created, *[event async for event in stream]]

    assert first + rest == mine


async def test_background_stream_of_more_than_a_log_holds_is_told_whole(plain: Caller) -> None:
    """The engine waits while its events are stored, and who reads slowly finds them there."""
    plain.served.engine.max_model_len = 10**6
    text = "x" * 4000
    stream = await plain.ask(text, background=True, stream=True)
    first = await read_some(stream, 1)
    await plain.wait(first[0].response.id, "completed")
    events = [*first, *[event async for event in stream]]

    assert tell_text(events) == f"answer:{text}"
    assert [one.sequence_number for one in events] == list(range(len(events)))


async def test_background_stream_outlives_its_gateway(serve: Serve, stored: Any) -> None:
    async with serve(**stored) as served, open_sdk(served.url) as sdk:
        stream = await Caller(served, sdk).ask("hi", background=True, stream=True)
        events = [event async for event in stream]
    async with serve(**stored) as served, open_sdk(served.url) as sdk:
        again = await sdk.responses.retrieve(events[0].response.id, stream=True)
        assert [event async for event in again] == events


async def test_background_stream_that_breaks_has_failed(plain: Caller) -> None:
    plain.served.engine.stream_cut_after = 6
    stream = await plain.ask("hi", background=True, stream=True)
    events = [event async for event in stream]
    told = await plain.sdk.responses.retrieve(events[0].response.id)

    assert events[-1].type == "response.failed"
    assert events[-1].response == told
    assert (told.status, told.error.code) == ("failed", "server_error")
    assert [one.sequence_number for one in events] == list(range(len(events)))
    check_shape(told)


async def test_background_stream_that_the_engine_refuses_says_why(plain: Caller) -> None:
    plain.served.engine.refuses = lambda _: True
    stream = await plain.ask("hi", background=True, stream=True)
    events = [event async for event in stream]

    kinds = [one.type for one in events]
    assert kinds == ["response.created", "response.queued", "response.failed"]
    assert "taste" in events[-1].response.error.message


async def test_background_stream_that_is_cancelled_ends_and_is_charged(plain: Caller) -> None:
    engine = plain.served.engine
    Pause(engine)
    stream = await plain.ask("hi", background=True, stream=True)
    first = await read_some(stream, _FIRST_DELTAS + 1)
    await plain.sdk.responses.cancel(first[0].response.id)
    rest = [event async for event in stream]
    await until(lambda: engine.cancelled == 1)
    used = plain.served.app[ACCOUNTS].sum_usage()

    assert [one.type for one in rest] == ["response.incomplete"]
    assert rest[0].response.status == "cancelled"
    assert used.completion_tokens >= len(tell_text(first))


async def test_background_stream_that_is_deleted_leaves_no_events(caller: Caller) -> None:
    stream = await caller.ask("hi", background=True, stream=True)
    events = [event async for event in stream]
    Pause(caller.served.engine)
    running = await caller.ask("hi", background=True, stream=True)
    first = await read_some(running, _FIRST_DELTAS + 1)
    for one in (events, first):
        await caller.sdk.responses.delete(one[0].response.id)
    rest = [event async for event in running]

    async def count() -> int:
        async with caller.served.app[RESPONSES].database.read() as connection:
            query = select(func.count()).select_from(RESPONSE_EVENTS)
            return int((await connection.execute(query)).scalar_one())

    assert [(one.type, one.code) for one in rest] == [("error", "response_not_found")]
    assert rest[0].sequence_number == first[-1].sequence_number + 1
    assert await count() == 0


async def test_background_stream_is_its_keys_alone(serve: Serve, keys: Keys, stored: Any) -> None:
    options = keys.write(alice="", bob="")
    async with (
        serve(**stored, **options) as served,
        open_sdk(served.url, keys.keys["alice"]) as alice,
        open_sdk(served.url, keys.keys["bob"]) as bob,
    ):
        stream = await Caller(served, alice).ask("hi", background=True, stream=True)
        events = [event async for event in stream]
        with pytest.raises(openai.NotFoundError):
            await bob.responses.retrieve(events[0].response.id, stream=True)


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("stream=true", "stream"),
        ("stream=perhaps", "stream"),
        ("stream=true&starting_after=-1", "starting_after"),
        ("stream=true&starting_after=soon", "starting_after"),
    ],
)
async def test_stream_that_is_not_there_is_refused(plain: Caller, query: str, param: str) -> None:
    first = await plain.ask("one")
    answer = await plain.served.client.get(f"/v1/responses/{first.id}?{query}")

    assert (answer.status_code, answer.json()["error"]["param"]) == (400, param)


@pytest.mark.programs
async def test_background_stream_of_a_killed_gateway_ends(serve: Serve, tmp_path: Path) -> None:
    place, engine = str(tmp_path / "responses.sqlite"), Behaviour()
    async with serve_app(build_fake_engine(engine)) as engine_url:
        flags = ("--responses-database", place, "--warmup-prompts", "2")
        async with (
            serve_process(tmp_path, engine_url, *flags) as gateway,
            open_sdk(gateway.url) as sdk,
        ):
            Pause(engine)
            stream = await sdk.responses.create(
                model="fake", input="hi", background=True, stream=True
            )
            first = await read_some(stream, _FIRST_DELTAS + 1)
            gateway.process.kill()
        async with (
            serve(responses_database=place, responses_lease_s=0.2) as served,
            open_sdk(served.url) as sdk,
        ):
            going_on = await sdk.responses.retrieve(
                first[0].response.id, stream=True, starting_after=first[-1].sequence_number
            )
            (end,) = [event async for event in going_on]

    assert (end.type, end.response.status) == ("response.failed", "failed")
    assert end.sequence_number == first[-1].sequence_number + 1


async def test_log_that_is_full_has_room_again_when_it_is_stored() -> None:
    told: list[int] = []
    log = EventLog(lambda: told.append(1))
    while not log.is_full:
        assert not told
        log.append("response.output_text.delta", {"delta": b'"' + b"x" * 2**14 + b'"'})
    assert told
    last, events = log.read(-1)
    piece = await log.take()
    assert piece is not None
    log.append("response.output_text.delta", {"delta": b'"y"'})
    log.let_go(piece)

    assert not log.is_full
    assert piece.size < 2**14
    assert piece.unpack(-1) == (last, events)
    assert piece.unpack(last - 1)[1] == events[events.rindex(b"event: ") :]
    assert not log.has_after(last - 1)
    assert log.read(last)[0] == last + 1
