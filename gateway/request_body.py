"""Reading a request's body: JSON, all of it, bounded in size (sent and inflated), in time, in
values, and in what all bodies together take; and the count of those that are held.
"""

from __future__ import annotations

import asyncio
import re
import zlib
from codecs import BOM_UTF8
from typing import NoReturn

from aiohttp import web
from aiohttp.http_exceptions import HttpProcessingError, PayloadEncodingError

from common.processes import return_freed_memory
from gateway.config import SETTINGS, Settings
from gateway.errors import (
    BodyTimeout,
    InvalidRequest,
    Overloaded,
    PayloadTooLarge,
    UnsupportedMediaType,
)
from gateway.observability.metrics import Metrics
from gateway.request_context import CONTEXT, RequestContext

_WINDOWS = {"gzip": 16 + zlib.MAX_WBITS, "deflate": zlib.MAX_WBITS}
# What is smaller has few values, whatever it holds; and large bodies leave room for it.
_SMALL_BYTES = 2**16
_SHARE_OF_LARGE = 7 / 8
_SLICE_BYTES = 2**16
_SLICES_AT_ONCE = 4  # inflated and counted between two looks at the event loop
# An object or a list costs whoever parses it as much as so many numbers.
_VALUES_A_CONTAINER = 100
_LONGEST_WAIT_S, _MOST_WAITING = 1.0, 32
_RETRY_AFTER_S = 1
# After so many were held, memory is given back when their requests have ended.
_MANY_BYTES = 2**25
_SETTLED_S = 1.0
_JSON = re.compile(r"(application|text)/([\w.+-]+\+)?json", re.IGNORECASE)


class HeldBodies:
    """The bytes of all bodies in memory: each from its arrival until an engine has answered.

    Nobody bounds that otherwise: while an engine reads nothing, requests wait for it with theirs.
    """

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._most = settings.max_held_bytes
        self._held = self._most_held = 0
        self._waiting = 0
        self._released = asyncio.Event()  # set once, for those who wait now
        self._is_returning = False
        metrics.held_body_bytes.read = lambda: [((), self._held)]

    def hold(self, context: RequestContext, size: int) -> None:
        """So many bytes more; `Overloaded` where that is too much. One body alone always fits."""
        if not self._has_room(context, size):
            self._refuse(context)
        self.add(context, size)

    def add(self, context: RequestContext, size: int) -> None:
        """The same for what is inside already: it is not turned away for its copies."""
        context.held_bytes += size
        context.read_bytes += size
        self._held += size
        self._most_held = max(self._most_held, self._held)

    async def wait_for_room(self, context: RequestContext, size: int) -> None:
        """Before a body that is announced is read: whoever is refused at once comes again at once,
        and each time megabytes are on their way. Not all may wait, for up to three quarters of a
        megabyte of what each sends is in aiohttp's buffers all the same.
        """
        if self._has_room(context, size):
            return
        self._waiting += 1
        try:
            async with asyncio.timeout(_LONGEST_WAIT_S):
                while self._waiting <= _MOST_WAITING and not self._has_room(context, size):
                    await self._released.wait()
        except TimeoutError:
            pass
        finally:
            self._waiting -= 1
        if not self._has_room(context, size):
            self._refuse(context)

    def _has_room(self, context: RequestContext, size: int) -> bool:
        own, others = context.held_bytes + size, self._held - context.held_bytes
        most = self._most if own <= _SMALL_BYTES else self._most * _SHARE_OF_LARGE
        return not others or others + own <= most

    def _refuse(self, context: RequestContext) -> NoReturn:
        """What it held is given up first: nobody who arrives is to be refused for its sake, too."""
        others = self._held - context.held_bytes
        self.release(context)
        raise Overloaded(
            f"the bodies of other requests take {others} bytes already; try again in "
            f"{_RETRY_AFTER_S} s, or with a smaller one",
            code="too_many_bodies",
            retry_after_s=_RETRY_AFTER_S,
        )

    def release(self, context: RequestContext, size: int | None = None) -> None:
        """All of the request's, or so many of them."""
        size = context.held_bytes if size is None else min(size, context.held_bytes)
        self._held -= size
        context.held_bytes -= size
        if self._waiting:
            self._released.set()
            self._released = asyncio.Event()
        if not self._held and self._most_held > _MANY_BYTES:
            # They arrived in pieces, with what small requests need between them.
            self._most_held = 0
            if not self._is_returning:
                self._is_returning = True
                asyncio.get_running_loop().call_later(_SETTLED_S, self._return_memory)

    def _return_memory(self) -> None:
        """In a thread: after hundreds of megabytes it takes as many milliseconds."""
        self._is_returning = False
        asyncio.get_running_loop().run_in_executor(None, return_freed_memory)


BODIES = web.AppKey("bodies", HeldBodies)


async def read_body(request: web.Request) -> bytes:
    settings = request.app[SETTINGS]
    _check_type(request.headers.get("Content-Type", ""))
    if (request.content_length or 0) > settings.max_body_bytes:
        raise _too_large(settings.max_body_bytes)
    body = await _read_plain(request)
    # Some editors and Windows' shells begin a text with it; to the engine it is nothing.
    body = body.removeprefix(BOM_UTF8)
    if (entry := request[CONTEXT].entry) is not None:
        entry.note_prompt(body)
    return body


async def _read_plain(request: web.Request) -> bytes:
    encoding = request.headers.get("Content-Encoding")
    if encoding is None or encoding == "identity":
        return await _read(request, counts_values=True)
    window = _WINDOWS.get(encoding.strip().lower())
    if window is None:
        raise InvalidRequest(
            "send the body as it is, or with Content-Encoding gzip or deflate", code="bad_encoding"
        )
    packed = await _read(request, counts_values=False)
    body = await _inflate(request, packed, window)
    request.app[BODIES].release(request[CONTEXT], len(packed))
    return body


def _check_type(given: str) -> None:
    """A web page may send forms and text to any server without asking it first, but no JSON."""
    if given and given != "application/json" and not _JSON.fullmatch(given.partition(";")[0]):
        raise UnsupportedMediaType(
            f"the body is {given[:100]!r}; send JSON, with `Content-Type: application/json`"
        )


async def _read(request: web.Request, *, counts_values: bool) -> bytes:
    settings, bodies, context = request.app[SETTINGS], request.app[BODIES], request[CONTEXT]
    content = request.content
    try:
        if content.is_eof():  # all here already, as small bodies are
            # `request.read` would keep it until the request has ended.
            whole = content.read_nowait()
            if len(whole) > settings.max_body_bytes:
                raise _too_large(settings.max_body_bytes)
            bodies.hold(context, len(whole))
            if counts_values and len(whole) > _SMALL_BYTES:
                _ValueCount(settings.max_body_values).add(whole)
            return whole
        await bodies.wait_for_room(context, request.content_length or 0)
        values = _ValueCount(settings.max_body_values)
        pieces, size = _Pieces(), 0
        async with asyncio.timeout(settings.body_timeout_s):
            while piece := await content.readany():
                size += len(piece)
                if size > settings.max_body_bytes:
                    raise _too_large(settings.max_body_bytes)
                bodies.hold(context, len(piece))
                pieces.add(piece)
                if counts_values:
                    values.add(piece)
    except TimeoutError:
        raise BodyTimeout(f"the body did not arrive within {settings.body_timeout_s:g} s") from None
    except (HttpProcessingError, PayloadEncodingError, web.RequestPayloadError) as error:
        reason = str(error).splitlines()[-1].strip()  # aiohttp's has a status and a line break too
        raise _not_decoded(reason) from None
    return pieces.join()


class _Pieces:
    """A body as it comes. One `bytearray` would be copied again and again as it grows, and a
    list of what comes may be one of single bytes: small pieces are put together.
    """

    __slots__ = ("_large", "_small")

    def __init__(self) -> None:
        self._large: list[bytes | bytearray] = []
        self._small = bytearray()

    def add(self, piece: bytes) -> None:
        if len(piece) >= _SMALL_BYTES:
            self._large += (self._small, piece)
            self._small = bytearray()
            return
        self._small += piece
        if len(self._small) >= _SMALL_BYTES:
            self._large.append(self._small)
            self._small = bytearray()

    def join(self) -> bytes:
        return b"".join((*self._large, self._small))


async def _inflate(request: web.Request, packed: bytes, window: int) -> bytes:
    """Slice by slice: a few kilobytes unfold to gigabytes, or to millions of values."""
    settings, bodies, context = request.app[SETTINGS], request.app[BODIES], request[CONTEXT]
    values = _ValueCount(settings.max_body_values)
    inflater = zlib.decompressobj(window)
    pieces: list[bytes] = []
    size = taken = 0
    rest = b""
    while not inflater.eof and (rest or taken < len(packed) or _is_full(pieces)):
        if not rest:
            rest = packed[taken : taken + _SLICE_BYTES]
            taken += len(rest)
        try:
            piece = inflater.decompress(rest, _SLICE_BYTES)
        except zlib.error as error:
            raise _not_decoded(str(error)) from None
        rest = inflater.unconsumed_tail
        size += len(piece)
        if size > settings.max_body_bytes:
            raise _too_large(settings.max_body_bytes)
        bodies.hold(context, len(piece))
        pieces.append(piece)
        values.add(piece)
        if len(pieces) % _SLICES_AT_ONCE == 0:
            await asyncio.sleep(0)
    if not inflater.eof or inflater.unused_data or taken < len(packed):
        raise _not_decoded("it is cut off or has a tail")
    return b"".join(pieces)


def _is_full(pieces: list[bytes]) -> bool:
    """Whether the last one may have left something back."""
    return bool(pieces) and len(pieces[-1]) == _SLICE_BYTES


def _too_large(most: int) -> PayloadTooLarge:
    return PayloadTooLarge(f"the body is larger than {most} bytes; send it in parts")


def _not_decoded(reason: str) -> InvalidRequest:
    return InvalidRequest(f"the body cannot be decoded: {reason}", code="bad_encoding")


class _ValueCount:
    """Counts the values of a body as it comes, and refuses what has too many.

    Commas and brackets outside of texts tell how many there are: a tenth of what parsing costs.
    """

    __slots__ = ("_before", "_is_in_text", "_most", "_number")

    def __init__(self, most: int) -> None:
        self._most, self._number = most, 0
        self._is_in_text = False
        self._before = b""  # half an escape

    def add(self, data: bytes) -> None:
        if self._before or b'"' in data or self._is_in_text:
            data = self._leave_texts_out(data)
        containers = data.count(b"{") + data.count(b"[")
        self._number += data.count(b",") + containers * _VALUES_A_CONTAINER
        if self._number > self._most:
            raise InvalidRequest(
                f"the body has more than {self._most} values (an object or a list counts for "
                f"{_VALUES_A_CONTAINER}); send it in parts",
                code="too_many_values",
            )

    def _leave_texts_out(self, data: bytes) -> bytes:
        if self._before or b"\\" in data:
            data = (self._before + data).replace(rb"\\", b"").replace(rb"\"", b"")
            self._before = b"\\" if data.endswith(b"\\") else b""
        if b'"' not in data:
            return b"" if self._is_in_text else data
        pieces = data.split(b'"')
        outside = b"".join(pieces[self._is_in_text :: 2])
        self._is_in_text ^= len(pieces) % 2 == 0
        return outside
