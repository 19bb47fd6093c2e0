"""Responses and their items as OpenAI's SDK reads them."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

import orjson

from gateway.errors import EngineError
from gateway.responses.turns import Turn
from gateway.schemas.fields import parse_json

OPEN = ("queued", "in_progress")
_ENDED = ("completed", "incomplete", "failed", "cancelled")
_PREFIXES = {
    "message": "msg",
    "function_call": "fc",
    "function_call_output": "fco",
    "reasoning": "rs",
    "custom_tool_call": "ctc",
    "custom_tool_call_output": "ctco",
}
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


def number_items(response_id: str, items: bytes) -> Iterator[dict[str, Any]]:
    """Items as they are listed: each with an id, and messages with a list of their parts."""
    for place, item in enumerate(parse_json(items)):
        if not isinstance(item, dict):
            continue
        kind = item.get("type")
        if not kind or not isinstance(kind, str):  # an engine may take what is no word
            kind = "message"
        prefix = _PREFIXES.get(kind, "item")
        name = f"{prefix}_{response_id.removeprefix('resp_')}_{place}"
        told = {**item, "type": kind, "id": item.get("id") or name}
        if kind == "message":
            told["content"] = _list_parts(item)
            told["status"] = item.get("status") or "completed"
        yield told


def _list_parts(message: Mapping[str, Any]) -> Any:
    content = message.get("content")
    if not isinstance(content, str):
        return content
    if message.get("role") == "assistant":
        return [{"type": "output_text", "text": content, "annotations": []}]
    return [{"type": "input_text", "text": content}]
