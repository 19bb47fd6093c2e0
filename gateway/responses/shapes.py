"""Responses as OpenAI's SDK reads them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import orjson

from gateway.errors import EngineError, InvalidRequest
from gateway.responses.turns import Turn
from gateway.schemas.large_json import scan_members

OPEN = ("queued", "in_progress")
_ENDED = ("completed", "incomplete", "failed", "cancelled")
_NO_OUTPUT = b"[]}"
# The codes of OpenAI's for what has failed; theirs for all else is the first.
_SERVER_ERROR, _RATE_LIMIT, _INVALID = "server_error", "rate_limit_exceeded", "invalid_prompt"


def build_queued(turn: Turn, model: str) -> dict[str, Any]:
    """One that is to be answered in the background."""
    return {
        "id": turn.id,
        "object": "response",
        "created_at": int(time.time()),
        "status": "queued",
        "background": True,
        "error": None,
        "incomplete_details": None,
        "model": model,
        "output": [],
        "previous_response_id": turn.previous_id,
        "store": True,
        "usage": None,
        **turn.repeated,
    }


def build_failed(response: Mapping[str, Any], status: int, message: str) -> dict[str, Any]:
    """The same, after an error of this HTTP status."""
    code = _SERVER_ERROR
    if status == 429:
        code = _RATE_LIMIT
    elif 400 <= status < 500:
        code = _INVALID
    error = {"code": code, "message": message}
    return {**response, "status": "failed", "error": error}


@dataclass(frozen=True, slots=True)
class Told:
    """A response as it is stored: all but its output, which is an empty list at its end, and the
    output: a conversation goes on from that alone.
    """

    status: str
    rest: bytes
    output: bytes

    def build(self) -> bytes:
        return self.rest[: -len(_NO_OUTPUT)] + self.output + b"}"


def split_output(response: Mapping[str, Any]) -> Told:
    rest = {name: value for name, value in response.items() if name != "output"}
    output = orjson.dumps(response["output"])
    return Told(response["status"], orjson.dumps({**rest, "output": []}), output)


async def read_response(body: bytes, own: Mapping[str, Any]) -> Told:
    """An engine's, which has ended, with what the engine does not know of it. It is copied where it
    lies: one with the chances of its tokens has megabytes.
    """
    try:
        members = await copy_members(body)
    except InvalidRequest:
        members = {}
    told = tell(members | dump_members(own))
    if told is None:
        raise EngineError("the engine answered with no response", code="engine_garbled")
    return told


def tell(members: Mapping[str, bytes]) -> Told | None:
    """A response by its members; none of what has not ended as one."""
    output = members.get("output", b"")
    status = members.get("status", b"").strip(b'"').decode("utf-8", "replace")
    if status not in _ENDED or output[:1] != b"[":
        return None
    rest = {name: raw for name, raw in members.items() if name != "output"}
    return Told(status, join_members({**rest, "output": b"[]"}), output)


def dump_members(fields: Mapping[str, Any]) -> dict[str, bytes]:
    return {name: orjson.dumps(value) for name, value in fields.items()}


async def join_output(rest: bytes, status: str, output: bytes) -> bytes:
    """A stored response as it is now."""
    members = await copy_members(rest)
    return join_members({**members, "status": orjson.dumps(status), "output": output})


async def copy_members(body: bytes) -> dict[str, bytes]:
    members = await scan_members(body, len(body))
    return {name: body[one.start : one.end] for name, one in members.items()}


def join_members(members: Mapping[str, bytes]) -> bytes:
    return b"{" + b",".join(orjson.dumps(name) + b":" + raw for name, raw in members.items()) + b"}"


def build_deleted(response_id: str) -> bytes:
    return orjson.dumps({"id": response_id, "object": "response", "deleted": True})
