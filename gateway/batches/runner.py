"""One batch from its first request to its files, for as long as this gateway owns it."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
from collections.abc import Callable, Iterator
from functools import partial
from typing import Protocol

import structlog

from gateway.admission.keys import Caller
from gateway.admission.unattended import Answer, ReadBody, UnattendedCaller
from gateway.batches.blobs import Blobs, BlobWriter
from gateway.batches.ownership import Ownership, Result
from gateway.batches.shapes import (
    FileRecord,
    JobRecord,
    build_refusal_line,
    build_response_line,
    build_unanswered_line,
)
from gateway.batches.store import StoredLine, find_kept_s
from gateway.batches.window import Slot, Window
from gateway.config import Settings
from gateway.errors import (
    EngineError,
    EngineTimeout,
    EngineUnreachable,
    GatewayError,
    NotFound,
    Overloaded,
    RateLimited,
    StorageFull,
    StorageUnavailable,
    Unavailable,
)
from gateway.observability.metrics import Metrics
from gateway.storage.clock import SteadyClock

log = structlog.get_logger("gateway")

_MOST_WEIGHT = 10.0  # of a batch near its end, beside one with all its time
_FIRST_PAUSE_S, _LONGEST_PAUSE_S = 0.5, 15.0
_LONGEST_REFUSAL_S = 300.0  # a budget that is used up until next month may be raised before
_RESULTS_AT_ONCE = 200
_LINES_AT_ONCE = 50  # answers may be long
_UNANSWERED = {
    "expired": "its completion window ended before this request could be run",
    "cancelled": "the batch was cancelled before this request was run",
    "failed": "the batch failed before this request was run",
    "completed": "this request was not run",
}


class OpenCount(Protocol):
    """What a drain waits for."""

    count: int


class JobRunner:
    """Runs in a task of its own; others tell it how to end."""

    def __init__(
        self,
        job: JobRecord,
        *,
        ownership: Ownership,
        blobs: Blobs,
        caller: UnattendedCaller,
        find_caller: Callable[[str], Caller | None],
        window: Window,
        open_requests: OpenCount,
        is_draining: Callable[[], bool],
        settings: Settings,
        metrics: Metrics,
        time: SteadyClock,
    ) -> None:
        self.job = job
        self._ownership, self._blobs, self._caller = ownership, blobs, caller
        self._find_caller, self._window = find_caller, window
        self._settings, self._metrics = settings, metrics
        self._open_requests, self._is_draining = open_requests, is_draining
        self._clock, self._time = window.clock, time
        self._ending: tuple[str, tuple[str, str] | None] | None = None
        self._is_ending = asyncio.Event()
        self._results: list[tuple[Result, asyncio.Future[None]]] = []
        self._has_results = asyncio.Event()
        self._goes_on_at = 0.0  # after what its key's own limits refused
        self._own_pause_s = 0.0
        self._written: list[str] = []  # names of bytes for files that may not have been made

    def end(self, ending: str, error: tuple[str, str] | None = None) -> None:
        """What runs is given up, what has been answered is kept."""
        if self._ending is None:
            self._ending = ending, error
            self._is_ending.set()

    async def run(self) -> None:
        """A disk or database that is away is waited for: the batch is where it was."""
        pause_s = _FIRST_PAUSE_S
        while True:
            try:
                if self.job.ending is None:
                    await self._answer_lines()
                ending, error = self._ending or (self.job.ending or "completed", None)
                # Each time: the commit of an end whose answer was lost has ended it already.
                self.job = await self._ownership.begin_end(self.job, ending, error)
                await self._write_files()
            except (StorageUnavailable, StorageFull) as error:
                self._metrics.batch_storage_failures.inc()
                log.warning("batch_waits", batch=self.job.id, reason=error.message)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
            else:
                log.info("batch_ended", batch=self.job.id, status=self.job.ending)
                return

    async def _answer_lines(self) -> None:
        await self._store([one for one, _ in self._results])  # of a time that ended badly
        self._results.clear()
        blob = await self._ownership.find_input(self.job)
        if await self._ownership.count_lines(self.job) < self.job.total:
            self.end("failed", ("input_file_lost", "the input's lines are not there any more"))
            return
        lines = await self._ownership.list_unanswered(self.job)
        recording = asyncio.create_task(self._record_results())
        working = asyncio.create_task(self._work(blob, lines))
        ending = asyncio.create_task(self._is_ending.wait())
        tasks = (working, recording, ending)
        try:
            await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            ended = await asyncio.gather(*tasks, return_exceptions=True)
        for error in ended:
            if isinstance(error, Exception):
                raise error
        await self._store([one for one, _ in self._results])  # answered in the last moment
        self._results.clear()

    async def _work(self, blob: str, lines: list[StoredLine]) -> None:
        """As many at once as the window says; the others are not even tasks."""
        running: set[asyncio.Task[None]] = set()
        try:
            for line in lines:
                while len(running) >= self._find_most():
                    await asyncio.wait(running, return_when=asyncio.FIRST_COMPLETED)
                    _take_done(running)
                slot = await self._enter()
                task = asyncio.create_task(self._answer(blob, line, slot))
                # One that is cancelled before it has begun never comes to leave it.
                task.add_done_callback(partial(_leave, slot))
                running.add(task)
                _take_done(running)
            await asyncio.gather(*running)
        finally:
            for task in running:
                task.cancel()
            await asyncio.gather(*running, return_exceptions=True)

    def _find_most(self) -> int:
        """More than its key may have at once would only be refused."""
        owner = self._find_caller(self.job.owner)
        most = self._settings.batch_max_running
        return min(most, (owner.max_concurrency if owner else 0) or most)

    def _pause(self, seconds: float) -> None:
        """Each request that a key's own limits refuse may use up more of them, so the whole batch
        waits, and longer each time until one is answered.
        """
        now = asyncio.get_running_loop().time()
        if now >= self._goes_on_at:
            self._own_pause_s = min(max(_FIRST_PAUSE_S, self._own_pause_s * 2), _LONGEST_PAUSE_S)
            self._goes_on_at = now + max(seconds, self._own_pause_s)

    async def _enter(self) -> Slot:
        """The nearer its end, the less a request moves the batch's clock."""
        await asyncio.sleep(max(0.0, self._goes_on_at - asyncio.get_running_loop().time()))
        if self._is_draining():
            await asyncio.Event().wait()  # until this is cancelled: another gateway goes on
        whole_s = max(1, self.job.expires_at - self.job.created_at)
        share_left = max(0.0, self.job.expires_at - self._time.now()) / whole_s
        step = min(1.0, max(1 / _MOST_WEIGHT, share_left))
        self._clock = max(self._clock, self._window.clock) + step
        return await self._window.enter(self._clock)

    async def _answer(self, blob: str, line: StoredLine, slot: Slot) -> None:
        """Until it is known what its line is answered, and that is stored."""
        lost = 0
        result, pause_s, is_lost = await self._try(blob, line, lost, slot)
        while result is None:
            lost += is_lost
            await asyncio.sleep(pause_s)
            # One that takes an engine down takes others with it. Its last try is beside nobody
            # else's last one, so that those are not given up with it.
            is_last = lost > 0 and lost + 1 >= self._settings.max_attempts
            async with self._window.last_tries if is_last else contextlib.nullcontext():
                slot = await self._enter()
                result, pause_s, is_lost = await self._try(blob, line, lost, slot)
        stored: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._results.append((result, stored))
        self._has_results.set()
        with self._keep_open():
            await stored

    @contextlib.contextmanager
    def _keep_open(self) -> Iterator[None]:
        """A drain waits for it."""
        self._open_requests.count += 1
        try:
            yield
        finally:
            self._open_requests.count -= 1

    async def _try(
        self, blob: str, line: StoredLine, lost: int, slot: Slot
    ) -> tuple[Result | None, float, bool]:
        """A result; or how long to wait until it is tried again, and whether it may have run."""
        number, custom_id, start, size, _ = line
        request_id = f"{self.job.id}-{number}"
        try:
            with self._keep_open():
                read = partial(self._read, blob, start, size)
                answer = await self._ask(size, read, request_id)
        except (StorageUnavailable, StorageFull, asyncio.CancelledError):
            slot.leave()
            raise
        except GatewayError as error:
            refusal = error
        except Exception as error:
            log.exception("batch_line_crashed", batch=self.job.id, line=number)
            refusal = GatewayError(f"the gateway failed ({type(error).__name__}); see its log")
        else:
            self._own_pause_s = 0.0
            slot.leave("answered", answer.queue_s)
            text = build_response_line(custom_id, request_id, answer.status, answer.body)
            return Result(number, answer.status < 400, text), 0.0, False
        return self._judge(refusal, lost, slot, Result(number, False, b""), custom_id)

    def _judge(
        self, refusal: GatewayError, lost: int, slot: Slot, result: Result, custom_id: str
    ) -> tuple[Result | None, float, bool]:
        pause_s = min(refusal.retry_after_s or _FIRST_PAUSE_S, _LONGEST_REFUSAL_S)
        is_lost = _is_lost(refusal)
        if _is_own(refusal):
            self._pause(pause_s)
            slot.leave()
        elif _is_away(refusal):
            slot.leave("away", pause_s=pause_s)
        elif _is_too_much(refusal):
            slot.leave("refused", pause_s=pause_s)
        else:
            slot.leave()
        if _has_not_run(refusal) or (is_lost and lost + 1 < self._settings.max_attempts):
            self._metrics.batch_retries.labels(refusal.error_code).inc()
            return None, pause_s, is_lost
        request_id = f"{self.job.id}-{result.number}"
        result.line = build_refusal_line(custom_id, request_id, refusal)
        return result, 0.0, is_lost

    async def _read(self, blob: str, start: int, size: int) -> bytes:
        try:
            return await self._blobs.read(blob, start, size)
        except NotFound as error:
            self.end("failed", ("input_file_lost", f"the input cannot be read: {error.message}"))
            await asyncio.Event().wait()  # until this is cancelled, as all others are
            raise

    async def _ask(self, size: int, read: ReadBody, request_id: str) -> Answer:
        caller = self._find_caller(self.job.owner)
        if caller is None:
            self.check_owner()
            await asyncio.Event().wait()
        assert caller is not None  # noqa: S101 — else nobody comes here
        return await self._caller.ask(caller, self.job.endpoint, size, read, request_id)

    def check_owner(self) -> None:
        """A batch ends with its key."""
        if self._find_caller(self.job.owner) is None:
            message = f"the API key {self.job.owner!r} has been withdrawn"
            self.end("failed", ("key_revoked", message))

    async def _record_results(self) -> None:
        """Those that have come while the last were stored, at once: a transaction for each would
        cost more than most answers.
        """
        while True:
            await self._has_results.wait()
            some = self._results[:_RESULTS_AT_ONCE]
            await self._store([one for one, _ in some])
            del self._results[: len(some)]
            if not self._results:
                self._has_results.clear()
            for _, stored in some:
                if not stored.done():
                    stored.set_result(None)

    async def _store(self, results: list[Result]) -> None:
        """However long it takes: meanwhile only so many lines more are begun as may run at once."""
        pause_s = _FIRST_PAUSE_S
        while results:
            try:
                await self._ownership.add_results(self.job, results)
            except (StorageUnavailable, StorageFull) as error:
                self._metrics.batch_storage_failures.inc()
                log.warning("batch_waits", batch=self.job.id, reason=error.message)
                await asyncio.sleep(pause_s)
                pause_s = min(pause_s * 2, _LONGEST_PAUSE_S)
            else:
                for one in results:
                    self._metrics.batch_lines.labels("good" if one.is_good else "error").inc()
                return

    async def _write_files(self) -> None:
        """Anew from what is stored, whoever has begun before: under names that are nobody else's,
        for what an earlier attempt wrote may be what the batch has ended with.
        """
        while self._written:  # by attempts that have not ended it, as is known by now
            await self._blobs.delete(self._written[-1])
            self._written.pop()
        attempt = secrets.token_hex(4)
        names = {good: self._name_blob(attempt, good) for good in (True, False)}
        sizes, counts = {True: 0, False: 0}, {True: 0, False: 0}
        async with contextlib.AsyncExitStack() as stack:
            writers: dict[bool, BlobWriter] = {}
            after = -1
            while rows := await self._ownership.read_lines(self.job, after, _LINES_AT_ONCE):
                for number, custom_id, is_good, line in rows:
                    good, text = bool(is_good), line or self._explain(number, custom_id)
                    if good not in writers:
                        self._written.append(names[good])
                        blob = self._blobs.write(names[good])
                        writers[good] = await stack.enter_async_context(blob)
                    await writers[good].write(text)
                    sizes[good] += len(text)
                    counts[good] += 1
                after = rows[-1][0]
        files = {
            good: self._build_file(good, names[good], sizes[good]) if counts[good] else None
            for good in (True, False)
        }
        await self._ownership.end(
            self.job, files[True], files[False], (counts[True], counts[False])
        )

    def _name_blob(self, attempt: str, good: bool) -> str:
        return f"{self.job.id}-{self.job.epoch}-{attempt}-{'output' if good else 'errors'}"

    def _explain(self, number: int, custom_id: str) -> bytes:
        ending = self.job.ending or "completed"
        request_id = f"{self.job.id}-{number}"
        return build_unanswered_line(custom_id, request_id, f"batch_{ending}", _UNANSWERED[ending])

    def _build_file(self, good: bool, blob: str, size: int) -> FileRecord:
        now = self._time.stamp()
        owner = self._find_caller(self.job.owner)
        kept_s = find_kept_s(self._settings, owner, self.job.output_expires_s)
        suffix = self.job.id.removeprefix("batch_")
        kind = "output" if good else "errors"
        return FileRecord(
            id=f"file-{suffix}-{kind}",
            owner=self.job.owner,
            filename=f"{self.job.id}_{kind}.jsonl",
            purpose="batch_output",
            bytes=size,
            created_at=now,
            expires_at=now + kept_s,
            blob=blob,
        )


def _take_done(running: set[asyncio.Task[None]]) -> None:
    for task in [one for one in running if one.done()]:
        running.remove(task)
        task.result()


def _leave(slot: Slot, _task: asyncio.Task[None]) -> None:
    slot.leave()


def _is_own(error: GatewayError) -> bool:
    """It is the key that has no more, which is no sign of what the engines bear."""
    return isinstance(error, RateLimited) or error.error_code == "key_concurrency"


def _is_away(error: GatewayError) -> bool:
    return isinstance(error, Unavailable) and error.error_code == "not_ready"


def _is_too_much(error: GatewayError) -> bool:
    """For the engines."""
    return isinstance(error, Overloaded | Unavailable | EngineUnreachable | EngineTimeout)


def _is_lost(error: GatewayError) -> bool:
    """It may have run, and nobody knows its answer."""
    is_other = isinstance(error, EngineTimeout | EngineUnreachable)
    return isinstance(error, EngineError) and not is_other


def _has_not_run(error: GatewayError) -> bool:
    """It may be asked again however often."""
    return isinstance(error, Overloaded | RateLimited | Unavailable | EngineUnreachable)
