"""GET /usage: what each key has used since the gateway started, for an admin key."""

from __future__ import annotations

import orjson
from aiohttp import web

from gateway.admission.accounts import ACCOUNTS
from gateway.admission.keys import CALLER, KEYRING
from gateway.errors import Forbidden


async def handle_usage(request: web.Request) -> web.Response:
    if not (request[CALLER].admin or request.app[KEYRING].is_open):
        raise Forbidden("this needs an admin key", code="not_admin")
    body = orjson.dumps({"keys": request.app[ACCOUNTS].read_usage()})
    return web.Response(body=body, content_type="application/json")
