"""A gateway that keeps batches, and its callers with OpenAI's SDK."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import openai
import orjson
import pytest

from gateway.batches.ownership import Ownership
from gateway.batches.service import open_database
from gateway.batches.shapes import FileRecord, JobRecord
from gateway.batches.store import Store
from gateway.storage.clock import SteadyClock
from gateway.storage.database import Database
from tests.gateway import conftest as gateway
from tests.gateway.conftest import Served, make_settings, serve_gateway
from tests.plain_http import NO_TLS
from tests.postgres_server import Postgres, postgres

__all__ = ["Postgres", "postgres"]  # the fixture is found here

CHAT = "/v1/chat/completions"
CLOCK = SteadyClock()


@pytest.fixture(params=["sqlite", "postgres"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Settings of a gateway with batches, on either database."""
    found: dict[str, Any] = {"batch_folder": tmp_path / "batches"}
    if request.param == "postgres":
        found["batch_database"] = request.getfixturevalue("postgres").make_database()
    return found


@dataclass
class Batches:
    """A gateway with batches, and a caller of it."""

    served: Served
    sdk: Any  # its types know OpenAI's own values alone

    async def upload(self, lines: Sequence[dict[str, Any]] | bytes, name: str = "in.jsonl") -> str:
        data = lines if isinstance(lines, bytes) else dump(lines)
        file = await self.sdk.files.create(file=(name, data), purpose="batch")
        return str(file.id)

    async def create(self, lines: Sequence[dict[str, Any]], **fields: Any) -> str:
        options: dict[str, Any] = {"endpoint": CHAT, "completion_window": "24h"} | fields
        file_id = await self.upload(lines)
        return str((await self.sdk.batches.create(input_file_id=file_id, **options)).id)

    async def wait(self, batch_id: str, *states: str) -> Any:
        states = states or ("completed", "failed", "expired", "cancelled")
        found: list[Any] = []

        async def has_ended() -> bool:
            found[:] = [await self.sdk.batches.retrieve(batch_id)]
            return found[0].status in states

        await until(has_ended)
        return found[0]

    async def read(self, file_id: str | None) -> list[dict[str, Any]]:
        if file_id is None:
            return []
        content = await self.sdk.files.content(file_id)
        return [orjson.loads(line) for line in content.content.splitlines()]


async def until(condition: Callable[[], Any]) -> None:
    """Long enough for a machine that has much else to do."""
    await gateway.until(condition, 90)


def dump(lines: Sequence[dict[str, Any]]) -> bytes:
    return b"".join(orjson.dumps(line) + b"\n" for line in lines)


def ask(number: int, content: str | None = None, **fields: Any) -> dict[str, Any]:
    """A line of a file: a question with its number."""
    messages = [{"role": "user", "content": content or f"question {number}"}]
    body = {"model": "fake", "messages": messages, **fields}
    return {"custom_id": f"line-{number}", "method": "POST", "url": CHAT, "body": body}


@contextlib.asynccontextmanager
async def open_batches(served: Served, key: str = "none") -> AsyncIterator[Batches]:
    async with open_sdk(served.url, key) as sdk:
        yield Batches(served, sdk)


@contextlib.asynccontextmanager
async def open_sdk(url: str, key: str = "none") -> AsyncIterator[Any]:
    """No retries: each answer is looked at."""
    options: dict[str, Any] = {"base_url": f"{url}/v1", "api_key": key, "max_retries": 0}
    client = openai.DefaultAsyncHttpxClient(verify=NO_TLS, timeout=60)
    async with openai.AsyncOpenAI(http_client=client, **options) as sdk:
        yield sdk


@pytest.fixture
async def batches(tmp_path: Path) -> AsyncIterator[Batches]:
    async with (
        serve_gateway(batch_folder=tmp_path / "batches") as served,
        open_batches(served) as opened,
    ):
        yield opened


JOB = JobRecord(
    id="batch_1",
    owner="alice",
    input_file_id="file-1",
    endpoint=CHAT,
    completion_window="24h",
    status="validating",
    created_at=1,
    expires_at=2**40,
    total=3,
)


@pytest.fixture
async def database(storage: dict[str, Any]) -> AsyncIterator[Database]:
    storage["batch_folder"].mkdir()
    opened = open_database(make_settings(**storage))
    store = Store(opened, CLOCK)
    file = FileRecord("file-1", "alice", "in.jsonl", "batch", 9, 1, "file-1", lines=3, url=CHAT)
    await store.add_file(file, [(n, f"line-{n}", n * 3, 3, "p") for n in range(3)])
    await store.add_job(JOB, 100)
    yield opened
    await opened.close()


async def claim(owner: Ownership) -> JobRecord:
    [job] = await owner.list_open()
    claimed = await owner.claim(job)
    assert claimed is not None
    return claimed
