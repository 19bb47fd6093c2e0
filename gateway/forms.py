"""Reading a form with a file (`multipart/form-data`): bounded in size and in time as other bodies
are, and in the number of its fields. What a field means is the schemas' affair.
"""

from __future__ import annotations

import asyncio
import warnings

import aiohttp
from aiohttp import BodyPartReader, web
from aiohttp.http_exceptions import HttpProcessingError
from aiohttp.multipart import BadContentDispositionHeader, BadContentDispositionParam

from gateway.config import SETTINGS
from gateway.errors import BodyTimeout, InvalidRequest, PayloadTooLarge, UnsupportedMediaType
from gateway.request_body import BODIES
from gateway.request_context import CONTEXT
from gateway.schemas.transcription import FormField

_FORM = "multipart/form-data"
_MOST_FIELDS = 64
_CHUNK_BYTES = 2**16
_ENCODINGS = ("Content-Encoding", "Content-Transfer-Encoding")
# What aiohttp raises at forms that are none.
UNREADABLE_FORM = (
    ValueError,
    AssertionError,
    RuntimeError,  # its word for a `_charset_` that is too long to be one
    HttpProcessingError,
    aiohttp.ClientPayloadError,
    web.RequestPayloadError,
)


async def read_form(request: web.Request) -> list[FormField]:
    if request.content_type != _FORM:
        raise UnsupportedMediaType(
            f"the body is {request.headers.get('Content-Type', '')[:100]!r}; send a form, with "
            f"`Content-Type: {_FORM}`"
        )
    limit_s = request.app[SETTINGS].body_timeout_s
    try:
        async with asyncio.timeout(limit_s):
            return await _read_fields(request)
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {limit_s:g} s") from None
    except web.HTTPRequestEntityTooLarge:
        raise _too_large(request) from None
    except UNREADABLE_FORM as error:
        raise refuse_form(error) from None


def silence_form_warnings() -> None:
    """For the whole process: aiohttp warns of heads that it cannot read, and quotes them."""
    for category in (BadContentDispositionHeader, BadContentDispositionParam):
        warnings.simplefilter("ignore", category)


def refuse_form(error: Exception) -> InvalidRequest:
    return InvalidRequest(f"the form cannot be read: {error}", code="bad_form")


async def _read_fields(request: web.Request) -> list[FormField]:
    if any(name in request.headers for name in _ENCODINGS):
        raise InvalidRequest("send the form as it is", code="bad_encoding")
    fields: list[FormField] = []
    reader = await request.multipart()
    while part := await reader.next():
        if not isinstance(part, BodyPartReader) or part.name is None:
            raise InvalidRequest("the form has a part that is no field", code="bad_form")
        if any(name in part.headers for name in _ENCODINGS):
            raise InvalidRequest("send the form's fields as they are", code="bad_encoding")
        if len(fields) == _MOST_FIELDS:
            raise InvalidRequest(f"the form has more than {_MOST_FIELDS} fields", code="bad_form")
        if not _is_text(part.name) or not _is_text(part.filename or ""):
            raise InvalidRequest(
                "a name in the form is no UTF-8; send names of fields and of files in UTF-8",
                code="bad_form",
            )
        data = await _read_part(request, part)
        kind = part.headers.get("Content-Type", "")
        fields.append(FormField(part.name, part.filename, kind, data))
    return fields


def _is_text(name: str) -> bool:
    """Bytes of a header that are no UTF-8 come as surrogates, which nobody can write again."""
    return not any("\ud800" <= letter <= "\udfff" for letter in name)


async def _read_part(request: web.Request, part: BodyPartReader) -> bytearray:
    most, context = request.app[SETTINGS].max_body_bytes, request[CONTEXT]
    data = bytearray()
    while chunk := await part.read_chunk(_CHUNK_BYTES):
        if context.held_bytes + len(chunk) > most:
            raise _too_large(request)
        request.app[BODIES].hold(context, len(chunk))
        data += chunk
        await asyncio.sleep(0)  # a file that is here already would be read in one go
    return data


def _too_large(request: web.Request) -> PayloadTooLarge:
    most = request.app[SETTINGS].max_body_bytes
    return PayloadTooLarge(f"the form is larger than {most} bytes; send a shorter file")
