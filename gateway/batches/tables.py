"""The tables of files and batches, and how a database comes to have them.

Every change of them is a step of `MIGRATIONS`, which are applied in order, each in a transaction.
Alembic was weighed: it has no lock for several gateways that start at once, runs a script at its
import, and what it writes by itself (drafts of steps) is not needed for four tables.
"""

from __future__ import annotations

from collections.abc import Callable

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
    insert,
    select,
    text,
    update,
)

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
