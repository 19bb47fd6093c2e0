"""What all who keep rows of callers need: ids, and an owner's lock."""

from __future__ import annotations

import secrets
import time

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncConnection

DAY_S = 86_400
_OWNER_LOCKS = 714_632_901  # any number that no other program takes


def make_id(kind: str) -> str:
    """In order of time, and not to be guessed."""
    return f"{kind}{time.time_ns():016x}{secrets.token_hex(8)}"


async def lock_owner(connection: AsyncConnection, owner: str) -> None:
    """Until the transaction ends: what is counted of an owner stays so. SQLite has one writer."""
    if connection.dialect.name == "postgresql":
        await connection.execute(
            select(func.pg_advisory_xact_lock(_OWNER_LOCKS, func.hashtext(owner)))
        )
