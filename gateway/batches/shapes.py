"""/v1/files and /v1/batches: what callers send, each line of a file included, and what they get, in
the shapes of OpenAI's SDK. Bodies of the requests in a file are the business of `openai.py`.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import orjson

from gateway.errors import GatewayError, InvalidRequest
from gateway.schemas.fields import is_storable, parse_json_object, read_integer, wrong_type
from gateway.schemas.large_json import SMALL_BYTES, Member, scan_members
from gateway.schemas.openai import build_error

PURPOSE = "batch"
ENDPOINTS = ("/v1/chat/completions", "/v1/completions", "/v1/embeddings", "/v1/responses")
_LONGEST_ID = 512
_SHARED_BYTES = 4096  # of a system prompt: what begins so alike is taken to be the same
_LARGEST_NAME_BYTES = 1024
_WINDOW = re.compile(r"([1-9][0-9]{0,6})([smhd])")
_UNIT_S = {"s": 1, "m": 60, "h": 3600, "d": 86_400}
_LONGEST_WINDOW_S = 30 * 86_400
_SHORTEST_EXPIRY_S, _LONGEST_EXPIRY_S = 3600, 30 * 86_400
_MOST_METADATA = 16
_LONGEST_METADATA_KEY, _LONGEST_METADATA_VALUE = 64, 512


@dataclass(frozen=True, slots=True)
class Line:
    """One request of a file: where its body lies in the line, and what it has in common with
    others.
    """

    custom_id: str
    url: str
    model: str | None
    body_start: int
    body_size: int
    prefix: str  # the same for lines with one model and one system prompt


@dataclass(frozen=True, slots=True)
class BatchRequest:
    """The body of POST /v1/batches."""

    input_file_id: str
    endpoint: str
    completion_window: str
    window_s: int
    metadata: dict[str, str] | None = None
    output_expires_s: int | None = None


@dataclass(slots=True)
class FileRecord:
    """A file as it is kept."""

    id: str
    owner: str
    filename: str
    purpose: str
    bytes: int
    created_at: int
    blob: str
    expires_at: int | None = None
    lines: int = 0
    url: str = ""
    models: list[str] = field(default_factory=list)


@dataclass(slots=True)
class JobRecord:
    """A batch as it is kept. Its states are OpenAI's; `ending` is the last one that it goes to."""

    id: str
    owner: str
    input_file_id: str
    endpoint: str
    completion_window: str
    status: str
    created_at: int
    expires_at: int
    total: int
    metadata: dict[str, str] | None = None
    model: str | None = None
    output_expires_s: int | None = None
    in_progress_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    output_file_id: str | None = None
    error_file_id: str | None = None
    ending: str | None = None
    error_code: str | None = None
    error_message: str | None = None
    completed: int = 0
    failed: int = 0
    worker: str = ""  # the gateway that runs it
    epoch: int = 0  # of its ownership: who has an older one may write nothing any more
    beat: int = 0  # rises while its owner lives


async def parse_line(line: bytes, number: int, most_items: int) -> Line:
    """A mistake is told with its line."""
    try:
        return await _parse_line(line, most_items)
    except GatewayError as error:
        raise InvalidRequest(
            f"line {number}: {error.message}", param=error.param, code=error.error_code
        ) from None


async def _parse_line(line: bytes, most_items: int) -> Line:
    is_small = len(line) <= SMALL_BYTES
    whole = parse_json_object(line) if is_small else None
    members = await scan_members(line, most_items)
    read = _Reader(line, members)
    custom_id = read.text("custom_id")
    if not 0 < len(custom_id) <= _LONGEST_ID or not is_storable(custom_id):
        raise InvalidRequest(
            f"custom_id has 1 to {_LONGEST_ID} characters, and no NUL",
            param="custom_id",
            code="invalid_value",
        )
    if read.text("method") != "POST":
        raise InvalidRequest("method must be POST", param="method")
    url = read.text("url")
    if url not in ENDPOINTS:
        raise InvalidRequest(f"url must be one of {', '.join(ENDPOINTS)}", param="url")
    body = members.get("body")
    if body is None or line[body.start : body.start + 1] != b"{":
        raise wrong_type("body", "an object")
    text = line[body.start : body.end]
    if whole is not None:
        model, prefix = _read_body(whole["body"])
    else:
        model, prefix = await _read_large_body(text, most_items)
    name = f"{model}\0{prefix}".encode("utf-8", "surrogatepass")
    group = hashlib.blake2b(name, digest_size=8).hexdigest()
    return Line(custom_id, url, model, body.start, len(text), group)


class _Reader:
    """Small members of an object of whatever size."""

    def __init__(self, text: bytes, members: Mapping[str, Member]) -> None:
        self._text, self._members = text, members

    def text(self, name: str) -> str:
        member = self._members.get(name)
        if member is None:
            raise InvalidRequest(f"{name} is missing", param=name, code="missing_field")
        value = self.load(name)
        if not isinstance(value, str):
            raise wrong_type(name, "a string")
        return value

    def load(self, name: str) -> Any:
        """Nothing where it is not there, or longer than a name."""
        member = self._members.get(name)
        if member is None or member.size > _LARGEST_NAME_BYTES * 4:
            return None
        try:
            return orjson.loads(self._text[member.start : member.end])
        except orjson.JSONDecodeError:
            raise InvalidRequest(f"{name} is not JSON", param=name, code="invalid_json") from None


def _read_body(body: Mapping[str, Any]) -> tuple[str | None, str]:
    _refuse_stream(body.get("stream"))
    messages = body.get("messages")
    system = body.get("instructions")
    if isinstance(messages, list) and messages and isinstance(messages[0], dict):
        first = messages[0]
        system = first.get("content") if first.get("role") in {"system", "developer"} else None
    text = system if isinstance(system, str) else orjson.dumps(system or "").decode()
    return _check_model(body.get("model")), text[:_SHARED_BYTES]


async def _read_large_body(text: bytes, most_items: int) -> tuple[str | None, str]:
    members = await scan_members(text, most_items)
    read = _Reader(text, members)
    _refuse_stream(read.load("stream"))
    start = members.get("messages") or members.get("instructions")
    shared = text[start.start : start.start + _SHARED_BYTES // 4] if start else b""
    return _check_model(read.load("model")), shared.decode("utf-8", "replace")


def _check_model(model: Any) -> str | None:
    if model is not None and not isinstance(model, str):
        raise wrong_type("body.model", "a string")
    if model is not None and (len(model) > _LONGEST_ID or not is_storable(model)):
        raise InvalidRequest(f"body.model has at most {_LONGEST_ID} characters", param="body.model")
    return model


def _refuse_stream(value: Any) -> None:
    if value:
        raise InvalidRequest(
            "body.stream: nobody reads a stream in a batch; leave it out", param="body.stream"
        )


def parse_batch_request(body: bytes) -> BatchRequest:
    data = parse_json_object(body)
    texts: dict[str, str] = {}
    for name in ("input_file_id", "endpoint", "completion_window"):
        if name not in data:
            raise InvalidRequest(f"{name} is missing", param=name, code="missing_field")
        if not isinstance(data[name], str):
            raise wrong_type(name, "a string")
        texts[name] = data[name]
    if texts["endpoint"] not in ENDPOINTS:
        raise InvalidRequest(f"endpoint must be one of {', '.join(ENDPOINTS)}", param="endpoint")
    return BatchRequest(
        **texts,
        window_s=_read_window(texts["completion_window"]),
        metadata=_read_metadata(data.get("metadata")),
        output_expires_s=parse_expiry(data.get("output_expires_after"), "output_expires_after"),
    )


def _read_window(text: str) -> int:
    found = _WINDOW.fullmatch(text)
    seconds = int(found[1]) * _UNIT_S[found[2]] if found else 0
    if not 0 < seconds <= _LONGEST_WINDOW_S:
        raise InvalidRequest(
            "completion_window is a time such as 24h, 90m or 7d, of 30d at most",
            param="completion_window",
        )
    return seconds


def _read_metadata(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if not isinstance(value, dict) or not all(isinstance(one, str) for one in value.values()):
        raise wrong_type("metadata", "an object of texts")
    is_short = all(
        len(key) <= _LONGEST_METADATA_KEY and len(one) <= _LONGEST_METADATA_VALUE
        for key, one in value.items()
    )
    if len(value) > _MOST_METADATA or not is_short:
        raise InvalidRequest(
            f"metadata has at most {_MOST_METADATA} names of {_LONGEST_METADATA_KEY} characters "
            f"with texts of {_LONGEST_METADATA_VALUE}",
            param="metadata",
        )
    return value


def parse_expiry(value: Any, name: str) -> int | None:
    """`{"anchor": "created_at", "seconds": 3600}`."""
    if value is None:
        return None
    if not isinstance(value, dict) or value.get("anchor") != "created_at":
        raise InvalidRequest(f'{name} is {{"anchor": "created_at", "seconds": …}}', param=name)
    seconds = read_integer(value, "seconds", 0, low=0)
    if not _SHORTEST_EXPIRY_S <= seconds <= _LONGEST_EXPIRY_S:
        raise InvalidRequest(
            f"{name}.seconds must be {_SHORTEST_EXPIRY_S} to {_LONGEST_EXPIRY_S}", param=name
        )
    return seconds


def build_file(file: FileRecord) -> dict[str, Any]:
    return {
        "id": file.id,
        "object": "file",
        "bytes": file.bytes,
        "created_at": file.created_at,
        "expires_at": file.expires_at,
        "filename": file.filename,
        "purpose": file.purpose,
        "status": "processed",
        "status_details": None,
    }


_TOLD = (
    *("id", "endpoint", "model", "input_file_id", "completion_window", "status"),
    *("output_file_id", "error_file_id", "created_at", "in_progress_at", "expires_at"),
    *("finalizing_at", "completed_at", "failed_at", "expired_at", "cancelling_at", "cancelled_at"),
    "metadata",
)


def build_batch(job: JobRecord) -> dict[str, Any]:
    counts = {"total": job.total, "completed": job.completed, "failed": job.failed}
    errors = None
    if job.error_code is not None:
        error = {"code": job.error_code, "message": job.error_message, "line": None, "param": None}
        errors = {"object": "list", "data": [error]}
    told = {name: getattr(job, name) for name in _TOLD}
    return {**told, "object": "batch", "request_counts": counts, "errors": errors}


def build_response_line(custom_id: str, request_id: str, status: int, body: bytes) -> bytes:
    """What was answered to one line, whether it was good or not; the body as the engine wrote it,
    but for line breaks, which would be the end of the line here.
    """
    head = {"id": f"batch_req_{request_id}", "custom_id": custom_id}
    answer = {"status_code": status, "request_id": request_id}
    body = body.replace(b"\n", b" ").replace(b"\r", b" ")
    parts = (orjson.dumps(head)[:-1], b',"response":', orjson.dumps(answer)[:-1], b',"body":')
    return b"".join((*parts, body or b"null", b'},"error":null}\n'))


def build_refusal_line(custom_id: str, request_id: str, error: GatewayError) -> bytes:
    return build_response_line(custom_id, request_id, error.status, build_error(error))


def build_unanswered_line(custom_id: str, request_id: str, code: str, message: str) -> bytes:
    """For a line that was never answered: the batch has ended before."""
    head = {"id": f"batch_req_{request_id}", "custom_id": custom_id, "response": None}
    return orjson.dumps({**head, "error": {"code": code, "message": message}}) + b"\n"
