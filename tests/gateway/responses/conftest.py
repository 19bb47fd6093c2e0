"""A gateway that stores responses, on either database, and its callers with OpenAI's SDK."""

from __future__ import annotations

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from openai.types.responses import Response

from gateway.admission.keys import make_key
from tests.gateway import conftest as gateway
from tests.gateway.batches.conftest import open_sdk
from tests.gateway.conftest import Served, serve_gateway
from tests.postgres_server import Postgres, postgres

__all__ = ["Postgres", "postgres"]  # the fixture is found here

ENDED = ("completed", "incomplete", "failed", "cancelled")


@pytest.fixture(params=["sqlite", "postgres"])
def stored(request: pytest.FixtureRequest, tmp_path: Path) -> dict[str, Any]:
    """Settings of a gateway that stores responses, on either database."""
    if request.param == "postgres":
        return {"responses_database": request.getfixturevalue("postgres").make_database()}
    return {"responses_database": str(tmp_path / "responses.sqlite")}


@dataclass
class Caller:
    """A running gateway, and somebody who asks it."""

    served: Served
    sdk: Any  # its types know OpenAI's own values alone

    async def ask(self, text: str = "hi", **fields: Any) -> Any:
        return await self.sdk.responses.create(model="fake", input=text, **fields)

    async def wait(self, response_id: str, *states: str) -> Any:
        found: list[Any] = []

        async def is_so() -> bool:
            found[:] = [await self.sdk.responses.retrieve(response_id)]
            return found[0].status in (states or ENDED)

        await until(is_so)
        return found[0]

    def last_input(self) -> Any:
        """What the engine got."""
        return self.served.engine.calls[-1]["input"]


@pytest.fixture
async def caller(stored: dict[str, Any]) -> AsyncIterator[Caller]:
    async with serve_gateway(**stored) as served, open_sdk(served.url) as sdk:
        yield Caller(served, sdk)


@pytest.fixture
async def plain(tmp_path: Path) -> AsyncIterator[Caller]:
    """On SQLite alone, for what does not hang on the database."""
    place = str(tmp_path / "responses.sqlite")
    async with serve_gateway(responses_database=place) as served, open_sdk(served.url) as sdk:
        yield Caller(served, sdk)


@dataclass
class Keys:
    """A file of keys."""

    path: Path
    keys: dict[str, str] = field(default_factory=dict)

    def write(self, **entries: str) -> dict[str, Any]:
        """Settings of a gateway that has these keys."""
        texts = []
        for name, more in entries.items():
            key, entry = make_key(name)
            self.keys[name] = key
            texts.append(f"{entry}{more}\n")
        self.path.write_text("".join(texts))
        return {"keys_file": self.path}


@pytest.fixture
def keys(tmp_path: Path) -> Keys:
    return Keys(tmp_path / "keys.toml")


async def until(condition: Any) -> None:
    """Long enough for a machine that has much else to do."""
    await gateway.until(condition, 90)


def check_shape(response: Any) -> None:
    """It is what OpenAI's types say, not only near enough to be read."""
    Response.model_validate(response.model_dump(warnings=False))
