"""GET /usage and /audit: what each key has used, and who asked what.

An admin key sees all of it, any other its own use. Without a range usage is what this gateway has
counted since it started, as it is where nothing is kept.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from typing import Any

import orjson
from aiohttp import web

from gateway.admission.accounts import ACCOUNTS
from gateway.admission.keys import CALLER, KEYRING
from gateway.config import SETTINGS
from gateway.errors import Forbidden, InvalidRequest, NotFound
from gateway.records.access import RECORDS, find_records
from gateway.records.ranges import parse_audit_query, parse_usage_query

_MOST_ROWS = 10_000
_WRITTEN_AT_ONCE = 20  # of rows with texts, between two looks at the event loop


async def handle_usage(request: web.Request) -> web.Response:
    caller = request[CALLER]
    is_admin = caller.admin or request.app[KEYRING].is_open
    is_kept = RECORDS in request.app
    if not is_admin and not is_kept:
        raise Forbidden("this needs an admin key", code="not_admin")
    if is_admin and not request.query:
        return _answer({"keys": request.app[ACCOUNTS].read_usage()})
    store = find_records(request.app).store
    asked = parse_usage_query(request.query, None if is_admin else caller.name)
    rows = await store.list_usage(asked, _MOST_ROWS)
    if len(rows) > _MOST_ROWS:
        raise InvalidRequest(
            f"there are more than {_MOST_ROWS} rows: ask for fewer days, for one key, or by month",
            param="from",
        )
    return _answer({"from": asked.first, "to": asked.last, "group": asked.group, "data": rows})


async def handle_audit(request: web.Request) -> web.Response:
    """A page of rows, the newest first; `after` its last id comes the next page. Where there are no
    keys, nobody has that of an admin.
    """
    if not request[CALLER].admin:
        raise Forbidden("this needs an admin key", code="not_admin")
    if not request.app[SETTINGS].audit:
        raise NotFound(
            "this gateway keeps no audit: its operator can turn it on with GATEWAY_AUDIT",
            code="audit_off",
        )
    asked = parse_audit_query(request.query)
    rows = await find_records(request.app).store.list_audit(asked)
    page, has_more = rows[: asked.limit], len(rows) > asked.limit
    last_id = page[-1]["id"] if page else None
    rest = orjson.dumps({"has_more": has_more, "last_id": last_id})
    body = b'{"data":[%b],%b' % (await write_rows(page), rest[1:])
    return web.Response(body=body, content_type="application/json")


async def write_rows(rows: Sequence[Mapping[str, Any]]) -> bytes:
    """As JSON, without the brackets; a page of long texts has more than 100 MB."""
    pieces = []
    for first in range(0, len(rows), _WRITTEN_AT_ONCE):
        pieces.append(orjson.dumps(rows[first : first + _WRITTEN_AT_ONCE])[1:-1])
        await asyncio.sleep(0)
    return b",".join(pieces)


def _answer(data: object) -> web.Response:
    return web.Response(body=orjson.dumps(data), content_type="application/json")
