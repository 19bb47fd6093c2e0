"""A gateway that keeps usage and audit, on either database, and its keys."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from gateway.admission.keys import make_key
from gateway.observability.metrics import Metrics
from gateway.records.ledger import Ledger
from gateway.records.service import Records
from tests.gateway import conftest as gateway
from tests.gateway.conftest import Served, make_settings
from tests.plain_http import NO_TLS
from tests.postgres_server import Postgres, postgres

__all__ = ["Postgres", "postgres"]  # the fixture is found here


@dataclass
class Keys:
    """A file of keys, each with its headers; `root` is an admin."""

    path: Path
    headers: dict[str, dict[str, str]] = field(default_factory=dict)

    def write(self, **entries: str) -> dict[str, Any]:
        """Settings of a gateway that has these keys."""
        texts = []
        for name, more in ({"root": "admin = true"} | entries).items():
            key, entry = make_key(name)
            self.headers[name] = {"Authorization": f"Bearer {key}"}
            texts.append(f"{entry}{more}\n")
        self.path.write_text("".join(texts))
        return {"keys_file": self.path}


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys.toml")


@pytest.fixture(params=["sqlite", "postgres"])
def kept(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Settings that keep usage, on either database."""
    address = str(tmp_path / "usage.sqlite")
    if request.param == "postgres":
        address = request.getfixturevalue("postgres").make_database()
    return {"usage_database": address, "usage_interval_s": 0.05}


def open_records(kept: Mapping[str, Any], **further: Any) -> tuple[Records, Ledger]:
    """Without a gateway around them."""
    settings = make_settings(**kept, **further)
    metrics = Metrics()
    ledger = Ledger(metrics, audits=settings.audit)
    return Records(settings, ledger, metrics), ledger


async def ask(url: str, headers: Mapping[str, str], content: str = "hi", **more: Any) -> Any:
    """A chat of 7 tokens, by the fake engine's count, on a connection of its own."""
    messages = [{"role": "user", "content": content}]
    body = {"model": "fake", "messages": messages, "max_tokens": 4, **more}
    async with httpx.AsyncClient(timeout=60, verify=NO_TLS) as client:
        return await client.post(f"{url}/v1/chat/completions", json=body, headers=headers)


async def read_usage(url: str, headers: Mapping[str, str], query: str = "group=day") -> Any:
    async with httpx.AsyncClient(timeout=60, verify=NO_TLS) as client:
        answer = await client.get(f"{url}/usage?{query}", headers=headers)
    return answer.json()["data"] if answer.status_code == 200 else answer


async def read_audit(url: str, headers: Mapping[str, str], query: str = "") -> Any:
    async with httpx.AsyncClient(timeout=60, verify=NO_TLS) as client:
        answer = await client.get(f"{url}/audit?{query}", headers=headers)
    return answer.json() if answer.status_code == 200 else answer


async def wait_for_tokens(url: str, headers: Mapping[str, str], key: str, tokens: int) -> Any:
    """The key's row of the model, once so many are written."""
    found: list[dict[str, Any]] = []

    async def are_there() -> bool:
        rows = await read_usage(url, headers, f"key={key}")
        found[:] = [row for row in rows if row["model"] == "fake"]
        told = sum(row["prompt_tokens"] + row["completion_tokens"] for row in found)
        return bool(found) and told >= tokens

    await until(are_there)
    return found[0]


async def until(condition: Callable[[], Any]) -> None:
    """Long enough for a machine that has much else to do."""
    await gateway.until(condition, 90)


async def wait_for_row(served: Served, headers: Mapping[str, str], query: str) -> dict[str, Any]:
    """The newest row that the query finds, once there is one."""
    rows: list[dict[str, Any]] = []

    async def is_there() -> bool:
        rows[:] = (await read_audit(served.url, headers, query))["data"]
        return bool(rows)

    await until(is_there)
    return rows[0]
