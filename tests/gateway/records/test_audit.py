"""Who asked what: a row a request, texts only of keys that say so, read by an admin alone."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path
from typing import Any

import httpx
import orjson
import pytest
from sqlalchemy import insert

from gateway.records.access import RECORDS
from gateway.records.ledger import LEDGER
from gateway.routes.records import write_rows
from gateway.storage.tables import AUDIT
from tests.gateway.batches.conftest import ask as write_line
from tests.gateway.batches.conftest import open_batches
from tests.gateway.conftest import Serve
from tests.gateway.records.conftest import (
    Keys,
    ask,
    open_records,
    read_audit,
    until,
    wait_for_row,
)

DAY_S = 86_400


async def test_row_tells_who_asked_and_not_what(
    serve: Serve, keys: Keys, kept: dict[str, Any]
) -> None:
    async with serve(**keys.write(alice=""), **kept, audit=True) as served:
        answer = await ask(served.url, keys.headers["alice"], "a secret")
        row = await wait_for_row(served, keys.headers["root"], "key=alice")

        assert abs(row.pop("time_ms") / 1000 - time.time()) < DAY_S
        assert row.pop("duration_ms") >= 0
        assert len(row.pop("id")) == 28
        assert row == {
            "key": "alice",
            "route": "/v1/chat/completions",
            "model": "fake",
            "request_id": answer.headers["X-Request-Id"],
            "status": 200,
            "verdict": "ok",
            "prompt_bytes": len(answer.request.content),
            "answer_bytes": len(answer.content),
            "prompt_tokens": 3,
            "completion_tokens": 4,
            "prompt": None,
            "answer": None,
        }


async def test_texts_of_a_key_that_says_so_are_kept_without_secrets(
    serve: Serve, keys: Keys, kept: dict[str, Any]
) -> None:
    async with serve(**keys.write(alice="audit_text = true"), **kept, audit=True) as served:
        await ask(served.url, keys.headers["alice"], "I am bob@example.com\0, 你好")
        row = await wait_for_row(served, keys.headers["root"], "key=alice")

        assert row["prompt"] == "I am [redacted]\ufffd, 你好"
        assert row["answer"] == "answer:I am [redacted]\ufffd, 你好"


async def test_text_of_a_stream_is_kept_as_its_caller_got_it(
    serve: Serve, keys: Keys, tmp_path: Path
) -> None:
    settings = keys.write(alice="audit_text = true") | {"usage_database": str(tmp_path / "usage")}
    async with serve(**settings, audit=True, usage_interval_s=0.05) as served:
        answer = await ask(served.url, keys.headers["alice"], "hi", stream=True)
        row = await wait_for_row(served, keys.headers["root"], "key=alice")

        assert answer.text.rstrip().endswith("data: [DONE]")
        assert (row["prompt"], row["answer"]) == ("hi", "answer:hi")
        assert row["answer_bytes"] == len(answer.content)
        assert row["status"] == 200


async def test_error_at_the_end_of_a_stream_counts_with_what_its_caller_got(
    serve: Serve, keys: Keys, tmp_path: Path
) -> None:
    settings = keys.write(alice="") | {"usage_database": str(tmp_path / "usage")}
    async with serve(**settings, audit=True, usage_interval_s=0.05) as served:
        served.engine.stream_cut_after = 2
        answer = await ask(served.url, keys.headers["alice"], stream=True)
        row = await wait_for_row(served, keys.headers["root"], "key=alice")

        assert "error" in answer.text
        assert row["answer_bytes"] == len(answer.content)
        assert row["verdict"] != "ok"


async def test_refusals_and_hang_ups_are_told_with_their_verdict(
    serve: Serve, keys: Keys, tmp_path: Path
) -> None:
    settings = keys.write(alice="requests_per_minute = 2", bob='models = ["other"]')
    kept = {"usage_database": str(tmp_path / "usage"), "usage_interval_s": 0.05}
    async with serve(**settings, **kept, audit=True) as served:
        for _ in range(3):
            await ask(served.url, keys.headers["alice"])
        await ask(served.url, keys.headers["bob"])
        served.engine.delay_s = 30
        leaving = asyncio.create_task(ask(served.url, keys.headers["root"]))
        await until(lambda: len(served.engine.calls) == 3)
        leaving.cancel()
        await asyncio.gather(leaving, return_exceptions=True)
        found: dict[str, list[tuple[int, str]]] = {}

        async def are_there() -> bool:
            for name in ("alice", "bob", "root"):
                rows = (await read_audit(served.url, keys.headers["root"], f"key={name}"))["data"]
                posts = [row for row in rows if row["route"] != "/audit"]
                found[name] = [(row["status"], row["verdict"]) for row in posts]
            return len(found["alice"]) == 3 and bool(found["bob"] and found["root"])

        await until(are_there)
        assert found["alice"] == [(429, "requests_per_minute"), (200, "ok"), (200, "ok")]
        assert found["bob"] == [(403, "model_not_allowed")]
        assert found["root"] == [(499, "caller_gone")]


async def test_texts_are_kept_of_a_share_of_the_requests(tmp_path: Path) -> None:
    _, ledger = open_records({"usage_database": str(tmp_path / "usage")}, audit=True)
    kept = sum(ledger.open("alice", 0.1).wants_text for _ in range(10_000))

    assert 700 < kept < 1300
    assert not any(ledger.open("alice", 0.0).wants_text for _ in range(100))


async def test_lines_of_batches_have_rows_of_their_own(
    serve: Serve, keys: Keys, tmp_path: Path
) -> None:
    settings = keys.write(alice="audit_text = true")
    kept = {"usage_database": str(tmp_path / "usage"), "usage_interval_s": 0.05}
    folder = {"batch_folder": tmp_path / "batches"}
    async with serve(**settings, **kept, **folder, audit=True) as served:
        key = keys.headers["alice"]["Authorization"].removeprefix("Bearer ")
        async with open_batches(served, key) as batches:
            batch = await batches.create([write_line(1)])
            await batches.wait(batch)
        rows: list[dict[str, Any]] = []

        async def is_there() -> bool:
            listed = await read_audit(served.url, keys.headers["root"], "key=alice")
            rows[:] = [row for row in listed["data"] if row["route"] == "/v1/chat/completions"]
            return bool(rows)

        await until(is_there)
        listed = await read_audit(served.url, keys.headers["root"], "key=alice")
        uploads = [row for row in listed["data"] if row["route"] == "/v1/files"]
        assert [row["prompt_bytes"] > 100 for row in uploads] == [True]
        assert rows[0]["request_id"].startswith(batch)
        assert (rows[0]["prompt"], rows[0]["completion_tokens"]) == ("question 1", 4)
        assert "answer:question 1" in rows[0]["answer"]


async def test_pages_are_read_one_after_the_other(
    serve: Serve, keys: Keys, kept: dict[str, Any]
) -> None:
    async with serve(**keys.write(alice=""), **kept, audit=True) as served:
        for number in range(5):
            await ask(served.url, keys.headers["alice"], f"q{number}")

        async def are_there() -> bool:
            listed = await read_audit(served.url, keys.headers["root"], "key=alice")
            return len(listed["data"]) == 5

        await until(are_there)
        pages, after = [], ""
        while True:
            query = f"key=alice&limit=2{after}"
            page = await read_audit(served.url, keys.headers["root"], query)
            pages.append([row["id"] for row in page["data"]])
            if not page["has_more"]:
                break
            after = f"&after={page['last_id']}"
        ids = [one for page in pages for one in page]

        assert [len(page) for page in pages] == [2, 2, 1]
        assert ids == sorted(set(ids), reverse=True)
        past = await read_audit(served.url, keys.headers["root"], "from=2020-01-01&to=2020-12-31")
        assert past == {"data": [], "has_more": False, "last_id": None}


@pytest.mark.parametrize(
    ("query", "field"),
    [
        *(("limit=0", "limit"), ("limit=x", "limit"), ("after=1", "after"), ("from=x", "from")),
        *(("limit=1001", "limit"), ("limit=00001" + "0" * 30, "limit")),
        ("limit=00001" + "0" * 5000, "limit"),
    ],
    ids=lambda value: value[:20],
)
async def test_page_that_is_none_is_refused_with_its_field(
    serve: Serve, keys: Keys, tmp_path: Path, query: str, field: str
) -> None:
    kept = {"usage_database": str(tmp_path / "usage")}
    async with serve(**keys.write(), **kept, audit=True) as served:
        answer = await read_audit(served.url, keys.headers["root"], query)

        assert (answer.status_code, answer.json()["error"]["param"]) == (400, field)


async def test_page_after_a_row_stays_within_its_days(
    serve: Serve, keys: Keys, kept: dict[str, Any]
) -> None:
    async with serve(**keys.write(alice=""), **kept, audit=True) as served:
        await ask(served.url, keys.headers["alice"])
        await wait_for_row(served, keys.headers["root"], "key=alice")
        past = f"from=2020-01-01&to=2020-12-31&after={'f' * 28}"

        assert (await read_audit(served.url, keys.headers["root"], past))["data"] == []


async def test_page_is_written_with_looks_at_the_event_loop() -> None:
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    counting = asyncio.create_task(count())
    rows = [{"id": str(number)} for number in range(1000)]
    written = await write_rows(rows)
    counting.cancel()

    assert turns >= 20
    assert orjson.loads(b"[%b]" % written) == rows
    assert await write_rows([]) == b""


async def test_route_that_a_key_may_not_use_has_its_row(
    serve: Serve, keys: Keys, kept: dict[str, Any]
) -> None:
    settings = keys.write(alice='routes = ["/predict"]')
    async with serve(**settings, **kept, audit=True) as served:
        assert (await ask(served.url, keys.headers["alice"])).status_code == 403
        row = await wait_for_row(served, keys.headers["root"], "key=alice")

        assert (row["route"], row["status"]) == ("/v1/chat/completions", 403)
        assert row["verdict"] == "route_not_allowed"


async def test_texts_that_an_admin_reads_are_not_kept_once_more(
    serve: Serve, keys: Keys, kept: dict[str, Any]
) -> None:
    """They would outlive the row whose texts they are."""
    settings = keys.write(root="admin = true\naudit_text = true", alice="audit_text = true")
    async with serve(**settings, **kept, audit=True) as served:
        await ask(served.url, keys.headers["alice"], "once")
        await wait_for_row(served, keys.headers["root"], "key=alice")
        rows: list[dict[str, Any]] = []

        async def has_been_read() -> bool:
            listed = await read_audit(served.url, keys.headers["root"], "key=root")
            rows[:] = [row for row in listed["data"] if row["answer_bytes"] > 100]
            return bool(rows)

        await until(has_been_read)
        assert {(row["route"], row["prompt"], row["answer"]) for row in rows} == {
            ("/audit", None, None)
        }


async def test_nobody_reads_the_audit_but_an_admin(
    serve: Serve, keys: Keys, tmp_path: Path
) -> None:
    kept = {"usage_database": str(tmp_path / "usage")}
    async with serve(**keys.write(alice=""), **kept, audit=True) as served:
        refused = await read_audit(served.url, keys.headers["alice"])
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_admin")
    async with serve(**kept, audit=True) as served:  # without keys
        refused = await read_audit(served.url, {})
        assert (refused.status_code, refused.json()["error"]["code"]) == (403, "not_admin")
    async with serve(**keys.write(), **kept) as served:
        refused = await read_audit(served.url, keys.headers["root"])
        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "audit_off")


async def test_rows_are_deleted_when_their_time_is_over(kept: dict[str, Any]) -> None:
    records, _ = open_records(kept, audit=True)
    try:
        now_ns = time.time_ns()
        texts = ("key", "route", "model", "request_id", "verdict")
        numbers = ("time_ms", "status", "prompt_bytes", "answer_bytes", "duration_ms")
        row = dict.fromkeys(texts, "x") | dict.fromkeys(numbers, 0)
        ages = {"new": 0, "old": 8 * DAY_S}
        rows = [
            row | {"id": f"{now_ns - age * 10**9:016x}{number:012x}", "request_id": name}
            for name, age in ages.items()
            for number in range(1500)
        ]
        async with records.database.write() as connection:
            await connection.execute(insert(AUDIT), rows)
        await records.store.sweep(7)
        async with records.database.read() as connection:
            left = [one.request_id for one in await connection.execute(AUDIT.select())]

        assert left == ["new"] * 1500
    finally:
        await records.store.close()


async def test_texts_beyond_the_memory_for_them_are_left_out_and_counted(
    serve: Serve, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.records.ledger._MOST_HELD_BYTES", 10)
    kept = {"usage_database": str(tmp_path / "usage"), "usage_interval_s": 0.05}
    async with serve(**keys.write(alice="audit_text = true"), **kept, audit=True) as served:
        await ask(served.url, keys.headers["alice"])
        row = await wait_for_row(served, keys.headers["root"], "key=alice")

        assert (row["prompt"], row["answer"]) == (None, None)
        metrics = (await served.client.get("/metrics")).text
        assert 'gateway_records_dropped_total{kind="text"} 1.0' in metrics


async def test_rows_beyond_the_buffer_are_counted_as_dropped(
    serve: Serve, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.records.ledger._MOST_ROWS", 2)
    kept = {"usage_database": str(tmp_path / "usage"), "usage_interval_s": 3600.0}
    async with serve(**keys.write(alice=""), **kept, audit=True) as served:
        for _ in range(3):
            await ask(served.url, keys.headers["alice"])
        ledger = served.app[LEDGER]
        assert ledger is not None
        metrics = (await served.client.get("/metrics")).text

        assert len(ledger.take().rows) == 2
        assert 'gateway_records_dropped_total{kind="audit"} 1.0' in metrics


async def test_body_that_is_too_large_has_a_row_without_its_text(
    serve: Serve, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.records.ledger._MOST_TEXT_BYTES", 200)
    kept = {"usage_database": str(tmp_path / "usage"), "usage_interval_s": 0.05}
    async with serve(**keys.write(alice="audit_text = true"), **kept, audit=True) as served:
        answer: httpx.Response = await ask(served.url, keys.headers["alice"], "x" * 300)
        row = await wait_for_row(served, keys.headers["root"], "key=alice")

        assert answer.status_code == 200
        assert (row["prompt"], row["prompt_bytes"]) == (None, len(answer.request.content))
        assert served.app[RECORDS].is_away is False


async def test_text_that_cannot_be_read_leaves_its_row(
    serve: Serve, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(_body: bytes) -> str:
        raise RecursionError

    monkeypatch.setattr("gateway.records.service.read_texts", fail)
    kept = {"usage_database": str(tmp_path / "usage"), "usage_interval_s": 0.05}
    async with serve(**keys.write(alice="audit_text = true"), **kept, audit=True) as served:
        await ask(served.url, keys.headers["alice"])
        row = await wait_for_row(served, keys.headers["root"], "key=alice")

        assert (row["status"], row["prompt"], row["answer"]) == (200, None, None)
