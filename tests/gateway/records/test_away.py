"""A database that is away, locked, read-only or full: everything is served, nothing is lost."""

from __future__ import annotations

import asyncio
import sqlite3
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import event

from gateway.app import build_records
from gateway.records.access import RECORDS
from tests.gateway.conftest import Serve, Served
from tests.gateway.records.conftest import (
    Keys,
    Postgres,
    ask,
    until,
    wait_for_tokens,
)

# A database that is stopped: dear, and the same for every Python.
pytestmark = pytest.mark.slow


async def _tells(served: Served, word: str) -> bool:
    ready = await served.client.get("/readyz")
    assert ready.status_code == 200
    return bool(ready.json()["records"] == word)


async def _serve_meanwhile(served: Served, keys: Keys) -> None:
    """With the database away, whatever the reason."""
    answers = [await ask(served.url, keys.headers["alice"]) for _ in range(3)]
    assert {one.status_code for one in answers} == {200}
    await until(lambda: _tells(served, "waiting"))
    assert "gateway_records_away 1.0" in (await served.client.get("/metrics")).text


async def _check_all_is_there(served: Served, keys: Keys, chats: int) -> None:
    await until(lambda: _tells(served, "kept"))
    row = await wait_for_tokens(served.url, keys.headers["root"], "alice", chats * 7)
    assert (row["requests"], row["prompt_tokens"]) == (chats, chats * 3)
    assert "gateway_records_away 0.0" in (await served.client.get("/metrics")).text


async def test_locked_file_loses_nothing(serve: Serve, keys: Keys, tmp_path: Path) -> None:
    path = tmp_path / "usage.sqlite"
    kept = {"usage_database": str(path), "usage_interval_s": 0.05}
    async with serve(**keys.write(alice=""), **kept, audit=True) as served:
        await ask(served.url, keys.headers["alice"])
        await wait_for_tokens(served.url, keys.headers["root"], "alice", 7)
        other = sqlite3.connect(path, isolation_level=None)
        other.execute("BEGIN IMMEDIATE")
        await _serve_meanwhile(served, keys)
        other.execute("ROLLBACK")
        other.close()

        await _check_all_is_there(served, keys, 4)


async def test_full_disk_loses_nothing(
    serve: Serve, keys: Keys, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As far as SQLite can tell: it is allowed so many pages and no more."""
    pages = [1]

    def build(*parts: Any) -> Any:
        records = build_records(*parts)

        def bound(connection: Any, *_: object) -> None:
            connection.execute(f"PRAGMA max_page_count={pages[0]}")

        event.listen(records.database._engine.sync_engine, "checkout", bound)
        return records

    monkeypatch.setattr("gateway.app.build_records", build)
    kept = {"usage_database": str(tmp_path / "usage.sqlite"), "usage_interval_s": 0.05}
    async with serve(**keys.write(alice=""), **kept, audit=True) as served:
        await _serve_meanwhile(served, keys)
        pages[0] = 10_000

        await _check_all_is_there(served, keys, 3)


async def test_read_only_database_loses_nothing(
    serve: Serve, keys: Keys, postgres: Postgres
) -> None:
    address = postgres.make_database()
    name = address.rpartition("/")[2]
    kept = {"usage_database": address, "usage_interval_s": 0.05}

    async def make(state: str) -> None:
        statement = f"ALTER DATABASE {name} SET default_transaction_read_only = {state}"
        await asyncio.to_thread(postgres.ask, statement)
        # Whoever is connected to it has the old one.
        mine = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname ="
        await asyncio.to_thread(postgres.ask, f"{mine} '{name}'")

    async with serve(**keys.write(alice=""), **kept) as served:
        await ask(served.url, keys.headers["alice"])
        await wait_for_tokens(served.url, keys.headers["root"], "alice", 7)
        await make("on")
        await _serve_meanwhile(served, keys)
        await make("off")

        await _check_all_is_there(served, keys, 4)


async def test_database_that_goes_and_comes_back_loses_nothing(
    serve: Serve, keys: Keys, postgres: Postgres
) -> None:
    kept = {"usage_database": postgres.make_database(), "usage_interval_s": 0.05}
    async with serve(**keys.write(alice="tokens_per_day = 100000"), **kept) as served:
        await ask(served.url, keys.headers["alice"])
        await wait_for_tokens(served.url, keys.headers["root"], "alice", 7)
        await asyncio.to_thread(postgres.stop)
        try:
            await _serve_meanwhile(served, keys)
            refused = await served.client.get("/usage?group=day", headers=keys.headers["root"])
            assert refused.status_code == 503
            assert refused.json()["error"]["code"] == "storage_unavailable"
        finally:
            await asyncio.to_thread(postgres.start)

        await _check_all_is_there(served, keys, 4)


async def test_gateway_starts_and_stops_without_its_database(
    serve: Serve, keys: Keys, postgres: Postgres
) -> None:
    kept = {"usage_database": postgres.make_database(), "usage_interval_s": 0.05}
    await asyncio.to_thread(postgres.stop)
    try:
        async with serve(**keys.write(alice="tokens_per_day = 1000"), **kept) as served:
            assert served.app[RECORDS].is_away
            answer = await ask(served.url, keys.headers["alice"])
            assert answer.status_code == 200
    finally:
        await asyncio.to_thread(postgres.start)
