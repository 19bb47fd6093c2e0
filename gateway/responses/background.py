"""Responses that nobody waits for on a connection: each is a task, which enters the queue on its
key's account as any other call does, and stores what becomes of it.

Who runs one shows that it lives by a number that rises in its row. One whose gateway is gone is not
run again, for half of it may have been charged already: it has failed, and says why.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

import structlog

from gateway.admission.keys import Keyring
from gateway.admission.unattended import Answer, UnattendedCall, UnattendedCaller
from gateway.config import Settings
from gateway.errors import (
    GatewayError,
    Overloaded,
    StorageFull,
    StorageUnavailable,
    Unavailable,
)
from gateway.observability.metrics import Metrics
from gateway.records.ledger import Ledger
from gateway.request_context import RequestContext
from gateway.responses.engine_stream import LoggedStream
from gateway.responses.event_log import EventLog, Piece
from gateway.responses.events import CREATED, QUEUED
from gateway.responses.shapes import (
    Told,
    build_failed,
    build_queued,
    dump_members,
    read_response,
    split_output,
)
from gateway.responses.store import Store
from gateway.responses.turns import Turn
from gateway.schemas.vllm import parse_engine_error
from gateway.storage.leases import LeaseWatch

log = structlog.get_logger("gateway")

# Does a piece of work; whether it went well.
Watch = Callable[[Callable[[], Awaitable[None]]], Awaitable[bool]]

_LONGEST_POLL_S = 1.0
_BEATS_A_LEASE = 5
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.1, 5.0
_LAST_WRITES_S = 5.0
_FULL_RETRY_AFTER_S = 5.0
_LOST = "the gateway that ran this response is gone; ask again"
_STOPPED = "the gateway was stopped before this response was there; ask again"
_CRASHED = "the gateway failed; see its log"
_SHARE_OF_BODIES = 0.5  # of the bytes in memory: what waits here, however long
_GONE = 499  # what log and counters say of one that was cancelled


class OpenCount(Protocol):
    """What a drain waits for."""

    count: int


class BodyCount(Protocol):
    """The bytes of all bodies in memory."""

    def hold(self, context: RequestContext, size: int) -> None: ...

    def release(self, context: RequestContext) -> None: ...


@dataclass(slots=True)
class Parts:
    """What it needs of the gateway."""

    keyring: Keyring
    caller: UnattendedCaller
    bodies: BodyCount
    open_requests: OpenCount
    ledger: Ledger | None


@dataclass(slots=True, eq=False)
class _Run:
    """One that is queued or runs here."""

    turn: Turn
    call: UnattendedCall
    asking: RequestContext  # of the request that began it
    shown: dict[str, Any]  # as it is stored
    own: dict[str, Any]  # what the engine does not know of it
    log: EventLog | None = None  # of a stream
    stream: LoggedStream | None = None
    accepted: asyncio.Future[None] = field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    task: asyncio.Task[None] | None = None
    has_begun: bool = False
    is_ending: bool = False
    status: int = _GONE

    def take_entry(self) -> None:
        """From the request that began it: both would count it."""
        if self.asking.entry is not None:
            self.call.context.entry, self.asking.entry = self.asking.entry, None


class BackgroundRuns:
    """All that this gateway runs."""

    def __init__(self, *, store: Store, parts: Parts, metrics: Metrics, settings: Settings) -> None:
        self._store, self._parts, self._metrics = store, parts, metrics
        self._settings = settings
        self._most_bytes = int(settings.max_held_bytes * _SHARE_OF_BODIES)
        lease_s = settings.responses_lease_s
        self._leases = LeaseWatch(lease_s)
        self._poll_s = min(_LONGEST_POLL_S, lease_s / _BEATS_A_LEASE)
        self._runs: dict[str, _Run] = {}
        self._storing_events = asyncio.Lock()
        self._wake = asyncio.Event()
        metrics.background_responses.read = lambda: [((), len(self._runs))]

    async def start(
        self, turn: Turn, call: UnattendedCall, asking: RequestContext
    ) -> dict[str, Any]:
        """The response as it is queued; a refusal is one of the request that asks for it."""
        self._check_room(call.call.size)
        shown = build_queued(turn, call.call.model or call.served.name)
        own = {**turn.list_own(), "created_at": shown["created_at"]}
        run = _Run(turn, call, asking, shown, own)
        if turn.is_stream:
            log = run.log = EventLog(self._wake.set)
            call.stream = run.stream = LoggedStream(log, own, call.context, self._settings)
        run.accepted.add_done_callback(lambda told: told.cancelled() or told.exception())
        self._runs[turn.id] = run  # first, for whoever looks fails rows that nobody runs
        try:
            self._parts.bodies.hold(call.context, call.call.size)
            await self._add(run)
            call.on_waiting = lambda: self._accept(run)
            call.on_entered = lambda: self._begin(run)
            run.task = asyncio.create_task(self._run(run))
            await asyncio.shield(run.accepted)
        except GatewayError:
            self._forget(run)
            with contextlib.suppress(GatewayError):  # else it is found, and has failed
                await self._store.delete(turn.owner, turn.id)
            raise
        except BaseException:
            if run.task is None:
                self._forget(run)
            else:  # its caller hung up
                run.take_entry()
            raise
        return run.shown

    def _check_room(self, size: int) -> None:
        """They wait longer than others may: what they hold is bounded, so that others get in."""
        most = self._settings.responses_max_background
        if len(self._runs) >= most:
            raise Overloaded(
                f"{len(self._runs)} background responses are waiting or running here already, of "
                f"at most {most}; try again when some have ended, or without `background`",
                code="too_many_background",
                retry_after_s=_FULL_RETRY_AFTER_S,
            )
        held = sum(run.call.context.held_bytes for run in self._runs.values())
        if held and held + size > self._most_bytes:
            raise Overloaded(
                f"what waits in the background takes {held} bytes already, of at most "
                f"{self._most_bytes}; try again when some of it has run, or with a smaller one",
                code="too_many_bodies",
                retry_after_s=_FULL_RETRY_AFTER_S,
            )

    async def _add(self, run: _Run) -> None:
        """Its items are in the database then, and no longer here."""
        adding = RequestContext(run.asking.request_id, run.call.context.record)
        events: Piece | None = None
        try:
            self._parts.bodies.hold(adding, run.turn.input_bytes)
            if run.log is not None:
                for kind in (CREATED, QUEUED):
                    run.log.append(kind, dump_members({"type": kind, "response": run.shown}))
                events = await run.log.take()
            await self._store.add(run.turn, split_output(run.shown), events)
            if run.log is not None and events is not None:
                run.log.let_go(events)
        finally:
            self._parts.bodies.release(adding)
        run.turn.input = b""

    def cancel(self, response_id: str) -> None:
        """It is stored as cancelled or deleted already."""
        run = self._runs.get(response_id)
        if run is not None and run.task is not None and not run.is_ending:
            run.task.cancel()

    def find_log(self, response_id: str) -> EventLog | None:
        """Of a stream that runs here."""
        run = self._runs.get(response_id)
        return None if run is None else run.log

    async def keep_looking(self, watch: Watch) -> None:
        while True:
            if not await watch(self._look):
                self._leases.keep_only(())  # who is silent may only not have got through
            self._wake.clear()
            try:
                async with asyncio.timeout(self._poll_s):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def stop(self) -> None:
        """What has not ended by now has failed."""
        runs = list(self._runs.values())
        tasks = [run.task for run in runs if run.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        try:
            async with asyncio.timeout(_LAST_WRITES_S):
                for run in runs:
                    failed = build_failed(run.shown, 503, _STOPPED)
                    await self._store.end(run.turn, split_output(failed))
        except (GatewayError, TimeoutError) as error:
            log.warning("responses_not_ended", reason=str(error) or type(error).__name__)

    async def _look(self) -> None:
        running = {name: run for name, run in self._runs.items() if run.task is not None}
        entered = [name for name, run in running.items() if run.has_begun]
        async with self._storing_events:
            logs = {name: run.log for name, run in running.items() if run.log is not None}
            pieces = {name: await log.take() for name, log in logs.items()}
            told = {name: piece for name, piece in pieces.items() if piece is not None}
            rows = await self._store.look(running, entered, told)
            for name, piece in told.items():
                logs[name].let_go(piece)
        self._leases.keep_only({row.id for row in rows})
        open_ids = {row.id for row in rows}
        for name in running.keys() - open_ids:  # through another gateway
            self.cancel(name)
        for row in rows:
            is_lost = row.worker == self._store.worker or self._leases.has_ended(row.id, row.beat)
            if row.id not in self._runs and is_lost and await self._store.give_up(row, _LOST):
                log.warning("response_given_up", response=row.id, worker=row.worker)

    def _accept(self, run: _Run) -> None:
        """From here on it is a request of its own, and what is kept of requests is kept of it."""
        if not run.accepted.done():
            run.accepted.set_result(None)
            run.take_entry()

    def _begin(self, run: _Run) -> None:
        self._accept(run)
        run.has_begun = True
        self._wake.set()

    async def _run(self, run: _Run) -> None:
        parts, context = self._parts, run.call.context
        parts.open_requests.count += 1
        parts.keyring.open_call(run.call.caller, context)
        try:
            told = await self._answer(run)
            if told is not None:
                run.is_ending = True
                await self._end(run, told)
        finally:
            if not run.accepted.done():
                run.accepted.set_exception(Unavailable(_STOPPED, retry_after_s=1))
            parts.open_requests.count -= 1
            parts.keyring.close_call()
            self._forget(run)
            self._close(run)

    async def _answer(self, run: _Run) -> Told | None:
        """What becomes of it; nothing of one that was refused before it was accepted."""
        try:
            answer = await self._parts.caller.run(run.call)
            return await self._read(run, answer)
        except GatewayError as error:
            return self._fail(run, error)
        except asyncio.CancelledError:
            end = run.call.context.take_end()  # of its key
            if end is None:
                raise
            return self._fail(run, end)
        except Exception:
            log.exception("response_crashed", response=run.turn.id)
            return self._fail(run, GatewayError(_CRASHED))

    def _fail(self, run: _Run, error: GatewayError) -> Told | None:
        run.call.context.record.note_error(error.error_code, error.source)
        run.status = error.status
        if not run.accepted.done():
            run.accepted.set_exception(error)  # for who asks for it
        if run.accepted.exception() is not None:
            return None
        return split_output(build_failed(run.shown, error.status, error.message))

    async def _read(self, run: _Run, answer: Answer) -> Told:
        entry = run.call.context.entry
        if entry is not None and answer.body:
            entry.note_answer(answer.body)
        run.status = answer.status
        if answer.status != 200:
            message, _ = parse_engine_error(answer.body)
            return split_output(build_failed(run.shown, answer.status, message))
        if run.stream is not None and run.stream.told is not None:
            return run.stream.told
        return await read_response(answer.body, run.own)

    async def _end(self, run: _Run, told: Told) -> None:
        """However long it takes: a drain waits for it."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                is_stored = await self._store_end(run, told)
            except (StorageUnavailable, StorageFull) as error:
                self._metrics.response_storage_failures.inc()
                log.warning("response_waits", response=run.turn.id, reason=error.message)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
            else:
                self._metrics.responses_stored.inc(is_stored)
                return

    async def _store_end(self, run: _Run, told: Told) -> bool:
        if run.log is None:
            return await self._store.end(run.turn, told)
        async with self._storing_events:
            return await self._store.end(run.turn, told, await run.log.take())

    def _forget(self, run: _Run) -> None:
        self._runs.pop(run.turn.id, None)
        if run.log is not None:
            run.log.tell()  # what is left of it to read is in the database
        self._parts.bodies.release(run.call.context)

    def _close(self, run: _Run) -> None:
        """It is counted as one request, when it has ended."""
        context, ledger = run.call.context, self._parts.ledger
        if context.entry is not None and ledger is not None:
            context.entry.model = run.call.served.name
            ledger.close(context.entry, context.request_id, context.record, run.status)
        log.info(
            "response_ended",
            response=run.turn.id,
            request_id=context.request_id,
            status=run.status,
            duration_s=round(context.record.elapsed_s(), 4),
            **context.log_fields(),
        )
