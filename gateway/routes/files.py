"""/v1/files: what batches read and write, as OpenAI's SDK sends and takes it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import aclosing
from typing import Any

import orjson
from aiohttp import BodyPartReader, web

from gateway.admission.keys import CALLER
from gateway.batches.access import find_batches
from gateway.batches.shapes import (
    PURPOSE,
    FileRecord,
    build_file,
    parse_expiry,
)
from gateway.config import SETTINGS
from gateway.errors import (
    BodyTimeout,
    InvalidRequest,
    PayloadTooLarge,
    UnsupportedMediaType,
)
from gateway.forms import UNREADABLE_FORM, refuse_form
from gateway.request_body import BODIES
from gateway.request_context import CONTEXT
from gateway.schemas.pages import build_page, parse_page

ROUTES = (
    ("GET", "/v1/files"),
    ("POST", "/v1/files"),
    ("GET", "/v1/files/{file_id}"),
    ("DELETE", "/v1/files/{file_id}"),
    ("GET", "/v1/files/{file_id}/content"),
)
_MOST_LISTED = 10_000
_PIECE_BYTES = 2**17
_LONGEST_FIELD_BYTES = 4096
_LONGEST_NAME = 255
_EXPIRY = {"expires_after[anchor]": "anchor", "expires_after[seconds]": "seconds"}
_FIELDS = ("purpose", *_EXPIRY)
_MOST_FIELDS = 16  # known or not: one that sends them for ever gets an answer


async def handle_upload(request: web.Request) -> web.Response:
    """Line by line, never whole in memory."""
    service = find_batches(request.app)
    if request.content_type != "multipart/form-data":
        raise UnsupportedMediaType("send the file as multipart/form-data, as OpenAI's SDKs do")
    if request.headers.get("Content-Encoding", "identity") != "identity":
        raise InvalidRequest("send the file as it is, not packed", code="bad_encoding")
    fields: dict[str, str] = {}
    has_file, number_of_fields = False, 0
    async with service.receive(request[CALLER]) as (upload, end):
        async for part in _read_parts(request):
            if part.name == "file":
                if has_file:
                    raise InvalidRequest("one file a request", param="file")
                has_file = True
                end.filename = _clean_name(part.filename) or end.filename
                await _read_file(request, part, upload)
            else:
                number_of_fields += 1
                if number_of_fields > _MOST_FIELDS:
                    raise InvalidRequest(
                        f"the form has more than {_MOST_FIELDS} fields", code="bad_form"
                    )
                value = await _read_field(request, part)
                if part.name in _FIELDS:
                    fields[part.name] = value
        if not has_file:
            raise InvalidRequest("file is missing", param="file", code="missing_field")
        if fields.get("purpose") != PURPOSE:
            raise InvalidRequest(
                f"purpose must be {PURPOSE!r}: files are for batches here", param="purpose"
            )
        end.expires_s = parse_expiry(_read_expiry(fields), "expires_after")
    assert end.file is not None  # noqa: S101 — it has been received
    return _json(build_file(end.file))


async def handle_list(request: web.Request) -> web.Response:
    service, page = find_batches(request.app), parse_page(request.query, _MOST_LISTED, _MOST_LISTED)
    files, has_more = await service.store.list_files(
        request[CALLER].name,
        after=page.after,
        limit=page.limit,
        ascending=page.ascending,
        purpose=request.query.get("purpose"),
    )
    return _json(build_page([build_file(one) for one in files], has_more=has_more))


async def handle_retrieve(request: web.Request) -> web.Response:
    service = find_batches(request.app)
    file = await service.store.find_file(request[CALLER].name, request.match_info["file_id"])
    return _json(build_file(file))


async def handle_delete(request: web.Request) -> web.Response:
    service, file_id = find_batches(request.app), request.match_info["file_id"]
    await service.delete(request[CALLER], file_id)
    return _json({"id": file_id, "object": "file", "deleted": True})


async def handle_content(request: web.Request) -> web.StreamResponse:
    service = find_batches(request.app)
    file = await service.store.find_file(request[CALLER].name, request.match_info["file_id"])
    async with aclosing(service.read(file)) as pieces:
        first = await anext(pieces, b"")  # one that is lost is a 404, not half an answer
        return await _send(request, file, first, pieces)


async def _send(
    request: web.Request, file: FileRecord, first: bytes, pieces: AsyncIterator[bytes]
) -> web.StreamResponse:
    response = web.StreamResponse(
        headers={
            "Content-Type": "application/octet-stream",
            # Bytes of others' making: no browser may take them for a page.
            "Content-Disposition": "attachment",
            "X-Content-Type-Options": "nosniff",
        }
    )
    response.content_length = file.bytes
    request[CONTEXT].put_headers(response.headers)
    await response.prepare(request)
    await response.write(first)
    async for piece in pieces:
        await response.write(piece)
    await response.write_eof()
    return response


async def _read_parts(request: web.Request) -> Any:
    """The parts of the form, one after the other."""
    reader = await _wait(request, request.multipart())
    while (part := await _wait(request, reader.next())) is not None:
        if not isinstance(part, BodyPartReader):
            raise InvalidRequest("the form has another form in it", code="bad_form")
        yield part


async def _read_file(request: web.Request, part: BodyPartReader, upload: Any) -> None:
    bodies, context = request.app[BODIES], request[CONTEXT]
    while piece := await _wait(request, part.read_chunk(_PIECE_BYTES)):
        await upload.add(piece)
        # A long line is in memory as other bodies are, and counts with them.
        more = upload.held_bytes - context.held_bytes
        if more > 0:
            bodies.hold(context, more)
        elif more < 0:
            bodies.release(context, -more)


async def _read_field(request: web.Request, part: BodyPartReader) -> str:
    value = bytearray()
    while piece := await _wait(request, part.read_chunk(_LONGEST_FIELD_BYTES)):
        value += piece
        if len(value) > _LONGEST_FIELD_BYTES:
            raise PayloadTooLarge(f"the field {part.name!r} is too long")
    return value.decode("utf-8", "replace")


async def _wait(request: web.Request, reading: Any) -> Any:
    """A large file may take long; what must not last is that nothing comes."""
    limit_s = request.app[SETTINGS].body_timeout_s
    try:
        async with asyncio.timeout(limit_s):
            return await reading
    except TimeoutError:
        raise BodyTimeout(f"nothing of the file came for {limit_s:g} s") from None
    except UNREADABLE_FORM as error:
        raise refuse_form(error) from None


def _clean_name(name: str | None) -> str:
    """It is only ever shown, never a path here."""
    text = (name or "").encode("utf-8", "replace").decode()
    return "".join(one for one in text if one.isprintable())[:_LONGEST_NAME]


def _read_expiry(fields: dict[str, str]) -> dict[str, Any] | None:
    found: dict[str, Any] = {
        name: fields[field] for field, name in _EXPIRY.items() if field in fields
    }
    if not found:
        return None
    seconds = found.get("seconds", "")
    found["seconds"] = int(seconds) if seconds.isascii() and seconds.isdigit() else seconds
    return found


def _json(data: object) -> web.Response:
    body = data if isinstance(data, bytes) else orjson.dumps(data)
    return web.Response(body=body, content_type="application/json")


HANDLERS = (handle_list, handle_upload, handle_retrieve, handle_delete, handle_content)
