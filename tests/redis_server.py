"""A real Redis for tests, where its program is."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from lab.faults.servers.redis_server import RedisServer

__all__ = ["RedisServer", "find_redis", "run_redis"]


def find_redis() -> str:
    """Skips by name where there is none; where tests must not be skipped, fails."""
    program = shutil.which("redis-server")
    if program is None:
        reason = "no redis-server here; `scripts/system.sh redis` gets it"
        if os.environ.get("CI"):
            pytest.fail(reason)
        pytest.skip(reason)
    return program


@contextmanager
def run_redis(folder: Path) -> Iterator[RedisServer]:
    server = RedisServer(find_redis(), folder)
    server.start()
    try:
        yield server
    finally:
        server.kill()
