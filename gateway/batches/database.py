"""The connection to the database, SQLite or PostgreSQL: transactions, and errors in the words of
this program. What is in the tables is `store.py`'s matter.
"""

from __future__ import annotations

import asyncio
import importlib.util
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog
from sqlalchemy import Connection, event
from sqlalchemy.engine import URL, make_url
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, create_async_engine

from gateway.batches.tables import NewerSchemaError, migrate
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
