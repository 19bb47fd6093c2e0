"""The queue: how many sequences may be inside the engines, whose turn it is, who waits how long.

Two lanes, `interactive` and `batch`, share the places by weight: each admission moves its lane's
clock forward by its size over the lane's weight, and the lane whose clock is furthest behind goes
next. A batch moves its clock far ahead, so it cannot starve chats; and no request counts for more
than half of the places, so the largest neither waits for the last long stream nor takes them all.

The first in that lane is waited for even when it is large, so chats cannot starve a batch. But as
long as requests older than its turn alone keep it out, waiting helps nobody: whoever fits passes
it. Once only those who passed are in its way its places are kept free until it is in. Otherwise:
within a lane, first come, first served.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Literal

from aiohttp import web

from gateway.admission.keys import Caller
from gateway.admission.limits import Limits
from gateway.admission.throughput import Throughput
from gateway.config import Settings
from gateway.errors import DeadlineUnreachable, InvalidRequest, Overloaded
from gateway.observability.metrics import Metrics

LaneName = Literal["interactive", "batch"]
LANES: tuple[LaneName, ...] = ("interactive", "batch")
_LONGEST_RETRY_AFTER_S = 120.0
_DEADLINE_DIGITS = 9
_CLOCK = attrgetter("clock")


@dataclass(slots=True)
class Ticket:
    """What wants in: how many sequences, in which lane, on whose account, until when."""

    sequences: int
    lane: LaneName = "interactive"
    account: str = ""
    account_limit: int = 0
    deadline: float | None = None  # on the event loop's clock


def build_ticket(
    headers: Mapping[str, str],
    caller: Caller,
    sequences: int,
    lane: LaneName,
    deadline: float | None,
) -> Ticket:
    """In the key's lane, else the one asked for, else the usual one."""
    asked = headers.get("X-Priority")
    if asked is not None and asked not in LANES:
        raise InvalidRequest("X-Priority is interactive or batch", param="X-Priority")
    return Ticket(
        sequences=sequences,
        lane=caller.lane or asked or lane,
        account=caller.name,
        account_limit=caller.max_concurrency,
        deadline=deadline,
    )


def parse_deadline(headers: Mapping[str, str]) -> float | None:
    """X-Deadline-Ms from now, on the event loop's clock."""
    text = headers.get("X-Deadline-Ms")
    if text is None:
        return None
    if not text.isascii() or not text.isdigit() or len(text) > _DEADLINE_DIGITS:
        raise InvalidRequest("X-Deadline-Ms is a number of milliseconds", param="X-Deadline-Ms")
    return asyncio.get_running_loop().time() + int(text) / 1000


@dataclass(slots=True, eq=False)
class _Waiter:
    turn: asyncio.Future[int]
    places: int


@dataclass(slots=True)
class _Lane:
    """What of a lane runs and waits; the queue in order of arrival."""

    name: LaneName
    weight: float
    running: int = 0
    waiting: int = 0
    clock: float = 0.0
    queue: deque[_Waiter] = field(default_factory=deque)


@dataclass(slots=True)
class _Delay:
    """Who is next and does not fit; and the places that requests older than its turn still hold."""

    lane: _Lane
    waiter: _Waiter
    older: int
    last_older: int


class AdmissionQueue:
    """Counts what is inside; the only limit between a caller and the engines."""

    def __init__(self, settings: Settings, metrics: Metrics, limits: Limits) -> None:
        self._capacity = settings.max_running
        self._max_waiting = settings.max_waiting
        self._queue_timeout_s = settings.queue_timeout_s
        self._interactive = _Lane("interactive", settings.interactive_weight)
        self._batch = _Lane("batch", settings.batch_weight)
        self._lanes = {"interactive": self._interactive, "batch": self._batch}
        self._limits = limits
        self._clock = 0.0
        self._entries = 0
        self._delayed: _Delay | None = None
        self._kept = 0  # places kept free for the one who is delayed
        self._throughput = Throughput()
        metrics.running_sequences.read = lambda: [((name,), self.count(name)[0]) for name in LANES]
        metrics.waiting_sequences.read = lambda: [((name,), self.count(name)[1]) for name in LANES]
        metrics.max_running_sequences.read = lambda: [((), settings.max_running)]
        metrics.max_waiting_sequences.read = lambda: [((), settings.max_waiting)]

    def enter(self, ticket: Ticket) -> Admission:
        """Holds the ticket's places for as long as the block of `async with` runs."""
        return Admission(self, ticket, min(ticket.sequences, max(1, self._capacity // 2)))

    async def take(self, ticket: Ticket, places: int) -> int:
        """The number of this entry; `give_back` wants it."""
        if ticket.account_limit:
            await self._hold(ticket, places)
        lane = self._lanes[ticket.lane]
        if self._may_pass(lane) and self._try_enter(lane, places):
            return self._number_entry()
        try:
            return await self._wait(ticket, lane, places)
        except BaseException:
            if ticket.account_limit:
                await self._limits.release(ticket.account, places)
            raise

    async def give_back(self, ticket: Ticket, places: int, entry: int) -> None:
        self._give_back(self._lanes[ticket.lane], places, entry)
        if ticket.account_limit:
            await self._limits.release(ticket.account, places)

    @contextlib.asynccontextmanager
    async def enter_beside(self, ticket: Ticket) -> AsyncIterator[None]:
        """For what takes no place in an engine's batch: it counts against its key's limit alone."""
        if not ticket.account_limit:
            yield
            return
        await self._hold(ticket, ticket.sequences)
        try:
            yield
        finally:
            await self._limits.release(ticket.account, ticket.sequences)

    def expected_wait_s(self, places: int) -> float:
        """How long until so many more places have become free, by what the engines did lately."""
        missing = self._running + self._waiting + places - self._capacity
        return self._throughput.time_for(missing) if missing > 0 else 0.0

    def count(self, lane: LaneName) -> tuple[int, int]:
        """Sequences of a lane that run and that wait."""
        one = self._lanes[lane]
        return one.running, one.waiting

    @property
    def _running(self) -> int:
        return self._interactive.running + self._batch.running

    @property
    def _waiting(self) -> int:
        return self._interactive.waiting + self._batch.waiting

    async def _hold(self, ticket: Ticket, places: int) -> None:
        held = await self._limits.hold(ticket.account, places, ticket.account_limit)
        if held:
            wait_s = max(1.0, self._throughput.time_for(places))
            raise Overloaded(
                f"this key has {held} sequences running or waiting; its limit is "
                f"{ticket.account_limit}",
                code="key_concurrency",
                retry_after_s=min(wait_s, _LONGEST_RETRY_AFTER_S),
            )

    async def _wait(self, ticket: Ticket, lane: _Lane, places: int) -> int:
        expected_s = self.expected_wait_s(places)
        retry_after_s = min(max(1.0, expected_s), _LONGEST_RETRY_AFTER_S)
        waiting = self._waiting
        if waiting + places > self._max_waiting:
            raise Overloaded(
                f"{waiting} sequences are waiting already; try again in {retry_after_s:.0f} s",
                retry_after_s=retry_after_s,
            )
        patience_s = self._queue_timeout_s
        if ticket.deadline is not None:
            left_s = ticket.deadline - asyncio.get_running_loop().time()
            patience_s = min(patience_s, left_s)
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
        lane.waiting += places
        self._admit()
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
        running = self._running
        kept = 0 if is_delayed else self._kept
        if running + kept + places > self._capacity:
            return False
        lane.running += places
        if is_delayed:
            self._kept = 0
        self._throughput.tick(is_busy=running > 0)
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
        lane.waiting -= waiter.places
        if self._delayed and self._delayed.waiter is waiter:
            self._delayed = None
            self._kept = 0
        self._admit()

    def _give_back(self, lane: _Lane, places: int, entry: int) -> None:
        self._throughput.tick(is_busy=True)
        self._throughput.count(places)
        if self._delayed and entry <= self._delayed.last_older:
            self._delayed.older -= places
        lane.running -= places
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
        return min(queued, key=_CLOCK, default=None)

    def _start(self, lane: _Lane, waiter: _Waiter) -> None:
        lane.queue.remove(waiter)
        lane.waiting -= waiter.places
        lane.clock += waiter.places / lane.weight
        waiter.turn.set_result(self._number_entry())

    def _delay(self, lane: _Lane, waiter: _Waiter) -> None:
        """Its turn has come and it does not fit. Who came in from now on will not keep it out."""
        if self._delayed is None:
            self._delayed = _Delay(lane, waiter, self._running, self._entries)
        if not self._kept and self._delayed.older + waiter.places <= self._capacity:
            self._kept = waiter.places

    def _let_pass(self) -> None:
        """Those next after the one who is delayed, as long as they fit."""
        while any(self._let_one_pass(lane) for lane in sorted(self._lanes.values(), key=_CLOCK)):
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


class Admission:
    """A ticket's time inside: a plain object, for a generator would cost each request more."""

    __slots__ = ("_entry", "_places", "_queue", "_ticket")

    def __init__(self, queue: AdmissionQueue, ticket: Ticket, places: int) -> None:
        self._queue, self._ticket, self._places = queue, ticket, places

    async def __aenter__(self) -> None:
        self._entry = await self._queue.take(self._ticket, self._places)

    async def __aexit__(self, *_: object) -> None:
        await self._queue.give_back(self._ticket, self._places, self._entry)


QUEUE = web.AppKey("queue", AdmissionQueue)
