"""What the launchers of an engine's hosts tell each other: a report to the head every few seconds,
and its answer, which says what to do.
"""

from __future__ import annotations

import hashlib
import hmac
from typing import Any, Literal

from aiohttp import web
from pydantic import BaseModel, Field, ValidationError

PATH = "/node"
DIAL_PATH = "/node/dial"
MOST_BEAT_S = 2.0  # between two reports
BEATS_IN_TIME = 5  # so many are missed before a host is given up


class Option(BaseModel):
    """An option of the engine, as the head has decided it."""

    name: str
    value: Any = None


class Part(BaseModel):
    """What the head starts, and every other host is to start its part of."""

    vllm: str
    model: str  # the head's setting
    model_digest: str
    options: list[Option]
    environment: dict[str, str]

    def find(self, name: str) -> Any:
        return next((option.value for option in self.options if option.name == name), None)

    @property
    def digest(self) -> str:
        """The same on both sides: of what has gone through JSON."""
        sent = Part.model_validate_json(self.model_dump_json()).model_dump_json()
        return hashlib.sha256(sent.encode()).hexdigest()[:32]


class Report(BaseModel):
    """Of a host that joins, about itself."""

    id: str = Field(max_length=64)  # of its launcher's life
    host: str = Field(max_length=255)
    address: str = Field(max_length=64)
    engine_port: int = 0  # tells launchers of one host apart
    state: Literal["waiting", "running", "refused", "left"]
    plan: str = Field("", max_length=64)  # the digest of the part that it has agreed to
    run: str = Field("", max_length=64)  # the one that it runs its part of
    ended: str = Field("", max_length=64)  # the last one whose part ended by itself here
    ended_s: float = 0.0  # how long ago that was
    cause: str = Field("", max_length=2000)  # of that, or of its refusal

    @property
    def title(self) -> str:
        return f"{self.host} ({self.address})"

    def is_same_host(self, other: Report) -> bool:
        """Its launcher may have been started anew since."""
        mine = (self.host, self.address, self.engine_port)
        return mine == (other.host, other.address, other.engine_port)


class Answer(BaseModel):
    """Of the head."""

    rank: int
    nodes: int
    run: str  # that is to run now; empty: none
    state: str  # of the head's engine
    beat_s: float
    part: Part


class Dial(BaseModel):
    """Whether the head can open a connection to a port of who asks."""

    port: int = Field(ge=1, le=65535)


def build_headers(token: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {token}"} if token else {}


def is_allowed(request: web.Request, token: str) -> bool:
    given = request.headers.get("Authorization", "").removeprefix("Bearer ")
    return hmac.compare_digest(given.encode("utf-8", "surrogateescape"), token.encode())


def describe_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(map(str, first['loc'])) or 'body'}: {first['msg']}"
