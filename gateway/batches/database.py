"""The database, SQLite or PostgreSQL: its tables, transactions, and errors in the words of this
program. What is asked of the tables is `store.py`'s and `ownership.py`'s matter.

Every change of the tables is a step of `MIGRATIONS`, which are applied in order, in one go.
Alembic was weighed: it has no lock for several gateways that start at once, runs a script at its
import, and what it writes by itself (drafts of steps) is not needed for four tables.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import structlog
from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
    event,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from gateway.config import Settings, SettingsError
from gateway.errors import GatewayError, StorageFull, StorageUnavailable

log = structlog.get_logger("gateway")

_FILE = "batches.sqlite"
_CONNECTIONS = 5
_CONNECT_TIMEOUT_S = 5.0
_STATEMENT_TIMEOUT_S = 60.0
_IDLE_TIMEOUT_MS = "20000"
_BUSY_TIMEOUT_MS = 20_000
_RETRY_AFTER_S = 2.0


METADATA = MetaData()

FILES = Table(
    "gateway_files",
    METADATA,
    Column("id", String, primary_key=True),
    Column("owner", String, nullable=False),
    Column("filename", Text, nullable=False),
    Column("purpose", String, nullable=False),
    Column("bytes", BigInteger, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger),
    Column("blob", String, nullable=False),
    Column("lines", Integer, nullable=False),
    Column("url", String, nullable=False),
    Column("models", Text, nullable=False),
    Index("gateway_files_owner", "owner", "id"),
)

# Where each request of an uploaded file lies in it.
LINES = Table(
    "gateway_file_lines",
    METADATA,
    Column("file_id", String, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("custom_id", Text, nullable=False),
    Column("start", BigInteger, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("prefix", String, nullable=False),
)

JOBS = Table(
    "gateway_batches",
    METADATA,
    Column("id", String, primary_key=True),
    Column("owner", String, nullable=False),
    Column("input_file_id", String, nullable=False),
    Column("endpoint", String, nullable=False),
    Column("completion_window", String, nullable=False),
    Column("status", String, nullable=False),
    Column("metadata", Text),
    Column("model", Text),
    Column("output_expires_s", BigInteger),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("in_progress_at", BigInteger),
    Column("finalizing_at", BigInteger),
    Column("completed_at", BigInteger),
    Column("failed_at", BigInteger),
    Column("expired_at", BigInteger),
    Column("cancelling_at", BigInteger),
    Column("cancelled_at", BigInteger),
    Column("output_file_id", String),
    Column("error_file_id", String),
    Column("ending", String),
    Column("error_code", String),
    Column("error_message", Text),
    Column("total", Integer, nullable=False),
    Column("completed", Integer, nullable=False),
    Column("failed", Integer, nullable=False),
    Column("worker", String, nullable=False),
    Column("epoch", BigInteger, nullable=False),
    Column("beat", BigInteger, nullable=False),
    Index("gateway_batches_owner", "owner", "id"),
    Index("gateway_batches_status", "status"),
    Index("gateway_batches_input", "input_file_id"),
)

# What was answered, until it stands in the batch's files.
RESULTS = Table(
    "gateway_batch_results",
    METADATA,
    Column("job_id", String, primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("is_good", Boolean, nullable=False),
    Column("line", LargeBinary, nullable=False),
)

_VERSION = Table("gateway_schema", MetaData(), Column("version", Integer, nullable=False))


def _create_tables(connection: Connection) -> None:
    METADATA.create_all(connection)


MIGRATIONS: tuple[Callable[[Connection], None], ...] = (_create_tables,)
_LOCK = 7_146_329_001  # any number that no other program takes


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

    def __init__(self, settings: Settings) -> None:
        url, options, self._foreign = _describe(settings)
        self._engine = create_async_engine(url, **options)
        self._writing = self._engine.execution_options(writes=True)
        if self._engine.dialect.name == "sqlite":
            event.listen(self._engine.sync_engine, "connect", _prepare_sqlite)
            event.listen(self._engine.sync_engine, "begin", _begin_sqlite)
        self._is_migrated = False
        self._migrating = asyncio.Lock()

    @asynccontextmanager
    async def read(self) -> AsyncIterator[AsyncConnection]:
        """What is read inside belongs together."""
        await self._ensure_migrated()
        async with self._translate(), self._engine.begin() as connection:
            yield connection

    @asynccontextmanager
    async def write(self) -> AsyncIterator[AsyncConnection]:
        """All that is written inside is kept, or nothing is."""
        await self._ensure_migrated()
        async with self._translate(), self._writing.begin() as connection:
            yield connection

    async def close(self) -> None:
        await self._engine.dispose()

    async def _ensure_migrated(self) -> None:
        """Not at the start: a gateway without its database still serves everything else."""
        if self._is_migrated:
            return
        async with self._migrating, self._translate():
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
            raise StorageUnavailable(f"batches: {error}; update it") from None
        except self._foreign as error:
            if "disk is full" in str(error) or "DiskFull" in str(error):
                raise StorageFull("there is no room left for what batches keep") from error
            log.warning("batch_storage_failed", reason=str(error).partition("\n")[0][:300])
            raise StorageUnavailable(
                "the database of files and batches does not answer; try again",
                retry_after_s=_RETRY_AFTER_S,
            ) from error


def _describe(settings: Settings) -> tuple[URL, dict[str, Any], tuple[type[Exception], ...]]:
    """The address, how to connect, and what can go wrong there."""
    assert settings.batch_folder is not None  # noqa: S101 — nobody comes here without
    if not settings.batch_database:
        url = URL.create("sqlite+aiosqlite", database=str(settings.batch_folder / _FILE))
        return url, {"pool_size": _CONNECTIONS}, (SQLAlchemyError, OSError, TimeoutError)
    if importlib.util.find_spec("asyncpg") is None:
        raise SettingsError(
            "GATEWAY_BATCH_DATABASE needs the extra `postgres`: pip install vllm-gateway[postgres]"
        )
    from asyncpg import InterfaceError, PostgresError  # noqa: PLC0415 — it is an extra

    try:
        url = make_url(settings.batch_database).set(drivername="postgresql+asyncpg")
    except ArgumentError:
        raise SettingsError("GATEWAY_BATCH_DATABASE: this is no address of a database") from None
    options = {
        "pool_size": _CONNECTIONS,
        "pool_pre_ping": True,
        "connect_args": {
            "timeout": _CONNECT_TIMEOUT_S,
            "command_timeout": _STATEMENT_TIMEOUT_S,
            # A gateway that is frozen in a transaction would keep its batches from all others.
            "server_settings": {"idle_in_transaction_session_timeout": _IDLE_TIMEOUT_MS},
        },
    }
    return url, options, (SQLAlchemyError, OSError, TimeoutError, PostgresError, InterfaceError)


def _prepare_sqlite(connection: Any, _record: object) -> None:
    """Readers beside a writer; what is committed outlives a power cut."""
    connection.isolation_level = None  # else the driver begins transactions as it thinks fit
    cursor = connection.cursor()
    cursor.execute(f"PRAGMA busy_timeout={_BUSY_TIMEOUT_MS}")
    cursor.execute("PRAGMA journal_mode=WAL")
    cursor.execute("PRAGMA synchronous=FULL")
    cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    """Who will write takes the lock first: to ask for it later may fail at once."""
    writes = connection.get_execution_options().get("writes")
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")
