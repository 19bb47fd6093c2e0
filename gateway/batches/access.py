"""Whether this gateway keeps files and batches at all. Loads no database."""

from __future__ import annotations

from typing import TYPE_CHECKING

from aiohttp import web

from gateway.errors import NotFound

if TYPE_CHECKING:
    from gateway.batches.service import BatchService

BATCHES: web.AppKey[BatchService] = web.AppKey("batches")


def find_batches(app: web.Application) -> BatchService:
    service = app.get(BATCHES)
    if service is None:
        raise NotFound(
            "this gateway keeps no files and batches: its operator can turn them on with "
            "GATEWAY_BATCH_FOLDER or GATEWAY_BATCH_BUCKET",
            code="batches_off",
        )
    return service
