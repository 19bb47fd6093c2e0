"""All of it put together: what the routes ask for, and what lives as long as the gateway."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

import orjson
import structlog

from gateway.admission.keys import Caller
from gateway.admission.unattended import UnattendedCall
from gateway.config import Settings
from gateway.errors import (
    GatewayError,
    InvalidRequest,
    PayloadTooLarge,
    StorageFull,
    StorageUnavailable,
)
from gateway.observability.metrics import Metrics
from gateway.request_context import RequestContext
from gateway.responses.background import BackgroundRuns, Parts
from gateway.responses.follower import Follower, StoredEvents
from gateway.responses.items import list_page
from gateway.responses.shapes import Told, read_response
from gateway.responses.store import Store
from gateway.responses.turns import CallBody, Turn, scan_call
from gateway.schemas.pages import Page
from gateway.storage.database import open_database
from gateway.storage.rows import make_id

log = structlog.get_logger("gateway")

_BUSY_TIMEOUT_S = 2.0  # whatever holds a SQLite file for longer counts as away
_ANSWER_S = 10.0  # and a database that says nothing for that long
_SWEEP_S = 600.0
_Found = TypeVar("_Found")


class Responses:
    """The stored responses of this gateway's callers."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._settings, self._metrics = settings, metrics
        self.database = open_database(
            settings.responses_database,
            setting="RESPONSES_DATABASE",
            keeps="stored responses",
            busy_timeout_s=_BUSY_TIMEOUT_S,
            answer_timeout_s=_ANSWER_S,
        )
        self._store = Store(self.database, settings, secrets.token_hex(8))
        self._runs: BackgroundRuns | None = None
        self._bodies: Any = None

    @asynccontextmanager
    async def run(self, parts: Parts) -> AsyncIterator[None]:
        """Background responses are run inside of this; the database is opened when it is needed."""
        self._bodies = parts.bodies
        runs = self._runs = BackgroundRuns(
            store=self._store,
            parts=parts,
            metrics=self._metrics,
            settings=self._settings,
        )
        tasks = [
            asyncio.create_task(runs.keep_looking(self._watch)),
            asyncio.create_task(self._keep_sweeping()),
        ]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await runs.stop()
            await self._store.close()

    async def begin(self, caller: Caller, context: RequestContext, body: bytes) -> Turn | None:
        """A call's place in its conversation; none of one that has none and is not stored."""
        settings = self._settings
        call = await scan_call(body, settings.max_prompts)
        stores = call.load_flag("store", usual=True)
        is_background = call.load_flag("background", usual=False)
        previous_id = call.load_previous_id()
        _refuse_what_is_not_served(call, stores=stores, is_background=is_background)
        goes_on = previous_id is not None
        if not goes_on and not (stores and (is_background or call.has_items)):
            return None  # what is no input the engine refuses in its own words
        items = call.list_items(settings.responses_max_input_bytes)
        name = make_id("resp_")
        turn = Turn(name, caller.name, stores, is_background, previous_id, body, input=items)
        before: list[bytes] = []
        if goes_on:
            before = await self._read_before(turn, context, len(body))
        else:  # told before an engine works for nothing
            await self._wait(self._store.ensure_there())
        turn.body = call.build(before, turn.input)
        if is_background:
            turn.repeated = call.load_repeated()
            turn.is_stream = call.load_flag("stream", usual=False)
        return turn

    async def _read_before(self, turn: Turn, context: RequestContext, size: int) -> list[bytes]:
        settings, previous_id = self._settings, turn.previous_id or ""
        parent = await self._wait(self._store.find_parent(turn.owner, previous_id))
        turn.depth, turn.context_bytes = parent.depth + 1, parent.context_bytes
        if turn.depth > settings.responses_max_turns:
            raise InvalidRequest(
                f"this conversation has {parent.depth} responses already, which is the most; begin "
                "another one",
                param="previous_response_id",
                code="conversation_too_long",
            )
        if parent.context_bytes + size > settings.max_body_bytes:
            raise PayloadTooLarge(
                f"this conversation takes {parent.context_bytes} bytes, and with this call it "
                f"would be more than {settings.max_body_bytes}; begin another one",
                param="previous_response_id",
            )
        self._bodies.hold(context, parent.context_bytes)
        return await self._wait(self._store.read_conversation(turn.owner, parent))

    async def keep(self, turn: Turn, body: bytes) -> bytes:
        """An engine's answer as the caller gets it, once it is stored."""
        told = await read_response(body, turn.list_own())
        if turn.stores:
            await self.add(turn, told)
        return told.build()

    async def add(self, turn: Turn, told: Told) -> None:
        await self._wait(self._store.add(turn, told))
        self._metrics.responses_stored.inc()

    async def start(self, turn: Turn, call: UnattendedCall, asking: RequestContext) -> bytes:
        """In the background."""
        assert self._runs is not None  # noqa: S101 — calls come in only while it runs
        return orjson.dumps(await self._wait(self._runs.start(turn, call, asking)))

    def follow(self, owner: str, response_id: str, after: int = -1) -> Follower:
        """The events of one that runs or has run in the background, after one of them."""
        assert self._runs is not None  # noqa: S101 — calls come in only while it runs
        return Follower(self, self._runs.find_log, owner, response_id, after)

    async def ensure_is_stream(self, owner: str, response_id: str) -> None:
        stored = await self.read_events(owner, response_id, -1)
        if not stored.pieces:
            raise InvalidRequest(
                "only a response that was asked for with `background` and `stream` can be read as "
                "a stream; ask for this one without `stream`",
                param="stream",
                code="response_not_streamed",
            )

    async def read_events(self, owner: str, response_id: str, after: int) -> StoredEvents:
        return await self._wait(self._store.read_events(owner, response_id, after))

    async def count_events(self, response_id: str) -> int:
        return await self._wait(self._store.count_events(response_id))

    async def find(self, owner: str, response_id: str) -> bytes:
        return await self._wait(self._store.find(owner, response_id))

    async def list_items(
        self, owner: str, response_id: str, page: Page, context: RequestContext
    ) -> bytes:
        """A page of what its engine was given, earlier turns too."""

        def hold(size: int) -> None:
            self._bodies.hold(context, size)

        return await list_page(
            await self._wait(self._store.list_inputs(owner, response_id, hold)), page
        )

    async def delete(self, owner: str, response_id: str) -> None:
        await self._wait(self._store.delete(owner, response_id))
        if self._runs is not None:
            self._runs.cancel(response_id)

    async def cancel(self, owner: str, response_id: str) -> bytes:
        response = await self._wait(self._store.cancel(owner, response_id))
        if self._runs is not None:
            self._runs.cancel(response_id)
        return response

    async def _wait(self, work: Awaitable[_Found]) -> _Found:
        """For the database; it is counted where it fails."""
        try:
            return await work
        except (StorageUnavailable, StorageFull):
            self._metrics.response_storage_failures.inc()
            raise

    async def _keep_sweeping(self) -> None:
        while True:
            await self._watch(self._store.sweep)
            await asyncio.sleep(_SWEEP_S)

    async def _watch(self, work: Callable[[], Awaitable[None]]) -> bool:
        """Whether it went well; what goes wrong is told, and tried again at its next time."""
        try:
            await self._wait(work())
        except GatewayError as error:
            log.warning("responses_not_looked_at", reason=error.message)
        except Exception:
            log.exception("responses_not_looked_at")
        else:
            return True
        return False


def _refuse_what_is_not_served(call: CallBody, *, stores: bool, is_background: bool) -> None:
    if call.raw("conversation") not in {b"", b"null"}:
        raise InvalidRequest(
            "conversations are not kept here; go on with `previous_response_id`",
            param="conversation",
            code="conversation_not_served",
        )
    if is_background and not stores:
        raise InvalidRequest(
            "a background response is stored: leave `store` out, or say true", param="background"
        )
