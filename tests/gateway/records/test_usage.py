"""What each key has used by model and day: kept, summed over gateways, told to who may know."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError
from sqlalchemy import insert

from gateway.app import build_app
from gateway.config import SettingsError
from gateway.errors import StorageUnavailable
from gateway.records.access import RECORDS
from gateway.records.ledger import LEDGER, Batch, SpentKey
from gateway.records.store import AuditRows
from gateway.storage.tables import USAGE
from tests.gateway.batches.conftest import ask as write_line
from tests.gateway.batches.conftest import open_batches
from tests.gateway.conftest import Serve, make_settings
from tests.gateway.records.conftest import (
    Keys,
    ask,
    open_records,
    read_usage,
    wait_for_tokens,
)

TODAY = datetime.now(UTC).date().isoformat()


def test_gateway_that_keeps_nothing_loads_no_database() -> None:
    program = "import sys, gateway.app; print([m for m in sys.modules if 'sql' in m])"
    told = subprocess.run(
        [sys.executable, "-c", program], check=True, capture_output=True, text=True
    )

    assert told.stdout.strip() == "[]"


async def test_gateway_that_keeps_nothing_notes_nothing(serve: Serve, keys: Keys) -> None:
    async with serve(**keys.write(alice="")) as served:
        assert served.app[LEDGER] is None
        assert RECORDS not in served.app
        refused = await read_usage(served.url, keys.headers["root"], f"from={TODAY}")
        own = await read_usage(served.url, keys.headers["alice"], "")
        ready = await served.client.get("/readyz")

        assert (refused.status_code, refused.json()["error"]["code"]) == (404, "usage_off")
        assert (own.status_code, own.json()["error"]["code"]) == (403, "not_admin")
        assert ready.json() == {"status": "ready"}


async def test_usage_is_kept_by_key_model_and_day(
    serve: Serve, keys: Keys, kept: dict[str, Any]
) -> None:
    async with serve(**keys.write(alice=""), **kept) as served:
        for stream in (False, True):
            await ask(served.url, keys.headers["alice"], stream=stream)
        prompts = {"prompt": ["a", "b"]}
        await served.client.post("/predict", json=prompts, headers=keys.headers["alice"])
        since_start = await served.client.get("/usage", headers=keys.headers["root"])
        used = since_start.json()["keys"]["alice"]
        row = await wait_for_tokens(
            served.url, keys.headers["root"], "alice", used["prompt_tokens"] + 7
        )

        assert row == {"day": TODAY, "key": "alice", "model": "fake", "batch_lines": 0} | used


async def test_key_sees_its_own_use_and_no_other(
    serve: Serve, keys: Keys, kept: dict[str, Any]
) -> None:
    async with serve(**keys.write(alice="", bob=""), **kept) as served:
        for name in ("alice", "bob"):
            await ask(served.url, keys.headers[name])
        await wait_for_tokens(served.url, keys.headers["root"], "alice", 7)
        await wait_for_tokens(served.url, keys.headers["root"], "bob", 7)
        own = await read_usage(served.url, keys.headers["alice"], "")
        named = await read_usage(served.url, keys.headers["alice"], "key=alice&group=month")
        other = await read_usage(served.url, keys.headers["alice"], "key=bob")
        everybody = await read_usage(served.url, keys.headers["root"], "group=month")

        assert {row["key"] for row in own} == {row["key"] for row in named} == {"alice"}
        assert {row["month"] for row in named} == {TODAY[:7]}
        assert (other.status_code, other.json()["error"]["code"]) == (403, "not_admin")
        assert {"alice", "bob"} <= {row["key"] for row in everybody}


async def test_ranges_and_groups_sum_what_lies_in_them(
    serve: Serve, keys: Keys, kept: dict[str, Any]
) -> None:
    async with serve(**keys.write(), **kept) as served:
        counts = {"requests": 1, "completion_tokens": 2, "batch_lines": 3}
        rows = [
            {"day": day, "key": "old", "model": "m", "prompt_tokens": tokens} | counts
            for day, tokens in (("2025-01-31", 1), ("2025-02-01", 10), ("2025-02-28", 100))
        ]
        async with served.app[RECORDS].database.write() as connection:
            await connection.execute(insert(USAGE), rows)

        async def read(query: str) -> list[tuple[str, int, int]]:
            found = await read_usage(served.url, keys.headers["root"], query)
            group = "month" if "group=month" in query else "day"
            return [(row[group], row["prompt_tokens"], row["requests"]) for row in found]

        assert await read("from=2025-01-31&to=2025-02-01") == [
            ("2025-01-31", 1, 1),
            ("2025-02-01", 10, 1),
        ]
        assert await read("from=2025-01-01&to=2025-02-28&group=month") == [
            ("2025-01", 1, 1),
            ("2025-02", 110, 2),
        ]
        assert await read("to=2025-02-28&key=old") == [
            ("2025-02-01", 10, 1),
            ("2025-02-28", 100, 1),
        ]
        assert await read("to=2025-02-28&key=nobody") == []


@pytest.mark.parametrize(
    ("query", "field"),
    [
        ("from=yesterday", "from"),
        ("from=2026-13-01", "from"),
        ("from=20260101", "from"),
        ("to=2026-02-30", "to"),
        ("from=2026-02-02&to=2026-02-01", "from"),
        ("from=1990-01-01&to=2026-02-01", "from"),
        ("group=week", "group"),
        ("key=%00", "key"),
        ("form=2026-01-01", "form"),
    ],
)
async def test_range_that_is_none_is_refused_with_its_field(
    serve: Serve, keys: Keys, tmp_path: Path, query: str, field: str
) -> None:
    async with serve(**keys.write(), usage_database=str(tmp_path / "usage")) as served:
        answer = await read_usage(served.url, keys.headers["root"], query)

        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == field


async def test_two_gateways_on_one_database_add_up(
    serve: Serve, keys: Keys, kept: dict[str, Any]
) -> None:
    settings = keys.write(alice="") | kept
    async with serve(**settings) as first, serve(**settings) as second:
        urls = [first.url, second.url] * 15
        answers = await asyncio.gather(*(ask(url, keys.headers["alice"]) for url in urls))
        assert {one.status_code for one in answers} == {200}

        row = await wait_for_tokens(second.url, keys.headers["root"], "alice", 30 * 7)

        assert (row["requests"], row["prompt_tokens"], row["completion_tokens"]) == (30, 90, 120)


async def test_write_whose_answer_was_lost_is_counted_once(kept: dict[str, Any]) -> None:
    (first, ledger), (second, _) = open_records(kept), open_records(kept)
    ledger.add_tokens("alice", "fake", 3, 4)
    batch = ledger.take()
    try:
        await asyncio.gather(*(first.store.write(batch, []) for _ in range(3)))
        first.store.forget_seen()
        spent = await first.store.write(batch, [])
        seen = await second.store.write(open_records(kept)[1].take(), [])

        assert spent == seen == {(TODAY, "alice"): 7, (TODAY[:7], "alice"): 7}
    finally:
        await first.store.close()
        await second.store.close()


async def test_budget_counts_a_write_once_whose_answer_was_lost(
    kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    records, ledger = open_records(kept)
    write = records.store.write

    async def lose_answer(batch: Batch, rows: AuditRows) -> dict[SpentKey, int]:
        await write(batch, rows)
        raise StorageUnavailable("gone in the middle")

    try:
        ledger.add_tokens("alice", "fake", 3, 4)
        monkeypatch.setattr(records.store, "write", lose_answer)
        assert not await records._sync()
        assert ledger.find_spent("alice", month=False) == 7
        monkeypatch.setattr(records.store, "write", write)
        assert await records._sync()
        assert ledger.find_spent("alice", month=False) == 7
    finally:
        await records.store.close()


async def test_many_writers_at_once_lose_nothing_and_see_all(kept: dict[str, Any]) -> None:
    opened = [open_records(kept) for _ in range(4)]
    try:
        for _ in range(5):
            for number, (_, ledger) in enumerate(opened):
                names = ["alice", "bob"] if number % 2 else ["bob", "alice"]
                for name in names:
                    ledger.add_tokens(name, "fake", 1, 1)
            await asyncio.gather(*(records._sync() for records, _ in opened))
        await asyncio.gather(*(records._sync() for records, _ in opened))

        told = [
            ledger.find_spent("alice", month=month)
            for _, ledger in opened
            for month in (False, True)
        ]
        assert told == [5 * 4 * 2] * 8
    finally:
        for records, _ in opened:
            await records.store.close()


async def test_gateway_whose_day_begins_later_sees_what_was_used_before(
    kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Clocks of two machines differ, and the database has one order."""
    (late, ledger), (early, _) = opened = [open_records(kept) for _ in range(2)]
    month, days = ("2020-01", "alice"), [("2020-01-30", "alice"), ("2020-01-31", "alice")]
    nothing = ledger.take()
    try:
        await early.store.write(Batch(1, {}, {days[1]: 7, month: 7}, []), [])
        monkeypatch.setattr("gateway.records.store.name_day", lambda _: days[0][0])
        assert await late.store.write(nothing, []) == {month: 7}
        monkeypatch.setattr("gateway.records.store.name_day", lambda _: days[1][0])
        assert await late.store.write(nothing, []) == {days[1]: 7, month: 7}
        assert await late.store.write(nothing, []) == {}
    finally:
        for records, _ in opened:
            await records.store.close()


async def test_lines_of_batches_are_counted_as_such(
    serve: Serve, keys: Keys, kept: dict[str, Any], tmp_path: Path
) -> None:
    folder = {"batch_folder": tmp_path / "batches"}
    async with serve(**keys.write(alice=""), **kept, **folder) as served:
        key = keys.headers["alice"]["Authorization"].removeprefix("Bearer ")
        async with open_batches(served, key) as batches:
            await batches.wait(await batches.create([write_line(n) for n in range(5)]))
        row = await wait_for_tokens(served.url, keys.headers["root"], "alice", 5 * 7)

        assert (row["batch_lines"], row["prompt_tokens"]) == (5, 15)


async def test_stopped_gateway_has_written_all(
    serve: Serve, keys: Keys, kept: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Though its next write would have been in an hour."""
    monkeypatch.setattr("gateway.records.service._LAST_WRITES_S", 120.0)  # for a busy disk
    settings = keys.write(alice="") | kept
    async with serve(**settings | {"usage_interval_s": 3600.0}) as served:
        await ask(served.url, keys.headers["alice"])
    async with serve(**settings) as served:
        row = await wait_for_tokens(served.url, keys.headers["root"], "alice", 7)

        assert row["requests"] == 1


async def test_more_sums_than_fit_are_counted_as_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("gateway.records.ledger._MOST_SUMS", 2)
    records, ledger = open_records({"usage_database": str(tmp_path / "usage.sqlite")})
    for name in ("a", "b", "c", "a"):
        ledger.add_tokens(name, "fake", 1, 1)

    assert len(ledger.take().sums) == 2
    assert records._metrics.records_dropped.labels("usage")._value.get() == 1
    assert ledger.find_spent("c", month=False) == 2  # budgets hold all the same


async def test_nonsense_of_an_engine_keeps_nothing_else_from_being_written(
    kept: dict[str, Any],
) -> None:
    records, ledger = open_records(kept)
    try:
        for _ in range(2):
            ledger.add_tokens("alice", "a\0b", 2**64 - 1, 2**63)
            ledger.add_tokens("bob", "fake", 1, 1)
            assert await records._sync()

        assert ledger.find_spent("alice", month=False) == 4 * 2**40
        assert ledger.find_spent("bob", month=True) == 4
    finally:
        await records.store.close()


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"audit": True}, "usage_database"),
        ({"usage_database": "mysql://a/b"}, "postgresql://"),
    ],
)
def test_settings_that_do_not_go_together_stop_the_start(fields: Any, says: str) -> None:
    with pytest.raises(ValidationError, match=says):
        make_settings(**fields)


@pytest.mark.parametrize(
    ("entry", "says"),
    [("tokens_per_day = 5", "GATEWAY_USAGE_DATABASE"), ("audit_text = true", "GATEWAY_AUDIT")],
)
async def test_key_that_needs_what_is_not_kept_stops_the_start(
    keys: Keys, entry: str, says: str
) -> None:
    with pytest.raises(SettingsError, match=says):
        build_app(make_settings(**keys.write(alice=entry)))


async def test_folder_that_is_not_there_stops_the_start(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="GATEWAY_USAGE_DATABASE"):
        build_app(make_settings(usage_database=str(tmp_path / "none" / "usage.sqlite")))


async def test_password_of_the_database_is_not_shown() -> None:
    settings = make_settings(usage_database="postgresql://me:hush-hush@127.0.0.1/usage")

    assert "hush-hush" not in repr(settings)
