"""The Gate: how many sequences may be inside the engines, whose turn it is, who waits how long.

Two lanes, `interactive` and `batch`, share the places by weight: each admission moves its lane's
clock forward by its size over the lane's weight, and the lane whose clock is furthest behind goes
next. A batch moves its clock far ahead, so it cannot starve chats; and no visit counts for more
than half of the places, so the largest neither waits for the last long stream nor takes them all.

The first in that lane is waited for even when it is large, so chats cannot starve a batch. But as
long as visits older than its turn alone keep it out, waiting helps nobody: whoever fits passes it.
Once only those who passed are in its way its places are kept free, in every worker, until it is in.
Otherwise: within a lane, first come, first served.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections import deque
from collections.abc import Awaitable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeVar, cast

from aiohttp import web

from gateway.admission.keys import Caller
from gateway.admission.ledger import Ledger
from gateway.config import Settings, Worker
from gateway.errors import DeadlinePassed, DeadlineUnreachable, InvalidRequest, Overloaded
from gateway.observability.metrics import Metrics

T = TypeVar("T")
LaneName = Literal["interactive", "batch"]
LANES: tuple[LaneName, ...] = ("interactive", "batch")
_POLL_S = 0.005
# Fields of a worker's row, after what runs and waits in each lane.
_KEPT = 5  # places kept free for the one who is next
_LIFE = 6  # which process in this place it is, counted
# Completions older than a few of these no longer say how fast the engines are.
_RATE_HALF_LIFE_S = 10.0
_LONGEST_RETRY_AFTER_S = 120.0


@dataclass(slots=True)
class Visit:
    """Who wants in: how many sequences, in which lane, on whose account, until when."""

    sequences: int
    lane: LaneName = "interactive"
    account: str = ""
    account_limit: int = 0
    deadline: float | None = None

    def loop_deadline(self) -> float | None:
        """The deadline on the event loop's clock."""
        if self.deadline is None:
            return None
        return asyncio.get_running_loop().time() + self.deadline - time.monotonic()


def build_visit(
    headers: Mapping[str, str], caller: Caller, sequences: int, lane: LaneName
) -> Visit:
    """The key's lane, else the one asked for, else the usual one; X-Deadline-Ms from now."""
    asked = headers.get("X-Priority")
    if asked is not None and asked not in {"interactive", "batch"}:
        raise InvalidRequest("X-Priority is interactive or batch", param="X-Priority")
    return Visit(
        sequences=sequences,
        lane=caller.lane or cast("LaneName | None", asked) or lane,
        account=caller.name,
        account_limit=caller.max_concurrency,
        deadline=_parse_deadline(headers.get("X-Deadline-Ms")),
    )


def _parse_deadline(text: str | None) -> float | None:
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > 9:
        raise InvalidRequest("X-Deadline-Ms is a number of milliseconds", param="X-Deadline-Ms")
    return time.monotonic() + int(text) / 1000


async def within(deadline: float | None, work: Awaitable[T]) -> T:
    """The work, if it ends before the deadline on the loop's clock."""
    if deadline is None:
        return await work
    try:
        async with asyncio.timeout_at(deadline):
            return await work
    except TimeoutError:
        raise DeadlinePassed("the request's deadline has passed") from None


@dataclass(slots=True, eq=False)
class _Waiter:
    turn: asyncio.Future[int]
    places: int


@dataclass(slots=True)
class _Lane:
    """One worker's queue of a lane; what runs and waits is in the ledger, for all to see."""

    name: LaneName
    weight: float
    running_field: int
    waiting_field: int
    clock: float = 0.0
    queue: deque[_Waiter] = field(default_factory=deque)


@dataclass(slots=True)
class _Delay:
    """Who is next and does not fit; and the places that visits older than its turn still hold."""

    lane: _Lane
    waiter: _Waiter
    older: int
    last_older: int
    since: float


def _clock(lane: _Lane) -> float:
    return lane.clock


class Gate:
    """Counts what is inside; the only limit between a caller and the engines.

    With several workers the places are common and each keeps its own queue: one that has waiters
    looks every few milliseconds whether another has given places back.
    """

    def __init__(
        self,
        settings: Settings,
        metrics: Metrics,
        ledger: Ledger | None = None,
        worker: Worker | None = None,
    ) -> None:
        worker = worker or Worker()
        self._ledger = ledger or Ledger()
        self._worker = worker
        self._capacity = settings.max_running
        self._max_waiting = settings.max_waiting
        self._queue_timeout_s = settings.queue_timeout_s
        self._interactive = _Lane("interactive", settings.interactive_weight, 1, 3)
        self._batch = _Lane("batch", settings.batch_weight, 2, 4)
        self._lanes = {"interactive": self._interactive, "batch": self._batch}
        self._rows = [self._ledger.row(f"gate:{index}") for index in range(worker.count)]
        self._own = self._rows[worker.index]
        for number in range(1, _KEPT + 1):
            self._own[number] = 0  # what an earlier process in this place left behind
        self._own[_LIFE] += 1  # and what it held of a key's limit
        self._clock = 0.0
        self._entries = 0
        self._delayed: _Delay | None = None
        self._rate = _Rate()
        self._is_polling = False
        metrics.running_sequences.read = lambda: [((name,), self.count(name)[0]) for name in LANES]
        metrics.waiting_sequences.read = lambda: [((name,), self.count(name)[1]) for name in LANES]

    def enter(self, visit: Visit) -> Stay:
        """Holds the visit's places for as long as the block of `async with` runs."""
        return Stay(self, visit, min(visit.sequences, max(1, self._capacity // 2)))

    async def take(self, visit: Visit, places: int) -> int:
        """The number of this entry; `give_back` wants it."""
        if visit.account_limit:
            self._open_account(visit, places)
        lane = self._lanes[visit.lane]
        if self._may_pass(lane) and self._try_enter(lane, places):
            return self._number_entry()
        try:
            return await self._wait(visit, lane, places)
        except BaseException:
            if visit.account_limit:
                self._close_account(visit, places)
            raise

    def give_back(self, visit: Visit, places: int, entry: int) -> None:
        self._give_back(self._lanes[visit.lane], places, entry)
        if visit.account_limit:
            self._close_account(visit, places)

    @contextlib.contextmanager
    def enter_beside(self, visit: Visit) -> Iterator[None]:
        """For what takes no place in an engine's batch: it counts against its key's limit alone."""
        if not visit.account_limit:
            yield
            return
        self._open_account(visit, visit.sequences)
        try:
            yield
        finally:
            self._close_account(visit, visit.sequences)

    def expected_wait_s(self, places: int) -> float:
        """How long until so many more places have become free, by what the engines did lately."""
        missing = self._running() + self._waiting() + places - self._capacity
        return self._rate.time_for(missing) if missing > 0 else 0.0

    def count(self, lane: LaneName) -> tuple[int, int]:
        """Sequences of a lane that run and that wait, over all workers."""
        one = self._lanes[lane]
        running = sum(row[one.running_field] for row in self._rows)
        return int(running), int(sum(row[one.waiting_field] for row in self._rows))

    def _running(self) -> int:
        if len(self._rows) == 1:
            return int(self._own[1] + self._own[2])
        return int(sum(row[1] + row[2] for row in self._rows))

    def _waiting(self) -> int:
        return int(sum(row[3] + row[4] for row in self._rows))

    async def _wait(self, visit: Visit, lane: _Lane, places: int) -> int:
        expected_s = self.expected_wait_s(places)
        retry_after_s = min(max(1.0, expected_s), _LONGEST_RETRY_AFTER_S)
        waiting = self._waiting()
        if waiting + places > self._max_waiting:
            raise Overloaded(
                f"{waiting} sequences are waiting already; try again in {retry_after_s:.0f} s",
                retry_after_s=retry_after_s,
            )
        patience_s = self._queue_timeout_s
        if visit.deadline is not None:
            patience_s = min(patience_s, visit.deadline - time.monotonic())
            if expected_s > patience_s:
                raise DeadlineUnreachable(
                    f"about {expected_s:.1f} s of waiting lie before the deadline's "
                    f"{max(0.0, patience_s):.1f} s",
                    retry_after_s=retry_after_s,
                )
        return await self._queue(lane, places, patience_s, retry_after_s)

    async def _queue(
        self, lane: _Lane, places: int, patience_s: float, retry_after_s: float
    ) -> int:
        if not lane.queue:
            # A lane that was idle starts now; time it did not use is not saved up.
            lane.clock = max(lane.clock, self._clock)
        waiter = _Waiter(asyncio.get_running_loop().create_future(), places)
        lane.queue.append(waiter)
        self._own[lane.waiting_field] += places
        self._admit()
        self._poll()
        try:
            async with asyncio.timeout(patience_s):
                return await waiter.turn
        except BaseException as error:
            self._leave(lane, waiter)
            if isinstance(error, TimeoutError):
                raise Overloaded(
                    f"no place became free within {patience_s:.1f} s",
                    code="queue_timeout",
                    retry_after_s=retry_after_s,
                ) from None
            raise

    def _has_queue(self) -> bool:
        return bool(self._interactive.queue or self._batch.queue)

    def _may_pass(self, lane: _Lane) -> bool:
        """Nobody waits, or only the one who would wait even if all others stood aside."""
        if not self._has_queue():
            return True
        if self._delayed is None or len(self._interactive.queue) + len(self._batch.queue) > 1:
            return False
        lane.clock = max(lane.clock, self._clock)
        return True

    def _try_enter(self, lane: _Lane, places: int, *, is_delayed: bool = False) -> bool:
        with self._ledger.lock:
            running = self._running()
            kept = sum(row[_KEPT] for row in self._rows)
            if is_delayed:
                kept -= self._own[_KEPT]
            if running + kept + places > self._capacity:
                return False
            self._own[lane.running_field] += places
            if is_delayed:
                self._own[_KEPT] = 0
        self._rate.tick(is_busy=running > 0)
        return True

    def _number_entry(self) -> int:
        self._entries += 1
        return self._entries

    def _leave(self, lane: _Lane, waiter: _Waiter) -> None:
        if waiter.turn.done() and not waiter.turn.cancelled():
            # Admitted in the very moment it gave up.
            self._give_back(lane, waiter.places, waiter.turn.result())
            return
        waiter.turn.cancel()
        lane.queue.remove(waiter)
        self._own[lane.waiting_field] -= waiter.places
        if self._delayed and self._delayed.waiter is waiter:
            self._delayed = None
            self._own[_KEPT] = 0
        self._admit()

    def _give_back(self, lane: _Lane, places: int, entry: int) -> None:
        self._rate.tick(is_busy=True)
        self._rate.count(places)
        if self._delayed and entry <= self._delayed.last_older:
            self._delayed.older -= places
        with self._ledger.lock:
            self._own[lane.running_field] -= places
        if self._has_queue():
            self._admit()

    def _admit(self) -> None:
        while lane := self._next_lane():
            waiter = lane.queue[0]
            if waiter.turn.cancelled():
                return  # it is about to leave, and calls again when it has
            if not self._try_enter(lane, waiter.places, is_delayed=self._delayed is not None):
                if waiter.places > 1:  # where one place is too many there is nothing to pass for
                    self._delay(lane, waiter)
                    self._let_pass()
                return
            self._delayed = None
            self._clock = lane.clock
            self._start(lane, waiter)

    def _next_lane(self) -> _Lane | None:
        if self._delayed:
            return self._delayed.lane
        queued = [lane for lane in self._lanes.values() if lane.queue]
        return min(queued, key=lambda one: one.clock, default=None)

    def _start(self, lane: _Lane, waiter: _Waiter) -> None:
        lane.queue.remove(waiter)
        self._own[lane.waiting_field] -= waiter.places
        lane.clock += waiter.places / lane.weight
        waiter.turn.set_result(self._number_entry())

    def _delay(self, lane: _Lane, waiter: _Waiter) -> None:
        """Its turn has come and it does not fit. Who came in from now on will not keep it out."""
        if self._delayed is None:
            older = int(self._own[1] + self._own[2])
            self._delayed = _Delay(lane, waiter, older, self._entries, time.monotonic())
        if self._own[_KEPT]:
            return
        # Which of the visits in other workers are older cannot be told: for a while, all of them.
        is_fresh = time.monotonic() < self._delayed.since + self._queue_timeout_s / 4
        with self._ledger.lock:
            older = self._delayed.older
            if is_fresh:
                older += self._running() - int(self._own[1] + self._own[2])
            # One at a time: several would keep places from one another for ever.
            is_first = not any(row[_KEPT] for row in self._rows)
            if is_first and older + waiter.places <= self._capacity:
                self._own[_KEPT] = waiter.places

    def _let_pass(self) -> None:
        """Those next after the one who is delayed, as long as they fit."""
        while any(self._let_one_pass(lane) for lane in sorted(self._lanes.values(), key=_clock)):
            pass

    def _let_one_pass(self, lane: _Lane) -> bool:
        index = int(self._delayed is not None and self._delayed.lane is lane)
        if len(lane.queue) <= index:
            return False
        waiter = lane.queue[index]
        if waiter.turn.cancelled() or not self._try_enter(lane, waiter.places):
            return False
        self._start(lane, waiter)
        return True

    def _poll(self) -> None:
        """Places that another worker gave back wake nobody here."""
        if self._worker.count == 1 or self._is_polling:
            return
        self._is_polling = True
        asyncio.get_running_loop().call_later(_POLL_S, self._poll_again)

    def _poll_again(self) -> None:
        self._is_polling = False
        self._admit()
        if self._has_queue():
            self._poll()

    def _open_account(self, visit: Visit, places: int) -> None:
        """Counts against the key's own limit, where it has one."""
        rows = [self._ledger.row(f"held:{visit.account}:{n}") for n in range(self._worker.count)]
        own = rows[self._worker.index]
        with self._ledger.lock:
            if own[2] != self._own[_LIFE]:
                own[1], own[2] = 0, self._own[_LIFE]
            # What a process held that has died and been replaced counts no longer.
            lives = zip(rows, self._rows, strict=True)
            held = int(sum(row[1] for row, gate in lives if row[2] == gate[_LIFE]))
            # One request larger than the limit may still run, alone.
            if held and held + places > visit.account_limit:
                wait_s = max(1.0, self._rate.time_for(places))
                raise Overloaded(
                    f"this key has {held} sequences running or waiting; its limit is "
                    f"{visit.account_limit}",
                    code="key_concurrency",
                    retry_after_s=min(wait_s, _LONGEST_RETRY_AFTER_S),
                )
            own[1] += places

    def _close_account(self, visit: Visit, places: int) -> None:
        with self._ledger.lock:
            self._ledger.row(f"held:{visit.account}:{self._worker.index}")[1] -= places


class Stay:
    """A visit's time inside: a plain object, for a generator would cost each request more."""

    __slots__ = ("_entry", "_gate", "_places", "_visit")

    def __init__(self, gate: Gate, visit: Visit, places: int) -> None:
        self._gate, self._visit, self._places = gate, visit, places

    async def __aenter__(self) -> None:
        self._entry = await self._gate.take(self._visit, self._places)

    async def __aexit__(self, *_: object) -> None:
        self._gate.give_back(self._visit, self._places, self._entry)


class _Rate:
    """Sequences a second while there was work: counts that fade with busy time."""

    def __init__(self) -> None:
        self._count = 0.0
        self._span_s = 0.0
        self._last = time.monotonic()

    def tick(self, *, is_busy: bool) -> None:
        """Called before the number of running sequences changes."""
        now = time.monotonic()
        elapsed_s, self._last = now - self._last, now
        if is_busy:
            keep = 0.5 ** (elapsed_s / _RATE_HALF_LIFE_S)
            self._count *= keep
            self._span_s = self._span_s * keep + elapsed_s

    def count(self, sequences: int) -> None:
        self._count += sequences

    def time_for(self, sequences: int) -> float:
        if self._count < 1e-3:
            return 1.0  # nothing learnt yet
        return sequences * self._span_s / self._count


GATE = web.AppKey("gate", Gate)
