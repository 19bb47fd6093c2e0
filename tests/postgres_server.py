"""A real PostgreSQL on a port of the loopback, where its programs are."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from lab.faults.servers.postgres_server import Postgres, find_postgres, run_postgres

__all__ = ["Postgres", "find_postgres", "postgres"]


@pytest.fixture(scope="session")
def postgres() -> Iterator[Postgres]:
    if find_postgres() is None:
        message = "PostgreSQL is not here (scripts/system.sh postgres)"
        pytest.fail(message) if os.environ.get("CI") else pytest.skip(message)
    with run_postgres() as server:
        yield server
