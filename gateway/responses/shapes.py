"""Responses as OpenAI's SDK reads them."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import orjson

from gateway.errors import EngineError
from gateway.responses.turns import Turn

OPEN = ("queued", "in_progress")
_ENDED = ("completed", "incomplete", "failed", "cancelled")
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


def parse_response(body: bytes) -> dict[str, Any]:
    """An engine's; it has ended."""
    try:
        response = orjson.loads(body)
        is_whole = response["status"] in _ENDED and isinstance(response["output"], list)
    except (orjson.JSONDecodeError, LookupError, TypeError):
        is_whole = False
    if not is_whole:
        raise EngineError("the engine answered with no response", code="engine_garbled")
    return dict(response)


def split_output(response: Mapping[str, Any]) -> tuple[bytes, bytes]:
    """All but the output, and the output: a conversation goes on from that alone."""
    return orjson.dumps({**response, "output": []}), orjson.dumps(response["output"])


def build_deleted(response_id: str) -> bytes:
    return orjson.dumps({"id": response_id, "object": "response", "deleted": True})
