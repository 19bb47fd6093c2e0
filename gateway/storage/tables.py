"""Every table of the gateway: of files and batches (`gateway/batches`), of usage and audit
(`gateway/records`), of stored responses (`gateway/responses`). All may lie in one database, so they
are one schema with one list of steps; what is asked of the tables is those rooms' matter.
"""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import (
    BigInteger,
    Boolean,
    Column,
    Connection,
    ForeignKey,
    Index,
    Integer,
    LargeBinary,
    MetaData,
    String,
    Table,
    Text,
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

# What each key used of each model on a day of UTC ("2026-11-29").
USAGE = Table(
    "gateway_usage",
    METADATA,
    Column("day", String, primary_key=True),
    Column("key", String, primary_key=True),
    Column("model", String, primary_key=True),
    Column("requests", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("batch_lines", BigInteger, nullable=False),
    Index("gateway_usage_key", "key", "day"),
)

# The same tokens by key and day, and by key and month ("2026-11"): what budgets are held to.
# `change` is the number of the write, so that whoever looks reads only what is new.
SPENT = Table(
    "gateway_spent",
    METADATA,
    Column("period", String, primary_key=True),
    Column("key", String, primary_key=True),
    Column("tokens", BigInteger, nullable=False),
    Column("change", BigInteger, nullable=False),
    Index("gateway_spent_change", "change"),
)

# The last write of each gateway, so that one whose answer was lost is not made twice; and, by a
# name that none has, the number of all of them.
WRITERS = Table(
    "gateway_writers",
    METADATA,
    Column("name", String, primary_key=True),
    Column("number", BigInteger, nullable=False),
    Column("written_at", BigInteger, nullable=False),
)

# One row a request. Ids are in order of time.
AUDIT = Table(
    "gateway_audit",
    METADATA,
    Column("id", String, primary_key=True),
    Column("time_ms", BigInteger, nullable=False),
    Column("key", String, nullable=False),
    Column("route", String, nullable=False),
    Column("model", String, nullable=False),
    Column("request_id", String, nullable=False),
    Column("status", Integer, nullable=False),
    Column("verdict", String, nullable=False),
    Column("prompt_bytes", BigInteger, nullable=False),
    Column("answer_bytes", BigInteger, nullable=False),
    Column("prompt_tokens", BigInteger),
    Column("completion_tokens", BigInteger),
    Column("duration_ms", BigInteger, nullable=False),
    Column("prompt", Text),
    Column("answer", Text),
    Index("gateway_audit_key", "key", "id"),
)

# What was asked and answered, as JSON, and from which other one it goes on. What is large comes
# last: SQLite reads a row from its beginning. Ids are in order of time.
RESPONSES = Table(
    "gateway_responses",
    METADATA,
    Column("id", String, primary_key=True),
    Column("owner", String, nullable=False),
    Column("previous_id", String),
    Column("status", String, nullable=False),
    Column("is_background", Boolean, nullable=False),
    Column("created_at", BigInteger, nullable=False),
    Column("expires_at", BigInteger, nullable=False),
    Column("depth", Integer, nullable=False),  # of its conversation, with itself
    Column("bytes", BigInteger, nullable=False),
    Column("context_bytes", BigInteger, nullable=False),  # of its conversation, with itself
    Column("worker", String, nullable=False),  # the gateway that runs it in the background
    Column("beat", BigInteger, nullable=False),  # rises while that gateway lives
    Column("input", LargeBinary, nullable=False),  # the items that came with it
    Column("output", LargeBinary, nullable=False),
    Column("response", LargeBinary, nullable=False),  # all but the output
    Index("gateway_responses_owner", "owner", "id", "bytes"),
    Index("gateway_responses_previous", "previous_id"),
    Index("gateway_responses_status", "status"),
    Index("gateway_responses_expires", "expires_at"),
)

# The events of a background response that is a stream, some in a row; they go with it.
RESPONSE_EVENTS = Table(
    "gateway_response_events",
    METADATA,
    Column(
        "response_id",
        String,
        ForeignKey("gateway_responses.id", ondelete="CASCADE"),
        primary_key=True,
    ),
    Column("number", Integer, primary_key=True, autoincrement=False),  # of the first
    Column("count", Integer, nullable=False),
    Column("size", Integer, nullable=False),
    Column("packed", LargeBinary, nullable=False),
)

_BATCHES = (FILES, LINES, JOBS, RESULTS)
_RECORDS = (USAGE, SPENT, WRITERS, AUDIT)


def _create_batches(connection: Connection) -> None:
    METADATA.create_all(connection, _BATCHES)


def _create_records(connection: Connection) -> None:
    METADATA.create_all(connection, _RECORDS)


def _create_responses(connection: Connection) -> None:
    METADATA.create_all(connection, (RESPONSES,))


def _create_response_events(connection: Connection) -> None:
    METADATA.create_all(connection, (RESPONSE_EVENTS,))


# In this order; what has been released is not changed any more.
MIGRATIONS: tuple[Callable[[Connection], None], ...] = (
    _create_batches,
    _create_records,
    _create_responses,
    _create_response_events,
)
