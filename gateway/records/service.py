"""Usage and audit put together: one task writes what the ledger has gathered, looks what other
gateways have used, and deletes what is too old.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import structlog

from gateway.config import Settings
from gateway.errors import GatewayError
from gateway.observability.metrics import Metrics
from gateway.records.ledger import AuditRow, Batch, Entry, Ledger
from gateway.records.redaction import Redactor
from gateway.records.store import RecordStore, make_storable
from gateway.records.texts import read_stream, read_texts
from gateway.storage.database import open_database

log = structlog.get_logger("gateway")

_BUSY_TIMEOUT_S = 2.0  # whatever holds a SQLite file for longer counts as away
_START_S = 5.0
_LAST_WRITES_S = 5.0
_SWEEP_S = 600.0


class Records:
    """What is kept of requests, for as long as the gateway lives."""

    def __init__(self, settings: Settings, ledger: Ledger, metrics: Metrics) -> None:
        self._ledger, self._metrics = ledger, metrics
        self._interval_s = settings.usage_interval_s
        self._ttl_days = settings.audit_ttl_days
        self._redactor = Redactor(settings.audit_redact, settings.audit_text_characters)
        self.database = open_database(
            settings.usage_database,
            setting="USAGE_DATABASE",
            keeps="usage and audit",
            busy_timeout_s=_BUSY_TIMEOUT_S,
        )
        self.store = RecordStore(self.database, secrets.token_hex(8))
        self._batch: Batch | None = None  # not known to be written
        self._rows: list[dict[str, Any]] | None = None  # of that, made ready
        self.is_away = False
        metrics.records_away.read = lambda: [((), self.is_away)]

    @asynccontextmanager
    async def run(self) -> AsyncIterator[None]:
        """Begins with what has been used so far, and ends with what nobody has written yet."""
        try:
            async with asyncio.timeout(_START_S):
                await self._sync()
        except TimeoutError:
            self._note_away("no answer")
        tasks = [asyncio.create_task(one) for one in (self._keep_writing(), self._keep_sweeping())]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self._write_last()
            await self.store.close()

    async def _keep_writing(self) -> None:
        while True:
            await asyncio.sleep(self._interval_s)
            while await self._sync() and self._ledger.has_much:
                pass

    async def _write_last(self) -> None:
        try:
            async with asyncio.timeout(_LAST_WRITES_S):
                while await self._sync() and self._ledger.count_waiting():
                    pass
        except TimeoutError:
            pass
        lost = self._ledger.count_waiting()
        if self._batch is not None:
            lost += len(self._batch.sums) + len(self._batch.rows)
        if lost:
            log.error("records_lost", rows=lost)

    async def _sync(self) -> bool:
        """Whether the database has all that was there when this began."""
        try:
            if self._batch is None:
                self._batch, self._rows = self._ledger.take(), None
            batch = self._batch
            if self._rows is None:
                self._rows = await asyncio.to_thread(self._prepare, batch.rows)
            spent = await self.store.write(batch, self._rows)
        except GatewayError as error:
            self._note_away(error.message)
            return False
        except Exception:
            log.exception("records_not_written")
            self._note_away("a fault of the gateway's own")
            return False
        self._ledger.note_written(batch, spent)
        self._batch = self._rows = None
        if self.is_away:
            self.is_away = False
            log.info("records_back")
        return True

    def _note_away(self, reason: str) -> None:
        self.store.forget_seen()
        if not self.is_away:
            self.is_away = True
            log.error("records_away", reason=reason)

    def _prepare(self, rows: list[AuditRow]) -> list[dict[str, Any]]:
        """In a thread: texts are read out of their JSON, and patterns go over them."""
        return [build_row(one, self._redactor) for one in rows]

    async def _keep_sweeping(self) -> None:
        while True:
            try:
                await self.store.sweep(self._ttl_days)
            except GatewayError as error:
                log.warning("records_not_swept", reason=error.message)
            except Exception:
                log.exception("records_not_swept")
            await asyncio.sleep(_SWEEP_S)


def build_row(row: AuditRow, redactor: Redactor) -> dict[str, Any]:
    entry = row.entry
    prompt, answer = _read_texts(entry, redactor) if entry.wants_text else (None, None)
    return {
        "id": row.id,
        "time_ms": row.time_ms,
        "key": entry.key,
        "route": row.route,
        "model": make_storable(entry.model),
        "request_id": row.request_id,
        "status": row.status,
        "verdict": row.verdict,
        "prompt_bytes": entry.prompt_bytes,
        "answer_bytes": entry.answer_bytes,
        "prompt_tokens": row.prompt_tokens,
        "completion_tokens": row.completion_tokens,
        "duration_ms": row.duration_ms,
        "prompt": prompt,
        "answer": answer,
    }


def _read_texts(entry: Entry, redactor: Redactor) -> tuple[str | None, str | None]:
    """None for one that cannot be read: a row must not keep all others from being written."""
    prompt = answer = None
    try:
        if entry.prompt is not None:
            prompt = redactor.clean(make_storable(read_texts(entry.prompt)))
        whole = b"".join(entry.answer)
        read = read_stream if whole.startswith((b"data:", b"event:")) else read_texts
        answer = redactor.clean(make_storable(read(whole)), is_cut=entry.is_cut)
    except Exception:
        log.exception("audit_text_not_read")
    return prompt, answer
