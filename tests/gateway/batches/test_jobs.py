"""Batches through OpenAI's SDK: what is run, what stands in the files, how a batch ends."""

from __future__ import annotations

import asyncio
import itertools
import os
import re
import time
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy import create_engine, text

from gateway.admission.accounts import ACCOUNTS
from gateway.admission.keys import make_key
from gateway.admission.served_models import MODELS
from gateway.batches import coordinator
from tests.fake_engine import Behaviour
from tests.gateway.batches.conftest import CHAT, Batches, ask, open_batches, until
from tests.gateway.conftest import serve_gateway


def read_answers(lines: list[dict[str, Any]]) -> dict[str, str]:
    """By `custom_id`; each is there once."""
    found = {
        line["custom_id"]: line["response"]["body"]["choices"][0]["message"]["content"]
        for line in lines
    }
    assert len(found) == len(lines)
    return found


def check_counts(batch: Any, good: list[Any], bad: list[Any]) -> None:
    counts = batch.request_counts
    assert (counts.completed, counts.failed) == (len(good), len(bad))
    assert counts.total == counts.completed + counts.failed


async def test_batch_answers_every_line_in_order_and_counts_them(storage: dict[str, Any]) -> None:
    async with serve_gateway(**storage) as served, open_batches(served) as batches:
        batch_id = await batches.create([ask(n) for n in range(60)], metadata={"of": "me"})
        batch = await batches.wait(batch_id)
        output = await batches.read(batch.output_file_id)
        listed = [one async for one in batches.sdk.batches.list()]
        file = await batches.sdk.files.retrieve(batch.output_file_id)

    assert batch.status == "completed"
    assert batch.metadata == {"of": "me"}
    assert batch.model == "fake"
    assert batch.error_file_id is None
    assert batch.created_at <= batch.in_progress_at <= batch.finalizing_at <= batch.completed_at
    assert [line["custom_id"] for line in output] == [f"line-{n}" for n in range(60)]
    assert read_answers(output) == {f"line-{n}": f"answer:question {n}" for n in range(60)}
    assert all(line["response"]["status_code"] == 200 for line in output)
    assert all(line["error"] is None for line in output)
    assert listed == [batch]
    assert file.purpose == "batch_output"
    check_counts(batch, output, [])


BODIES = {
    "/v1/completions": {"model": "fake", "prompt": "hello"},
    "/v1/embeddings": {"model": "fake", "input": "hello"},
    "/v1/responses": {"model": "fake", "input": "hello"},
}


@pytest.mark.parametrize("endpoint", BODIES)
async def test_batch_of_another_endpoint_is_answered(batches: Batches, endpoint: str) -> None:
    line = {"custom_id": "a", "method": "POST", "url": endpoint, "body": BODIES[endpoint]}

    batch = await batches.wait(await batches.create([line], endpoint=endpoint))
    [answer] = await batches.read(batch.output_file_id)
    direct = await batches.served.client.post(endpoint, json=BODIES[endpoint])

    assert answer["response"]["body"] == direct.json()
    assert answer["response"]["request_id"] == f"{batch.id}-0"


async def test_line_with_a_long_list_comes_in_by_pieces(tmp_path: Path) -> None:
    url = "/v1/completions"
    body = {"model": "fake", "prompt": [f"{n}" for n in range(60)]}
    lines = [
        {"custom_id": "long", "method": "POST", "url": url, "body": body},
        {"custom_id": "bad", "method": "POST", "url": url, "body": {**body, "n": 16}},
    ]
    settings: dict[str, Any] = {"batch_folder": tmp_path / "batches", "engine_sequences": 16}
    async with serve_gateway(**settings) as served, open_batches(served) as batches:
        batch = await batches.wait(await batches.create(lines, endpoint=url))
        [good] = await batches.read(batch.output_file_id)
        [bad] = await batches.read(batch.error_file_id)
        calls = [len(call["prompt"]) for call in served.engine.calls]
        used = served.app[ACCOUNTS].sum_usage()

    answer = good["response"]["body"]
    texts = [one["text"].strip() for one in answer["choices"]]
    assert texts == [f"answer:{n}" for n in range(60)]
    assert (sum(calls), max(calls)) == (60, 1)
    assert (used.prompt_tokens, used.completion_tokens) == (110, 120)
    assert bad["response"]["body"]["error"]["message"].startswith("n must be at most 15")


@pytest.mark.parametrize("ending", ["refused", "cancelled"])
async def test_long_list_of_a_line_that_breaks_off_is_charged_for_what_ran(
    tmp_path: Path, ending: str
) -> None:
    """Fourteen run on beside the short ones."""

    def delay(prompt: str) -> float:
        number = int(prompt) if prompt.isdigit() else 0
        return 60 if 30 <= number < 44 else 0.2 if number == 59 else 0

    url = "/v1/completions"
    body = {"model": "fake", "prompt": [f"{n}" for n in range(100)], "max_tokens": 10}
    line = {"custom_id": "long", "method": "POST", "url": url, "body": body}
    engine = Behaviour(delays=delay)
    if ending == "refused":
        engine.refuses = lambda prompt: prompt == "60"
    else:
        engine.delays = lambda prompt: 60 if prompt == "60" else delay(prompt)
    settings: dict[str, Any] = {"batch_folder": tmp_path / "batches", "engine_sequences": 16}
    async with serve_gateway(engine, **settings) as served, open_batches(served) as batches:
        served.app[ACCOUNTS]._pace.learn(100, 1)
        batch_id = await batches.create([line], endpoint=url)
        if ending == "cancelled":
            await until(lambda: any(call.get("prompt") == ["60"] for call in engine.calls))
            await batches.sdk.batches.cancel(batch_id)
        await batches.wait(batch_id)
        used = served.app[ACCOUNTS].sum_usage()

    assert 46 * 2 + 14 * 10 <= used.completion_tokens <= 46 * 2 + 15 * 10


async def test_lines_that_are_refused_stand_in_the_error_file(batches: Batches) -> None:
    lines = [ask(0), ask(1, model="gone"), ask(2, n=1000), ask(3)]

    batch = await batches.wait(await batches.create(lines))
    good = await batches.read(batch.output_file_id)
    bad = await batches.read(batch.error_file_id)

    assert batch.status == "completed"
    assert sorted(read_answers(good)) == ["line-0", "line-3"]
    assert [line["custom_id"] for line in bad] == ["line-1", "line-2"]
    assert [line["response"]["status_code"] for line in bad] == [404, 400]
    assert bad[1]["response"]["body"]["error"]["param"] == "n"
    check_counts(batch, good, bad)


async def test_line_of_large_and_broken_json_is_refused_as_the_route_would(
    batches: Batches,
) -> None:
    """Above 256 KiB a body is not parsed when it is uploaded."""
    large = {**ask(0), "body": {"model": "fake", "messages": [{"role": "user", "content": "x"}]}}
    batches.served.engine.max_model_len = 64
    long = ask(1, "x" * 300_000)

    batch = await batches.wait(await batches.create([large, long]))
    good, bad = await batches.read(batch.output_file_id), await batches.read(batch.error_file_id)

    assert [line["custom_id"] for line in good] == ["line-0"]
    assert bad[0]["response"]["body"]["error"]["code"] == "prompt_too_long"


async def test_batch_is_refused_where_it_cannot_be_run(batches: Batches) -> None:
    file_id = await batches.upload([ask(0)])

    async def create(**fields: Any) -> openai.APIStatusError:
        options: dict[str, Any] = {"input_file_id": file_id, "endpoint": CHAT}
        options |= {"completion_window": "24h"} | fields
        with pytest.raises(openai.APIStatusError) as refused:
            await batches.sdk.batches.create(**options)
        return refused.value

    other = await create(endpoint="/v1/embeddings")
    unknown = await create(endpoint="/v1/models")
    window = await create(completion_window="soon")
    gone = await create(input_file_id="file-1")
    metadata = await create(metadata={"a": "x" * 1000})

    assert (other.status_code, other.code) == (400, "mismatched_url")
    assert "line 1" in other.message
    assert (unknown.status_code, unknown.param) == (400, "endpoint")
    assert (window.status_code, window.param) == (400, "completion_window")
    assert (gone.status_code, gone.code) == (404, "file_not_found")
    assert (metadata.status_code, metadata.param) == (400, "metadata")


async def test_output_of_a_batch_is_no_input_of_another(batches: Batches) -> None:
    batch = await batches.wait(await batches.create([ask(0)]))

    with pytest.raises(openai.BadRequestError, match="file of answers"):
        await batches.sdk.batches.create(
            input_file_id=batch.output_file_id, endpoint=CHAT, completion_window="24h"
        )


async def test_cancelled_batch_keeps_what_was_answered(batches: Batches) -> None:
    engine = batches.served.engine
    engine.delays = lambda question: 0 if question in {"question 0", "question 1"} else 60
    batch_id = await batches.create([ask(n) for n in range(40)])

    async def has_some() -> bool:
        batch = await batches.sdk.batches.retrieve(batch_id)
        return batch.request_counts is not None and batch.request_counts.completed == 2

    await until(has_some)
    asked = await batches.sdk.batches.cancel(batch_id)
    again = await batches.sdk.batches.cancel(batch_id)
    batch = await batches.wait(batch_id)
    good, bad = await batches.read(batch.output_file_id), await batches.read(batch.error_file_id)

    assert asked.status == "cancelling"
    assert again.status in {"cancelling", "cancelled"}
    assert batch.status == "cancelled"
    assert sorted(read_answers(good)) == ["line-0", "line-1"]
    assert {line["error"]["code"] for line in bad} == {"batch_cancelled"}
    check_counts(batch, good, bad)
    await until(lambda: not engine.running)


async def test_batch_that_has_ended_cannot_be_cancelled(batches: Batches) -> None:
    batch = await batches.wait(await batches.create([ask(0)]))

    with pytest.raises(openai.ConflictError) as refused:
        await batches.sdk.batches.cancel(batch.id)

    assert refused.value.code == "batch_ended"


async def test_batch_whose_time_is_over_expires_with_what_was_answered(batches: Batches) -> None:
    engine = batches.served.engine
    engine.delays = lambda question: 0 if question == "question 0" else 60
    batch_id = await batches.create([ask(n) for n in range(5)], completion_window="2s")

    batch = await batches.wait(batch_id)
    good, bad = await batches.read(batch.output_file_id), await batches.read(batch.error_file_id)

    assert batch.status == "expired"
    assert batch.expired_at >= batch.expires_at == batch.created_at + 2
    assert {line["error"]["code"] for line in bad} == {"batch_expired"}
    check_counts(batch, good, bad)


async def test_batch_ends_with_its_key(tmp_path: Path) -> None:
    (key, entry), (other, rest) = make_key("alice"), make_key("bob")
    keys = tmp_path / "keys.toml"
    keys.write_text(entry + rest)
    folder = tmp_path / "batches"
    async with serve_gateway(batch_folder=folder, keys_file=keys) as served:
        served.engine.delay_s = 60
        async with open_batches(served, key) as batches:
            batch_id = await batches.create([ask(n) for n in range(3)])
            await until(lambda: served.engine.running)
            keys.write_text(rest)
            await until(lambda: read_job(folder, batch_id)["status"] == "failed")
        await until(lambda: not served.engine.running)

    job = read_job(folder, batch_id)
    assert job["error_code"] == "key_revoked"
    assert (job["completed"], job["failed"], job["total"]) == (0, 3, 3)
    assert other


async def test_file_in_use_is_not_deleted_and_lost_bytes_fail_the_batch(tmp_path: Path) -> None:
    folder = tmp_path / "batches"
    async with serve_gateway(batch_folder=folder) as served, open_batches(served) as batches:
        engine = served.engine
        engine.delays = lambda question: 0 if question == "question 0" else 1
        batch_id = await batches.create([ask(n) for n in range(200)])
        await until(lambda: engine.calls)
        [input_path] = (folder / "files").iterdir()
        with pytest.raises(openai.ConflictError) as in_use:
            await batches.sdk.files.delete(input_path.name)
        input_path.unlink()
        batch = await batches.wait(batch_id)
        good, bad = (
            await batches.read(batch.output_file_id),
            await batches.read(batch.error_file_id),
        )

    assert in_use.value.code == "file_in_use"
    assert batch.status == "failed"
    assert batch.errors.data[0].code == "input_file_lost"
    check_counts(batch, good, bad)
    assert {line["error"]["code"] for line in bad} == {"batch_failed"}


async def test_engine_that_is_busy_or_away_is_asked_again(batches: Batches) -> None:
    engine = batches.served.engine
    engine.status, engine.retry_after_s = 503, 1
    batch_id = await batches.create([ask(n) for n in range(10)])
    await until(lambda: len(engine.calls) >= 2)
    engine.status = 200

    batch = await batches.wait(batch_id)

    assert batch.status == "completed"
    assert batch.request_counts.completed == 10


async def test_line_that_the_engine_fails_each_time_is_given_up(batches: Batches) -> None:
    batches.served.engine.fails = lambda question: question == "question 1"

    batch = await batches.wait(await batches.create([ask(n) for n in range(3)]))
    [bad] = await batches.read(batch.error_file_id)

    assert batch.request_counts.completed == 2
    assert bad["custom_id"] == "line-1"
    assert bad["response"]["body"]["error"]["code"] == "engine_failed"


async def test_lines_go_by_system_prompt_and_in_the_lane_batch(tmp_path: Path) -> None:
    def with_system(number: int) -> dict[str, Any]:
        line = ask(number)
        system = {"role": "system", "content": f"system {number % 3}"}
        line["body"]["messages"].insert(0, system)
        return line

    async with (
        serve_gateway(batch_folder=tmp_path / "batches", batch_max_running=1) as served,
        open_batches(served) as batches,
    ):
        lanes = []
        served.engine.delays = lambda _: (
            lanes.append(_read_lane(served.app, "batch")) or 0.0  # type: ignore[func-returns-value]
        )
        await batches.wait(await batches.create([with_system(n) for n in range(12)]))
        systems = [call["messages"][0]["content"] for call in served.engine.calls]

    changes = sum(one != other for one, other in itertools.pairwise(systems))
    assert len(systems) == 12
    assert changes == 2
    assert set(lanes) == {1}


def _read_lane(app: Any, lane: str) -> int:
    running: int = app[MODELS].count(lane)[0]
    return running


async def test_interactive_calls_find_room_beside_a_batch(tmp_path: Path) -> None:
    """The batch has more lines than the engine runs; a chat runs before any of those that wait."""
    slots = 32
    engine = Behaviour()
    async with (
        serve_gateway(engine, batch_folder=tmp_path / "batches", engine_sequences=slots) as served,
        open_batches(served) as batches,
    ):
        engine.slots = asyncio.Semaphore(slots)
        engine.delays = lambda question: 60 if question.startswith("question") else 0
        batch_id = await batches.create([ask(n) for n in range(100)])
        await until(lambda: engine.running >= 8)
        answer = await served.chat("hello")
        await batches.sdk.batches.cancel(batch_id)
        await batches.wait(batch_id)

    assert answer.status_code == 200


async def test_batch_of_a_model_that_is_away_stops_none_of_another(tmp_path: Path) -> None:
    one, other = Behaviour(), Behaviour(model="other")
    options: dict[str, Any] = {"batch_folder": tmp_path / "batches", "restart_hold_s": 600}
    async with (
        serve_gateway(one, other, **options) as served,
        open_batches(served) as batches,
    ):
        other.is_healthy = False
        pool = served.app[MODELS].by_name["other"].pool
        await until(lambda: not pool.has_engine)
        away = await batches.create([ask(n, model="other") for n in range(100)])
        await until(lambda: pool.held)
        done = await batches.wait(await batches.create([ask(n) for n in range(100)]))
        held = pool.held
        other.is_healthy = True
        later = await batches.wait(away)

    assert done.request_counts.completed == later.request_counts.completed == 100
    assert held <= 8


async def test_batch_spares_the_limits_of_its_own_key(tmp_path: Path) -> None:
    """Beside a call of the same key that takes its only place."""
    key, entry = make_key("alice")
    keys = tmp_path / "keys.toml"
    keys.write_text(f"{entry}max_concurrency = 1\nrequests_per_minute = 1000\n")
    async with (
        serve_gateway(batch_folder=tmp_path / "batches", keys_file=keys) as served,
        open_batches(served, key) as batches,
    ):
        engine = served.engine
        engine.delays = lambda question: 5.0 if question == "mine" else 0.0
        headers = {"Authorization": f"Bearer {key}"}
        body = {"model": "fake", "messages": [{"role": "user", "content": "mine"}]}
        chat = asyncio.create_task(
            served.client.post("/v1/chat/completions", json=body, headers=headers)
        )
        await until(lambda: engine.running)
        batch_id = await batches.create([ask(n) for n in range(30)])
        mine = await chat
        batch = await batches.wait(batch_id)
        told = (await served.client.get("/metrics")).text

    assert mine.status_code == 200
    assert batch.request_counts.completed == 30
    [retries] = re.findall(r'batch_retries_total\{code="key_concurrency"\} (\S+)', told)
    assert 1 <= float(retries) <= 6


async def test_drain_waits_for_lines_and_starts_no_more(tmp_path: Path) -> None:
    folder = tmp_path / "batches"
    async with serve_gateway(batch_folder=folder) as served, open_batches(served) as batches:
        served.engine.delays = lambda _: 0.3
        batch_id = await batches.create([ask(n) for n in range(500)])
        await until(lambda: served.engine.running >= 8)

    calls = len(served.engine.calls)
    job = read_job(folder, batch_id)
    assert calls < 500
    assert served.engine.cancelled == 0
    assert (job["status"], job["worker"]) == ("in_progress", "")
    assert count_results(folder, batch_id) == calls


async def test_expired_files_and_orphaned_bytes_are_swept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bytes when they have been seen twice."""
    monkeypatch.setattr(coordinator, "_SWEEP_S", 0.05)
    folder = tmp_path / "batches"
    async with serve_gateway(batch_folder=folder) as served, open_batches(served) as batches:
        kept, expired = await batches.upload([ask(0)]), await batches.upload([ask(1)])
        old = folder / "files" / "orphan.part"
        old.write_bytes(b"")
        _set_time(old, time.time() - 7200)
        _set_time(folder / "files" / kept, time.time() - 7200)
    database = create_engine(f"sqlite:///{folder}/batches.sqlite")
    with database.begin() as connection:
        values = {"at": int(time.time()) - 1, "id": expired}
        connection.execute(text("UPDATE gateway_files SET expires_at = :at WHERE id = :id"), values)
    database.dispose()
    async with serve_gateway(batch_folder=folder) as served, open_batches(served) as batches:
        await until(lambda: [one.name for one in (folder / "files").iterdir()] == [kept])
        left = [file.id async for file in batches.sdk.files.list()]

    assert left == [kept]


def _set_time(path: Path, at: float) -> None:
    os.utime(path, (at, at))


def read_job(folder: Path, batch_id: str) -> dict[str, Any]:
    engine = create_engine(f"sqlite:///{folder}/batches.sqlite")
    try:
        with engine.connect() as connection:
            query = text("SELECT * FROM gateway_batches WHERE id = :id")
            return dict(connection.execute(query, {"id": batch_id}).mappings().one())
    finally:
        engine.dispose()


def count_results(folder: Path, batch_id: str) -> int:
    engine = create_engine(f"sqlite:///{folder}/batches.sqlite")
    try:
        with engine.connect() as connection:
            query = text("SELECT count(*) FROM gateway_batch_results WHERE job_id = :id")
            return int(connection.execute(query, {"id": batch_id}).scalar_one())
    finally:
        engine.dispose()
