"""Whether this gateway keeps usage and audit at all. Loads no database."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from gateway.errors import NotFound

if TYPE_CHECKING:
    from gateway.records.service import Records

RECORDS: web.AppKey[Records] = web.AppKey("records")


def find_records(app: web.Application) -> Records:
    records = app.get(RECORDS)
    if records is None:
        raise NotFound(
            "this gateway keeps no usage: its operator can turn that on with "
            "GATEWAY_USAGE_DATABASE",
            code="usage_off",
        )
    return records
