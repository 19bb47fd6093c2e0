"""A database, SQLite or PostgreSQL: transactions, its tables' steps, and errors in the words of
this program. Which tables there are is in `tables.py`; what is asked of them, their rooms' matter.

Every change of the tables is a step of `MIGRATIONS`, which are applied in order, in one go.
Alembic was weighed: it has no lock for several gateways that start at once, runs a script at its
import, and what it writes by itself (drafts of steps) is not needed for so few tables.
"""

from __future__ import annotations

import asyncio
import importlib.util
import os
import sqlite3
from collections.abc import AsyncIterator
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import (
    Column,
    Connection,
    Integer,
    MetaData,
    Table,
    event,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from gateway.config import PREFIX, SettingsError
from gateway.errors import GatewayError, StorageFull, StorageUnavailable
from gateway.storage.tables import MIGRATIONS

log = structlog.get_logger("gateway")

_CONNECTIONS = 5
_CONNECT_TIMEOUT_S = 5.0
_STATEMENT_TIMEOUT_S = 60.0
_IDLE_TIMEOUT_MS = "20000"
_BUSY_TIMEOUT_S = 20.0
_RETRY_AFTER_S = 2.0

_VERSION = Table("gateway_schema", MetaData(), Column("version", Integer, nullable=False))
_LOCK = 7_146_329_001  # any number that no other program takes


class _SQLiteConnection(sqlite3.Connection):
    """One whose transaction ends with it. SQLite closes a connection only once nobody holds a
    statement of it any more; of one whose caller was cancelled a traceback does, until garbage is
    collected, and its lock would keep out every other writer until then.
    """

    def close(self) -> None:
        with suppress(sqlite3.Error):  # whatever is wrong with it: it is closed
            self.rollback()
        super().close()


class NewerSchemaError(Exception):
    """The database is that of a later version of this program."""


def migrate(connection: Connection) -> None:
    """In one transaction; gateways that start at once do it one after the other."""
    if connection.dialect.name == "postgresql":
        connection.execute(text(f"SELECT pg_advisory_xact_lock({_LOCK})"))
    _VERSION.create(connection, checkfirst=True)
    version = connection.execute(select(_VERSION.c.version)).scalar()
    if version is None:
        version = 0
        connection.execute(insert(_VERSION).values(version=0))
    if version > len(MIGRATIONS):
        raise NewerSchemaError(
            f"the database is of version {version}, this gateway knows {len(MIGRATIONS)}"
        )
    for step in MIGRATIONS[version:]:
        step(connection)
    connection.execute(update(_VERSION).values(version=len(MIGRATIONS)))


class Database:
    """Opened by its first user, and again when it has been away."""

    def __init__(
        self,
        address: str | Path,
        *,
        setting: str,
        keeps: str,
        busy_timeout_s: float = _BUSY_TIMEOUT_S,
        answer_timeout_s: float | None = None,
    ) -> None:
        """The `address` is a file for SQLite, or PostgreSQL's; `setting` is where it stands, and
        `keeps` names what is in it to callers and in the log. Where callers wait for it, a
        transaction may take no longer than `answer_timeout_s`.
        """
        url, options, self._foreign = _describe(address, PREFIX + setting)
        self._keeps, self._answer_timeout_s = keeps, answer_timeout_s
        self._engine = create_async_engine(url, **options)
        self._writing = self._engine.execution_options(writes=True)
        self._turn: AbstractAsyncContextManager[None] = nullcontext()
        if self._engine.dialect.name == "sqlite":
            # It has one writer. Its own waiting gives up, and is not fair: one of many may never
            # come in. That is left to writers of other processes.
            self._turn = asyncio.Lock()
            self._busy_timeout_s = busy_timeout_s
            event.listen(self._engine.sync_engine, "connect", self._prepare_sqlite)
            event.listen(self._engine.sync_engine, "begin", _begin_sqlite)
        self._is_migrated = False
        self._migrating = asyncio.Lock()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """What is read inside belongs together."""
        async with self._translate(), asyncio.timeout(self._answer_timeout_s):
            await self._ensure_migrated()
            async with self._engine.begin() as connection:
                yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """All that is written inside is kept, or nothing is."""
        async with self._translate(), asyncio.timeout(self._answer_timeout_s):
            await self._ensure_migrated()
            async with self._turn, self._writing.begin() as connection:
                yield connection

    async def close(self) -> None:
        await self._engine.dispose()

    async def _ensure_migrated(self) -> None:
        """Not at the start: a gateway without its database still serves everything else."""
        if self._is_migrated:
            return
        async with self._migrating:
            if not self._is_migrated:
                async with self._writing.begin() as connection:
                    await connection.run_sync(migrate)
                self._is_migrated = True

    @asynccontextmanager
    async def _translate(self) -> AsyncIterator[None]:
        try:
            yield
        except GatewayError:
            raise
        except NewerSchemaError as error:
            raise StorageUnavailable(f"{self._keeps}: {error}; update it") from None
        except self._foreign as error:
            if "disk is full" in str(error) or "DiskFull" in str(error):
                raise StorageFull(f"there is no room left for {self._keeps}") from error
            reason = str(error).partition("\n")[0][:300] or "no answer in time"
            log.warning("storage_failed", keeps=self._keeps, reason=reason)
            raise StorageUnavailable(
                f"the database of {self._keeps} does not answer; try again",
                retry_after_s=_RETRY_AFTER_S,
            ) from error

    def _prepare_sqlite(self, connection: Any, _record: object) -> None:
        """Readers beside a writer; what is committed outlives a power cut."""
        connection.isolation_level = None  # else the driver begins transactions as it thinks fit
        cursor = connection.cursor()
        cursor.execute(f"PRAGMA busy_timeout={int(self._busy_timeout_s * 1000)}")
        cursor.execute("PRAGMA journal_mode=WAL")
        cursor.execute("PRAGMA synchronous=FULL")
        cursor.execute("PRAGMA foreign_keys=ON")
        cursor.close()


def open_database(
    place: str,
    *,
    setting: str,
    keeps: str,
    busy_timeout_s: float,
    answer_timeout_s: float | None = None,
) -> Database:
    """The `place` is the path of a SQLite file, or PostgreSQL's address."""
    address: str | Path = place
    if "://" not in place:
        address = Path(place)
        if not address.parent.is_dir() or not os.access(address.parent, os.W_OK | os.X_OK):
            raise SettingsError(
                f"{PREFIX}{setting}: {address.parent} is no folder that may be written"
            )
        # Of texts that are nobody else's; what is wrong with it, its first use tells.
        with suppress(OSError):
            os.close(os.open(address, os.O_RDWR | os.O_CREAT, 0o600))
    return Database(
        address,
        setting=setting,
        keeps=keeps,
        busy_timeout_s=busy_timeout_s,
        answer_timeout_s=answer_timeout_s,
    )


def _describe(
    address: str | Path, variable: str
) -> tuple[URL, dict[str, Any], tuple[type[Exception], ...]]:
    """The address, how to connect, and what can go wrong there."""
    if isinstance(address, Path):
        url = URL.create("sqlite+aiosqlite", database=str(address))
        options = {"pool_size": _CONNECTIONS, "connect_args": {"factory": _SQLiteConnection}}
        return url, options, (SQLAlchemyError, OSError, TimeoutError)
    if importlib.util.find_spec("asyncpg") is None:
        raise SettingsError(
            f"{variable} needs the extra `postgres`: pip install vllm-gateway[postgres]"
        )
    from asyncpg import InterfaceError, PostgresError  # noqa: PLC0415 — it is an extra

    try:
        url = make_url(address).set(drivername="postgresql+asyncpg")
    except ArgumentError:
        raise SettingsError(f"{variable}: this is no address of a database") from None
    options = {
        "pool_size": _CONNECTIONS,
        "pool_pre_ping": True,
        "connect_args": {
            "timeout": _CONNECT_TIMEOUT_S,
            "command_timeout": _STATEMENT_TIMEOUT_S,
            # A gateway that is frozen in a transaction would keep its rows from all others.
            "server_settings": {"idle_in_transaction_session_timeout": _IDLE_TIMEOUT_MS},
        },
    }
    return url, options, (SQLAlchemyError, OSError, TimeoutError, PostgresError, InterfaceError)


def _begin_sqlite(connection: Connection) -> None:
    """Who will write takes the lock first: to ask for it later may fail at once."""
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
